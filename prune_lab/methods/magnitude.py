"""method=magnitude: the smallest weights go first."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prune_lab.methods.base import WeightMethod


@dataclass(frozen=True)
class Magnitude(WeightMethod):
    """|W| of single weights (Han et al., 1506.02626)."""

    def score(self, weight: Tensor, generator: torch.Generator) -> Tensor:
        """The absolute value, in the weight's own number type."""
        return weight.abs()
