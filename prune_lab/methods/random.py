"""method=random: removes random weights, as a control."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from prune_lab.methods.weights import WeightMethod


@dataclass(frozen=True)
class Random(WeightMethod):
    """Random weights: the same ones for the same seed, and more of them at a higher amount."""

    score_name: ClassVar[str | None] = "random"
