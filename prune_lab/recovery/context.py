"""What a recovery works with, beside the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from prune_lab.models.load import Loaded
from prune_lab.pruning.pruned import Pruned
from prune_lab.schedules import Event, Rewind
from prune_lab.system.console import Console
from prune_lab.system.device import Device
from prune_lab.system.world import World
from prune_lab.text.bos import NO_BOS, Bos
from prune_lab.text.tokens import Tokens


@dataclass
class TrainingContext:
    """What a recovery works with, beside the model; `pruned` is what pruning has done so far."""

    dense: Loaded
    tokens: Tokens
    seq_len: int  # tokens of a window that is trained on: dataset.seq_len
    events: list[Event]  # when to prune, in order
    prune: Callable[[float], Pruned]  # to a cumulative amount
    device: Device
    seed: int
    console: Console
    checkpoint: Path  # where to put a checkpoint, and to go on from if it is there
    log: Callable[[int, dict[str, float]], None]  # figures of a step
    rewind: Rewind | None = None  # what goes back after each pruning
    bos: Bos = NO_BOS  # what stands before each window
    world: World = field(default_factory=World)  # the processes that train together
    pruned: Pruned = field(default_factory=Pruned)

    def is_due(self, step: int) -> bool:
        """Whether there is something to prune before a step."""
        return any(event.step == step for event in self.events)

    @property
    def last_event(self) -> int:
        """The step before which the whole amount is reached."""
        return max((event.step for event in self.events), default=0)

    def prune_before(self, step: int) -> None:
        """Prunes as the schedule has it before a step."""
        for event in self.events:
            if event.step == step:
                self.pruned = self.prune(event.amount).after(self.pruned)

    def warn(self, note: str) -> None:
        """Puts a note into the run's record, once."""
        if note not in self.pruned.warnings:
            self.pruned.warnings.append(note)
