"""method=ria: relative importance and activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from prune_lab.methods.weights import WeightMethod


@dataclass(frozen=True)
class Ria(WeightMethod):
    """|W| relative to its row and column, x input norm^0.5, compared within each matrix (Zhang et al., ICLR 2024)."""

    score_name: ClassVar[str | None] = "ria"
