"""method=wanda: weights times activation norms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from prune_lab.methods.weights import WeightMethod


@dataclass(frozen=True)
class Wanda(WeightMethod):
    """|W| x L2 norm of the input, compared within each output row; no weight is updated (Sun et al., 2306.11695)."""

    scope: str = "row"

    score_name: ClassVar[str | None] = "wanda"
