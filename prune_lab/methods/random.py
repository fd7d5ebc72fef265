"""method=random: the control."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prune_lab.methods.base import WeightMethod


@dataclass(frozen=True)
class Random(WeightMethod):
    """Random single weights: the same ones for the same seed, and more of them at a higher amount."""

    def score(self, weight: Tensor, generator: torch.Generator) -> Tensor:
        """Uniform in [0, 1), drawn on the CPU so that every device prunes the same weights."""
        return torch.rand(weight.shape, generator=generator).to(weight.device)
