"""SparseGPT's solver: prunes a weight column by column and updates the later columns to make up for the error.

The paper's code applies every error to all later columns through U, the upper factor of the inverse gram G^-1 = U^T U.
Here G = R R^T is factored instead, R upper and R = U^-1. The errors E of all columns and the change D = W - Q of the
weight obey E = D R, so what the columns before a window did to it is D R[before, window] U[window, window]: one product
a window, and only triangles as wide as a window are ever inverted.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from prune_lab.models.anatomy import out_in
from prune_lab.pruning.gram import DAMPING, damped_cholesky
from prune_lab.pruning.pattern import Pattern
from prune_lab.pruning.selection import (
    RANKED_BY_PAIRS,
    count_to_remove,
    keep_in_fixed_steps,
    keep_layer,
    keep_pattern,
    keep_rows,
)
from prune_lab.system.cuda_graph import captured

WINDOW = 128  # columns whose weights are ranked together, in all rows or in each
STRIP = 16  # columns that are updated one by one before the rest of the window is, in one product


@dataclass(frozen=True)
class Solved:
    """A pruned weight (out, in), its keep-mask, and the damping that made the gram positive definite."""

    weight: Tensor
    keep: Tensor
    damping: float


@torch.no_grad()
def prune_linear(
    linear: Any, gram: Tensor, amount: float, pattern: Pattern | None = None, by_row: bool = False
) -> Solved:
    """Prunes and updates a Linear's weight in place, as `solve` does; its keep-mask has shape (out, in)."""
    weight = out_in(linear, linear.weight)
    if pattern is None and count_to_remove(weight.numel(), amount) == 0:
        return Solved(weight, torch.ones_like(weight, dtype=torch.bool), damping=0.0)
    solved = solve(weight, gram, amount, pattern, by_row)
    weight.copy_(solved.weight)
    return solved


@torch.no_grad()
def solve(weight: Tensor, gram: Tensor, amount: float, pattern: Pattern | None = None, by_row: bool = False) -> Solved:
    """Prunes `amount` of every WINDOW columns, or to a pattern (Frantar & Alistarh, 2301.00774).

    by_row: of every row of a window, so many that up to its end the row has lost `amount`; else of all rows together.

    weight: (out, in). gram: X^T X (in, in), float32; its scale does not matter. What is zero stays zero, and the
    weights of inputs that were never anything but zero become it; all these count as removed, even beyond `amount`.
    """
    columns = weight.float().T.contiguous()  # (in, out): a column of the weight is a row here, contiguous
    gram = gram.float().clone()
    dead = gram.diagonal() == 0
    gram.diagonal()[dead] = 1
    columns[dead] = 0
    factor, damping = factor_of(gram)
    zero, keep, changes = columns == 0, torch.ones_like(columns, dtype=torch.bool), torch.zeros_like(columns)
    m = pattern.m if pattern is not None else 1
    window = max(m, WINDOW - WINDOW % m)
    for first in range(0, len(columns), window):
        part = slice(first, last := min(first + window, len(columns)))
        diagonal_block = factor[part, part]
        one = torch.eye(len(diagonal_block), dtype=gram.dtype, device=gram.device)
        inverse = torch.linalg.solve_triangular(diagonal_block, one, upper=True)
        was = columns[part].clone()
        columns[part].addmm_(inverse.T, factor[:first, part].T @ changes[:first])
        if pattern is None and by_row:
            remove = count_to_remove(last, amount) - count_to_remove(first, amount)
            keep[part] = _chosen_by_row(columns[part], zero[part], inverse, remove)
        elif pattern is None:
            keep[part] = _chosen(columns[part], zero[part], inverse, amount)
        _sweep(columns[part], keep[part], zero[part], inverse, pattern, repeated=last - first == window)
        torch.sub(was, columns[part], out=changes[part])
    return Solved(columns.T.contiguous(), (keep & ~zero).T.contiguous(), damping)


def _chosen(columns: Tensor, zero: Tensor, inverse: Tensor, amount: float) -> Tensor:
    """Keep-mask of a window where there is no pattern, shape (columns, out)."""
    scores = _scores(columns, zero, inverse.diagonal()[:, None])
    remove = count_to_remove(scores.numel(), amount)
    # A GPU is not waited for: while it sweeps through a window, the next one's work is handed to it.
    keep = keep_in_fixed_steps(scores, remove) if scores.is_cuda else keep_layer(scores, amount)
    return keep.T


