"""recovery=none: pruning without training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from prune_lab.recovery.base import Recovery

if TYPE_CHECKING:
    from prune_lab.recovery.context import TrainingContext


@dataclass(frozen=True)
class NoRecovery(Recovery):
    """Leaves the model as pruning made it."""

    not_applicable: ClassVar[tuple[str, ...]] = ("steps", "lr", "batch_size")

    @property
    def training_steps(self) -> int:
        """None."""
        return 0

    def recover(self, model: Any, training: TrainingContext) -> None:
        """Prunes as the schedule says."""
        training.prune_before(0)
