"""method=structured: whole units, removed from every block alike."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prune_lab.methods.base import Method
from prune_lab.models.anatomy import UNIT_KINDS
from prune_lab.pruning.pruned import Pruned
from prune_lab.pruning.scores import OF_UNITS, SCORES

if TYPE_CHECKING:
    from prune_lab.models.anatomy import Anatomy
    from prune_lab.pruning.calibration import Calibrator


@dataclass(frozen=True)
class Structured(Method):
    """MLP channels and KV groups of lowest score (by L2 norm: Li et al., 1608.08710), the same count in every block.

    A stock config holds one width for all blocks, so each block drops its own units, but as many as the others.
    """

    units: tuple[str, ...] = ("mlp",)
    score: str = "l2"
    round_to: int | None = None
    compensate: bool = False
    physical: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "units", tuple(self.units))
        if not self.units or set(self.units) - set(UNIT_KINDS) or len(set(self.units)) != len(self.units):
            raise ValueError(f"units={list(self.units)} must be one or more of {', '.join(UNIT_KINDS)}, each once")
        if self.score not in OF_UNITS:
            raise ValueError(f"score={self.score!r} is none of {', '.join(OF_UNITS)}")
        if self.round_to is not None and self.round_to < 1:
            raise ValueError(f"round_to={self.round_to} must be at least 1")

    @property
    def calibrated(self) -> bool:
        """Whether the score or the compensation looks at calibration text."""
        return bool(SCORES[self.score].needs) or self.compensate

    def check(self, config: Any, amounts: Iterable[float]) -> None:
        """Raises Refused for kinds of units that the model lacks, and for counts that its config cannot hold."""
        from prune_lab.pruning import units

        units.check(self, config, amounts)

    def prune(self, anatomy: Anatomy, amount: float, seed: int, calibrator: Calibrator | None = None) -> Pruned:
        """Removes (or zeroes) units of every chosen kind and returns what went from each Linear."""
        from prune_lab.pruning import units

        return units.prune(self, anatomy, amount, seed, calibrator)
