"""method=wanda: small weights on quiet inputs go first."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from prune_lab.methods.weights import WeightMethod
from prune_lab.pruning import scores
from prune_lab.pruning.statistics import Seen


@dataclass(frozen=True)
class Wanda(WeightMethod):
    """|W| x input norm, compared within each output row; no weight is updated (Sun et al., 2306.11695)."""

    scope: str = "row"

    needs = ("input_norm",)

    def score(self, weight: Tensor, seen: Seen) -> Tensor:
        """|W_ij| * ||X_j||, float32."""
        return scores.wanda(weight, seen)
