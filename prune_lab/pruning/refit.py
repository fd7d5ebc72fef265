"""Refit: closed-form updates of the weights that stay, from the gram matrix of a Linear's inputs. Pure functions.

A removed input or weight changes a Linear's outputs X W^T. Those that stay are set to the least-squares solution for
the outputs of the dense weight, with a ridge towards it: they minimise tr((W - W') Gd (W - W')^T), where Gd is X^T X
plus `damping` times the mean of its diagonal. A large damping gives the plain cut, none plain least squares.
Columns: all rows of a weight lose the same inputs (OSSCAR: Meng et al., 2403.12983; CORP: 2602.05243). Rows: each row
has a mask of its own (ALPS: Meng et al., 2406.07831).
The target: by default the outputs of the dense weight for the Linear's own inputs X. Behind pruned blocks those differ
from the inputs that it has in the dense model, and an `Error` says how far the outputs X W^T are from what is wanted
instead (dense_beside.py): (W' - W) X^T X is then to be nearest to it, too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prune_lab.errors import Refused
from prune_lab.pruning.gram import DAMPING, centred, damped_cholesky
from prune_lab.system.device import uses_bfloat16

ITERATIONS = 10  # of conjugate gradients
CONSTANT = 1e-6  # of the mean square of the inputs: a variance below is rounding, of inputs that never change


@dataclass(frozen=True)
class Error:
    """Sum over tokens of x e^T (in, out), and the mean of e (out,): e, the outputs that are wanted, less x W^T."""

    product: Tensor
    mean: Tensor


@dataclass(frozen=True)
class Columns:
    """Refitted columns (out, kept), what is to be added to the bias (out,), and the damping that was needed."""

    weight: Tensor
    shift: Tensor | None
    damping: float


def refit_columns(
    weight: Tensor,
    gram: Tensor,
    keep: Tensor,
    mean: Tensor | None = None,
    tokens: int = 0,
    damping: float = DAMPING,
    error: Error | None = None,
) -> Columns:
    """The kept columns of a weight (out, in), refitted to the outputs of all of them, or to a target with an `error`.

    gram: X^T X (in, in), float32 or float64, which is also the type of the computation. keep: bools (in,). mean and
    tokens: the mean of each input (in,) and the number of tokens, of a Linear that has a bias: then the bias takes
    part, and the gram is centred.
    """
    target, size = weight.to(gram.dtype), gram.diagonal().mean()
    wanted = None if error is None else error.product.to(gram.dtype)
    if mean is not None:
        mean = mean.to(gram.dtype)
        gram = centred(gram, mean, tokens)
        wanted = None if error is None or wanted is None else wanted - tokens * torch.outer(mean, error.mean)
    kept, gone = keep.nonzero().flatten(), (~keep).nonzero().flatten()
    inner, cross = gram[kept[:, None], kept], gram[kept[:, None], gone]
    # W' = W_K + (W_R G_RK + E_K) Gd_KK^-1: without an error equal to W Gd_:K Gd_KK^-1, and exact if nothing is removed.
    change, used = torch.zeros_like(target[:, kept]), damping
    if not (size.isfinite() and gram.diagonal().mean() <= CONSTANT * size):
        lower, used = damped_cholesky(inner, gram.diagonal().mean(), damping)
        missing = cross @ target[:, gone].T
        change = torch.cholesky_solve(missing if wanted is None else missing + wanted[kept], lower).T
    shift = None if mean is None else target[:, gone] @ mean[gone] - change @ mean[kept]
    if shift is not None and error is not None:
        shift = shift + error.mean
    return Columns(target[:, kept] + change, shift, used)


def refit_rows(
    target: Tensor,
    start: Tensor,
    gram: Tensor,
    keep: Tensor,
    damping: float = DAMPING,
    iterations: int = ITERATIONS,
    error: Error | None = None,
) -> Tensor:
    """The kept weights, refitted row by row to the outputs of `target` (plus an `error`); (out, in), zero elsewhere.

    target: the dense weight (out, in). start: a weight with zeros where `keep`, bools (out, in), is False. gram: X^T X
    (in, in). All rows are solved at once by masked conjugate gradients with the diagonal as preconditioner; a few
    iterations are enough, and each takes one product (out, in) x (in, in). A CPU that computes bfloat16 natively has
    these products in bfloat16 for a weight in bfloat16, to which the result will be rounded (tests/test_refit.py
    compares what is left of the error with that of products in float32).
    """
    damped = gram.clone()
    damped.diagonal().add_(damping * gram.diagonal().mean())
    # With inputs scaled to unit norm the preconditioner is the identity, and bfloat16 rounds all inputs alike.
    scale = damped.diagonal().clamp(min=torch.finfo(gram.dtype).tiny).rsqrt()
    narrow = target.dtype == torch.bfloat16 and not gram.is_cuda and uses_bfloat16("auto", gram.device)
    target, start = target.to(gram.dtype), start.to(gram.dtype)
    residual = (target - start) @ damped
    if error is not None:
        residual = residual + error.product.T
    residual = residual.mul_(scale).mul_(keep)
    scaled = damped.mul_(scale).mul_(scale[:, None]).to(torch.bfloat16 if narrow else gram.dtype)
    change, direction = torch.zeros_like(residual), residual
    size = residual.square().sum(1, keepdim=True)
    for _ in range(iterations):
        image = (direction.to(scaled.dtype) @ scaled).to(gram.dtype).mul_(keep)
        step = _quotient(size, (direction * image).sum(1, keepdim=True))
        change.addcmul_(direction, step)
        residual = residual - step * image
        before, size = size, residual.square().sum(1, keepdim=True)
        direction = residual + _quotient(size, before) * direction
    return start + change.mul_(scale)


def check_finite(name: str, refitted: Tensor) -> None:
    """Raises Refused where the refitted weight or bias of a Linear is not finite."""
    if not refitted.isfinite().all():
        raise Refused(
            f"the refit of {name} is not finite: its activations overflow; give dtype=float32 or bfloat16, or "
            "method.refit=none"
        )


def _quotient(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator, and 0 where there is nothing left to solve."""
    solved = denominator > 0
    return torch.where(solved, numerator / torch.where(solved, denominator, 1), 0)
