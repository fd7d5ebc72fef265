"""Allocation of an amount over blocks, so that the mean over all weights stays as asked. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

OWL_LAMBDA = 0.08  # blocks lie within amount - 0.16 and amount + 0.16
OWL_OUTLIER = 5.0  # an outlier is that many times the mean


def outlier_ratio(scores: Sequence[Tensor]) -> float:
    """OWL's D of a block: percent of its |W| * ||X|| above OWL_OUTLIER times their mean (Yin et al., 2310.05175)."""
    total, count = sum(float(s.double().sum()) for s in scores), sum(s.numel() for s in scores)
    limit = OWL_OUTLIER * total / count
    return 100 * sum(int((s > limit).sum()) for s in scores) / count


def owl(ratios: Sequence[float], amount: float, sizes: Sequence[int], spread: float = OWL_LAMBDA) -> list[float]:
    """Amounts of blocks with `sizes` weights: the more outliers a block has, the less it loses (2310.05175).

    Densities are 2 * spread * (D - min D) / (max D - min D), shifted so that the mean amount is `amount`.
    """
    low, high = min(ratios), max(ratios)
    if high == low:
        return [amount] * len(ratios)
    densities = [2 * spread * (ratio - low) / (high - low) for ratio in ratios]
    return to_mean([-density for density in densities], amount, sizes)


def to_mean(values: Sequence[float], amount: float, sizes: Sequence[int]) -> list[float]:
    """`values` shifted alike and clamped to [0, 1], so that their mean weighted by `sizes` is `amount`.

    What the clamp takes from one block, the others share.
    """
    total = sum(sizes)

    def mean(shift: float) -> float:
        return sum(min(1.0, max(0.0, v + shift)) * n for v, n in zip(values, sizes, strict=True)) / total

    low, high = -max(values), 1 - min(values)  # all of them 0, all of them 1
    for _ in range(200):  # bisection, to the last bit of a float
        middle = (low + high) / 2
        low, high = (middle, high) if mean(middle) < amount else (low, middle)
    return [min(1.0, max(0.0, v + high)) for v in values]


def by_sensitivity(
    losses: Sequence[Sequence[float]], amounts: Sequence[float], amount: float, sizes: Sequence[int]
) -> list[float]:
    """Amounts of blocks of least total damage, from measured loss increases.

    losses[b][i] is the rise of the loss when block b alone loses amounts[i]; amounts ascend, and at 0 the rise is 0.
    Between the measured points a block's damage is taken as the lower convex hull, which makes the cheapest step first
    (by damage for each weight removed) the best: weights go, step by step, until the mean is `amount`. Beyond the
    largest measured amount no block goes, unless the mean asks for more: then all rise alike.
    """
    steps = []
    for block, (rises, size) in enumerate(zip(losses, sizes, strict=True)):
        points = _lower_hull([(0.0, 0.0), *zip(amounts, rises, strict=True)])
        for (x0, y0), (x1, y1) in pairwise(points):
            steps.append(((y1 - y0) / ((x1 - x0) * size), block, x1 - x0))
    chosen, left = [0.0] * len(sizes), amount * sum(sizes)
    for _, block, width in sorted(steps):
        taken = min(width, max(0.0, left) / sizes[block])
        chosen[block] += taken
        left -= taken * sizes[block]
    return chosen if left <= 1e-9 * sum(sizes) else to_mean(chosen, amount, sizes)


def _lower_hull(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    hull: list[tuple[float, float]] = []
    for point in points:
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _slope(a: tuple[float, float], b: tuple[float, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])
