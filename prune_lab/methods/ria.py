"""method=ria: Wanda with weights taken relative to their row and column."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from prune_lab.methods.weights import WeightMethod
from prune_lab.pruning import scores
from prune_lab.pruning.statistics import Seen


@dataclass(frozen=True)
class Ria(WeightMethod):
    """Relative importance and activations (Zhang et al., ICLR 2024), compared within each matrix."""

    needs = ("input_norm",)

    def score(self, weight: Tensor, seen: Seen) -> Tensor:
        """(|W_ij| / its column's sum + |W_ij| / its row's sum) * ||X_j||^0.5, float32."""
        return scores.ria(weight, seen)
