"""method=magnitude: the smallest weights go first."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from prune_lab.methods.weights import WeightMethod
from prune_lab.pruning import scores
from prune_lab.pruning.statistics import Seen


@dataclass(frozen=True)
class Magnitude(WeightMethod):
    """|W| of single weights (Han et al., 1506.02626)."""

    @property
    def counted_score(self) -> str:
        """The one there is, which goes by the weight alone."""
        return "magnitude"

    def score(self, weight: Tensor, seen: Seen) -> Tensor:
        """The absolute value, in the weight's own number type."""
        return scores.magnitude(weight, seen)
