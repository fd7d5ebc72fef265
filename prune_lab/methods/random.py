"""method=random: the control."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from prune_lab.methods.weights import WeightMethod


@dataclass(frozen=True)
class Random(WeightMethod):
    """Random single weights: the same ones for the same seed, and more of them at a higher amount."""

    score: ClassVar[Any] = "random"
