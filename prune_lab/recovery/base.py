"""What every recovery option has in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from prune_lab.console import Console
from prune_lab.device import Device
from prune_lab.pruning.masks import Masks
from prune_lab.text.tokens import Tokens


@dataclass(frozen=True)
class Training:
    """What a recovery works with, beside the model."""

    tokens: Tokens
    seq_len: int
    masks: Masks
    device: Device
    seed: int
    console: Console
    checkpoint: Path  # where to put a checkpoint, and to go on from if it is there
    log: Callable[[int, dict[str, float]], None]  # figures of a step


@dataclass(frozen=True)
class Recovery:
    """A recovery option. All options share these keys, so that sweeps over them compose."""

    steps: int = 200
    lr: float = 3e-4
    batch_size: int = 16

    not_applicable: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} must be at least 1; for no training use recovery=none")
        if not 0 < self.lr < 1:
            raise ValueError(f"lr={self.lr} is outside (0, 1)")
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} must be at least 1")

    def recover(self, model: Any, training: Training) -> None:
        """Trains `model` in place; pruned weights stay exactly zero."""
        raise NotImplementedError
