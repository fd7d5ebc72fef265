"""method=wanda: small weights on quiet inputs go first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from prune_lab.methods.weights import WeightMethod


@dataclass(frozen=True)
class Wanda(WeightMethod):
    """|W| x input norm, compared within each output row; no weight is updated (Sun et al., 2306.11695)."""

    scope: str = "row"

    score: ClassVar[Any] = "wanda"
