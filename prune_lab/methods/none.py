"""method=none: the dense model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from prune_lab.methods.base import Pruned, WeightMethod
from prune_lab.models.anatomy import Anatomy


@dataclass(frozen=True)
class NoPruning(WeightMethod):
    """Removes nothing."""

    not_applicable: ClassVar[tuple[str, ...]] = ("amount", "pattern", "scope")

    def prune(self, anatomy: Anatomy, amount: float, seed: int) -> Pruned:
        """Leaves the model as it is."""
        return Pruned()
