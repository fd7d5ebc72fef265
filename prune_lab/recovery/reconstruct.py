"""recovery=reconstruct: block by block, what is left of attention and MLP is trained to give the dense outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from prune_lab.checks import check_autocast
from prune_lab.recovery.base import Recovery

if TYPE_CHECKING:
    from prune_lab.recovery.context import TrainingContext


@dataclass(frozen=True)
class Reconstruct(Recovery):
    """Reconstruction of the dense model's outputs, of attention and MLP apart ("A free lunch", 2510.14444).

    Each block sees the states that enter it in the dense model; AdamW lowers the squared error of what its attention
    and its MLP add to them, relative to the dense one. Nothing is learned of the text's next tokens, and blocks do not
    depend on each other. steps: of each block.
    """

    steps: int = 128
    lr: float = 1e-4
    batch_size: int = 2
    warmup: float = 0.1
    final_lr: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    autocast: str = "auto"
    checkpoint_every: int = 8

    follows_pruning: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("warmup", "final_lr"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} is outside [0, 1]")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is outside [0, 1)")
        check_autocast(self.autocast)
        if self.checkpoint_every < 1:
            raise ValueError(f"checkpoint_every={self.checkpoint_every} must be at least 1 block")

    def recover(self, model: Any, training: TrainingContext) -> None:
        """Prunes, then trains block after block."""
        from prune_lab.recovery.reconstruction import reconstruct

        reconstruct(model, self, training)
