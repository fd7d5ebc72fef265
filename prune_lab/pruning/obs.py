"""Optimal brain surgeon (OBS) for groups of inputs of a Linear: the order in which they go. A pure function.

Removing inputs costs least where the weights that stay can make up for them, so each removal is followed by its
least-squares update, and the next one is chosen behind it (OSSCAR: Meng et al., 2403.12983; ZipLM: Kurtic et al.,
2302.04089). With Gd the damped gram of refit.py, Hi = Gd^-1 and B = W^T, the loss 1/2 tr((W - W') Gd (W - W')^T) grows
by 1/2 tr(B_g^T (Hi_gg)^-1 B_g) when group g goes. Then B and Hi lose what rows g had to do with the others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from prune_lab.errors import Refused
from prune_lab.pruning.gram import DAMPING, centred, damped_cholesky

# Steps in which single inputs are removed, at most: each takes one product with the whole inverse. Inputs of a step are
# chosen as if each went alone; of 1536 channels, steps of 24 left 0.1 % more loss after a refit than one at a time.
STEPS = 32
STILL = 1e-5  # of the mean square of an input: a variance below is rounding in float32, of an input that never changes


@dataclass(frozen=True)
class Removal:
    """Groups in the order in which they go (removed,), what each one costs (removed,), and what is left.

    Costs are those at the step in which a group went. kept: the groups that stay, ascending. weight: their columns,
    updated, (out, kept x width), group by group. damping: the one that was needed.
    """

    order: Tensor
    costs: Tensor
    kept: Tensor
    weight: Tensor
    damping: float


def per_step(width: int, remove: int) -> int:
    """Number of groups that are removed at a time: one where groups are wide, as those are few."""
    return 1 if width > 1 else max(1, math.ceil(remove / STEPS))


@torch.no_grad()
def remove_inputs(
    weight: Tensor,
    gram: Tensor,
    groups: Tensor,
    remove: int,
    mean: Tensor | None = None,
    tokens: int = 0,
    damping: float = DAMPING,
    at_once: int = 1,
    name: str = "a Linear",
    parts: int = 1,
) -> Removal:
    """Removes `remove` groups of columns of a weight (out, in), the `at_once` cheapest at a time; ties by the index.

    gram: X^T X (in, in), float32 or float64, which is also the type of the computation. groups: the columns of each
    group, (groups, width), each column once. mean and tokens: as in refit_columns, where the bias takes part. Inputs
    that never change (from zero where no bias takes part) cost nothing. parts: number of equal parts of the groups, one
    behind the other, each of which loses the same number; then at_once is 1. Raises Refused for activations or weights
    that overflow; name: the Linear that it names.
    """
    (count, width), device, columns = groups.shape, gram.device, groups.flatten()
    gram = gram[columns[:, None], columns]
    squares = gram.diagonal()
    if mean is not None:
        gram = centred(gram, mean.to(gram.dtype)[columns], tokens)
    still = (gram.diagonal() <= STILL * squares) & squares.isfinite()
    gram[still], gram[:, still] = 0, 0
    values, left, used = weight.to(gram.dtype).T[columns], torch.arange(count, device=device), damping
    of_part, quota, gone_of_part = left // (count // parts), remove // parts, torch.zeros_like(left[:parts])
    if still.all():  # there is nothing to solve
        first = left % (count // parts) < quota
        rest = values[~first.repeat_interleave(width)].T
        return Removal(left[first], gram.new_zeros(remove), left[~first], rest, used)
    lower, used = damped_cholesky(gram, gram.diagonal().mean(), damping)
    # Costs do not depend on the scale of an input; with Gd's diagonal at 1, outliers take no digits from the others.
    scale = lower.norm(dim=1, keepdim=True)
    inverse, values, moving = torch.cholesky_inverse(lower / scale), values * scale, ~still[:, None]
    order, costs, there = [left[:0]], [gram.new_zeros(0)], torch.ones_like(left, dtype=torch.bool)
    while remove > 0:
        cost = _costs(inverse, values * moving, width)
        if not cost.isfinite().all():
            raise Refused(
                f"the costs of removing inputs of {name} are not finite: weights or activations overflow; give another "
                "dtype"
            )
        cost[~there | (gone_of_part[of_part] >= quota)] = torch.inf  # gone, or of a part that has lost its number
        gone = torch.argsort(cost, stable=True)[: min(at_once, remove)]
        gone_of_part += torch.bincount(of_part[gone], minlength=parts)
        order.append(left[gone])
        costs.append(cost[gone])
        rows = (gone[:, None] * width + torch.arange(width, device=device)).flatten()
        of_gone = torch.linalg.cholesky(inverse[rows][:, rows])
        cross = torch.linalg.solve_triangular(of_gone, inverse[rows], upper=False)
        errors = torch.linalg.solve_triangular(of_gone, values[rows], upper=False)
        inverse.addmm_(cross.T, cross, alpha=-1)
        values.addmm_(cross.T, errors, alpha=-1)
        # What is gone stays in its place, apart from the others: to copy what is left takes longer than to pass it by.
        there[gone] = False
        inverse[rows], inverse[:, rows], values[rows] = 0, 0, 0
        inverse.diagonal()[rows] = 1
        remove -= len(gone)
    kept = there.repeat_interleave(width)
    weight_left = (values[kept] / scale[kept]).T
    return Removal(torch.cat(order), torch.cat(costs), left[there], weight_left, used)


def _costs(inverse: Tensor, values: Tensor, width: int) -> Tensor:
    """1/2 tr(B_g^T (Hi_gg)^-1 B_g) of each group g of `width` consecutive rows, (groups,)."""
    if width == 1:  # an inverse of a matrix with diagonal 1 has a diagonal of at least 1
        return values.square().sum(1) / inverse.diagonal().clamp(min=1) / 2
    count = len(values) // width
    blocks = inverse.view(count, width, count, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    lower = torch.linalg.cholesky(blocks)
    return torch.linalg.solve_triangular(lower, values.view(count, width, -1), upper=False).square().sum((1, 2)) / 2
