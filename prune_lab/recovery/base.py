"""Base class of the recovery options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from prune_lab.models.load import Loaded
    from prune_lab.recovery.context import TrainingContext
    from prune_lab.system.device import Device


@dataclass(frozen=True)
class Recovery:
    """A recovery option. All options share these keys, so that sweeps over them compose."""

    steps: int = 200
    lr: float = 3e-4
    batch_size: int = 16

    not_applicable: ClassVar[tuple[str, ...]] = ()
    follows_pruning: ClassVar[bool] = False  # True where everything must be pruned before it begins
    forward_passes: ClassVar[float] = 3.0  # that a step takes the time of, about: backward takes that of two

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} must be at least 1; for no training use recovery=none")
        if not 0 < self.lr < 1:
            raise ValueError(f"lr={self.lr} is outside (0, 1)")
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} must be at least 1")

    @property
    def training_steps(self) -> int:
        """Number of steps that it trains."""
        return self.steps

    def hashes(self, dense: Loaded, device: Device) -> dict[str, str]:
        """sha256 of what it brings to a run beside its keys; raises Refused where that does not fit the dense model."""
        return {}

    def recover(self, model: Any, training: TrainingContext) -> None:
        """Trains `model` in place and prunes it as `training.events` say; pruned weights stay exactly zero."""
        raise NotImplementedError
