"""method=magnitude: removes the weights of smallest magnitude."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from prune_lab.methods.weights import WeightMethod


@dataclass(frozen=True)
class Magnitude(WeightMethod):
    """|W|, compared within each matrix (Han et al., 1506.02626)."""

    score_name: ClassVar[str | None] = "magnitude"
