"""method=none: the dense model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from prune_lab.methods.weights import WeightMethod
from prune_lab.pruning.pruned import Pruned

if TYPE_CHECKING:
    from prune_lab.models.anatomy import Anatomy
    from prune_lab.pruning.calibration import Calibrator


@dataclass(frozen=True)
class NoPruning(WeightMethod):
    """Removes nothing."""

    not_applicable: ClassVar[tuple[str, ...]] = ("amount", "pattern", "scope", "allocation", "refit")

    @property
    def calibrated(self) -> bool:
        """False: the model stays dense."""
        return False

    def solved_width(self, anatomy: Anatomy) -> int | None:
        """None: nothing is solved."""
        return None

    @property
    def needs_whole_model(self) -> str | None:
        """None: the model stays as it is."""
        return None

    def prune(self, anatomy: Anatomy, amount: float, seed: int, calibrator: Calibrator | None = None) -> Pruned:
        """Leaves the model as it is."""
        return Pruned()