def _chosen_by_row(columns: Tensor, zero: Tensor, inverse: Tensor, remove: int) -> Tensor:
    """Keep-mask of a window of whose every row `remove` go, shape (columns, out)."""
    scores = _scores(columns, zero, inverse.diagonal()[:, None])
    if not scores.is_cuda:
        return keep_rows(scores, remove).T
    lowest = scores.argsort(dim=1, stable=True)[:, :remove]  # rows are short, and the GPU is not waited for
    return torch.ones_like(scores, dtype=torch.bool).scatter_(1, lowest, False).T


def _scores(columns: Tensor, zero: Tensor, scale: Tensor) -> Tensor:
    """Error that removing each weight makes, shape (out, columns): ties by that order."""
    return (columns / scale).square().masked_fill_(zero, -1).T.contiguous()


def _sweep(
    columns: Tensor, keep: Tensor, zero: Tensor, inverse: Tensor, pattern: Pattern | None, repeated: bool
) -> None:
    """Prunes the columns of a window, shape (columns, out), in place, by `keep` or a pattern, which sets `keep`.

    inverse: U of the window. repeated: whether it has the width that all but a last one have, so that other windows, of
    this Linear or of others, are swept through alike.
    """
    if repeated and columns.is_cuda and (pattern is None or pattern.m <= RANKED_BY_PAIRS):
        _captured_sweep(columns.device, tuple(columns.shape), pattern)(columns, keep, zero, inverse)
    else:
        _sweep_once(columns, keep, zero, inverse, pattern)


def _sweep_once(columns: Tensor, keep: Tensor, zero: Tensor, inverse: Tensor, pattern: Pattern | None) -> None:
    errors, scale = torch.empty_like(columns), inverse.diagonal()[:, None]
    gone_by_scale = torch.empty_like(columns)  # 1 / U_ii where a weight goes, else 0

    def set_gone(part: slice) -> None:
        gone_by_scale[part] = (~keep[part] | zero[part]) / scale[part]

    if pattern is None:
        set_gone(slice(None))
    strip = STRIP if pattern is None else pattern.m * max(1, STRIP // pattern.m)
    for first in range(0, len(columns), strip):
        last = min(first + strip, len(columns))
        for i in range(first, last):
            if pattern is not None and i % pattern.m == 0:
                group = slice(i, i + pattern.m)
                keep[group] = keep_pattern(_scores(columns[group], zero[group], scale[group]), pattern).T
                set_gone(group)
            torch.mul(columns[i], gone_by_scale[i], out=errors[i])
            columns[i + 1 : last].addr_(inverse[i, i + 1 : last], errors[i], alpha=-1)
        columns[last:].addmm_(inverse[first:last, last:].T, errors[first:last], alpha=-1)
    columns.masked_fill_(gone_by_scale != 0, 0)


class _CapturedSweep:
    """The sweep through a window of one shape, some 300 small kernels, started at once."""

    def __init__(self, device: torch.device, shape: tuple[int, ...], pattern: Pattern | None) -> None:
        columns = torch.zeros(shape, dtype=torch.float32, device=device)
        keep, zero = (torch.zeros(shape, dtype=torch.bool, device=device) for _ in range(2))
        self._own = columns, keep, zero, torch.eye(shape[0], dtype=torch.float32, device=device)
        _sweep_once(*self._own, pattern)
        _, self._again = captured(lambda: _sweep_once(*self._own, pattern))

    def __call__(self, *given: Tensor) -> None:
        for own, tensor in zip(self._own, given, strict=True):
            own.copy_(tensor)
        self._again()
        for tensor, own in zip(given[:2], self._own[:2], strict=True):  # columns and which of them stay
            tensor.copy_(own)


_captured_sweep = lru_cache(maxsize=8)(_CapturedSweep)  # the Linears of a block have a few shapes


def forget_sweeps() -> None:
    """Gives back what captured work holds of a GPU's memory."""
    _captured_sweep.cache_clear()


def factor_of(gram: Tensor) -> tuple[Tensor, float]:
    """R, upper triangular, with R R^T the damped gram; and the damping used, as a fraction of the mean diagonal.

    R is the Cholesky factor of the gram read backwards. Raises Refused where it exists with no damping.
    """
    lower, damping = damped_cholesky(gram.flip(0, 1), gram.diagonal().mean(), DAMPING)
    return lower.flip(0, 1), damping
