"""method=magnitude: the smallest weights go first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from prune_lab.methods.weights import WeightMethod


@dataclass(frozen=True)
class Magnitude(WeightMethod):
    """|W| of single weights (Han et al., 1506.02626)."""

    score: ClassVar[Any] = "magnitude"
