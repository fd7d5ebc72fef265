"""Costs that do not follow from a shape, such as times and peak memory: a model fitted to a few measured shapes. Pure.

A cost is taken to be a sum of parts, none of them negative: one that is always there, and in proportion to the blocks,
to what their MLPs, attention and experts multiply, and to the hidden size (the embedding and the head).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
from numpy.typing import NDArray

Values = NDArray[numpy.float64]
_WIDTHS = ("mlp", "heads", "query_heads", "experts")


@dataclass(frozen=True)
class CostFit:
    """A fitted cost: the share of each part, and how far it is from what was measured.

    error: the largest relative difference from a measured shape that the fit had not seen, over all of them in turn.
    """

    totals: Mapping[str, int]
    shares: tuple[float, ...]
    error: float

    def cost(self, counts: Mapping[str, Any]) -> Values:
        """The cost of shapes, by their counts."""
        parts = _parts(counts, self.totals)
        return numpy.asarray(sum(share * part for share, part in zip(self.shares, parts, strict=True)), dtype=float)


def fit(shapes: Sequence[Mapping[str, int]], values: Sequence[float], totals: Mapping[str, int]) -> CostFit:
    """The fit to some measured shapes, each counted by its relative difference."""
    rows = numpy.array([[float(part) for part in _parts(counts, totals)] for counts in shapes])
    measured = numpy.array(values, dtype=float)
    errors = []
    for left in range(len(measured)):
        others = [number for number in range(len(measured)) if number != left]
        if len(others) >= 2:
            found = _least_squares(rows[others], measured[others])
            errors.append(abs(float(rows[left] @ found) / measured[left] - 1))
    return CostFit(dict(totals), tuple(_least_squares(rows, measured).tolist()), max(errors, default=float("nan")))


def _parts(counts: Mapping[str, Any], totals: Mapping[str, int]) -> list[Any]:
    """The parts of a cost, each 1 for the dense model."""
    share = {axis: counts[axis] / total for axis, total in totals.items()}
    blocks, hidden = share.get("blocks", 1.0), share.get("hidden", 1.0)
    widths = [share[axis] for axis in _WIDTHS if axis in share]
    if "mlp" in share and "experts" in share:  # what the experts of a mixture hold
        widths.append(share["mlp"] * share["experts"])
    always = 1.0 + 0 * blocks  # of the type of the others: a number, or an array of shapes
    return [always, blocks, *(blocks * hidden * width for width in widths), hidden, blocks * hidden]


def _least_squares(rows: Values, measured: Values) -> Values:
    """Shares, none negative, by least squares of the relative differences."""
    from scipy.optimize import nnls

    shares: Values = nnls(rows / measured[:, None], numpy.ones(len(measured)))[0]
    return shares
