"""method=random: the control."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from prune_lab.methods.weights import WeightMethod
from prune_lab.pruning import scores
from prune_lab.pruning.statistics import Seen


@dataclass(frozen=True)
class Random(WeightMethod):
    """Random single weights: the same ones for the same seed, and more of them at a higher amount."""

    def score(self, weight: Tensor, seen: Seen) -> Tensor:
        """Uniform in [0, 1)."""
        return scores.random(weight, seen)
