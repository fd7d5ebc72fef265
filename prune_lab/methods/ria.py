"""method=ria: Wanda with weights taken relative to their row and column."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from prune_lab.methods.weights import WeightMethod


@dataclass(frozen=True)
class Ria(WeightMethod):
    """Relative importance and activations (Zhang et al., ICLR 2024), compared within each matrix."""

    score: ClassVar[Any] = "ria"
