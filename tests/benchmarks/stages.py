"""Stages of work on one device, each a line of a table: its seconds, the floor beside them, the peak of memory.

A stage that is expected to end after the deadline is skipped, and one that fails is not the end of the others; the
table says both.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import floors
import torch
from floors import Rates, Step

from prune_lab.errors import Refused
from prune_lab.system.device import Device

UNKNOWN = 30.0  # times its floor is what a stage is expected to take that was not seen yet
HEADER = "| shape | stage | seconds | floor | times its floor | peak GB | |\n|---|---|---|---|---|---|---|"
T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """A line of the table. What was not done has a note alone; a CPU's peak is not taken."""

    shape: str
    stage: str
    seconds: float | None = None
    floor: float | None = None
    peak: int | None = None
    note: str = ""

    def __str__(self) -> str:
        """As Markdown."""
        times = ["", "", ""]
        if self.seconds is not None and self.floor is not None:
            times = [f"{self.seconds:.4g}", f"{self.floor:.4g}", f"{self.seconds / self.floor:.1f}"]
        peak = "" if self.peak is None else f"{self.peak / 1e9:.2f}"
        return f"| {self.shape} | {self.stage} | {' | '.join(times)} | {peak} | {self.note} |"


@dataclass(frozen=True)
class Done(Generic[T]):
    """What a stage gave, its seconds, and the most bytes that were allocated on the GPU meanwhile."""

    result: T
    seconds: float
    peak: int | None


@dataclass
class Stages:
    """Runs stages one after the other; `deadline` is a time of time.perf_counter."""

    device: Device
    rates: Rates
    deadline: float
    shown: bool = True
    rows: list[Row] = field(default_factory=list)
    _seen: dict[str, float] = field(default_factory=dict)  # how many times its floor a stage took

    def add(self, row: Row) -> None:
        """Prints a line at once, so that what was found stays if a later stage ends everything."""
        self.rows.append(row)
        if self.shown:
            print(row, flush=True)

    def run(
        self, shape: str, stage: str, steps: Sequence[Step], work: Callable[[], T], note: Callable[[T], str]
    ) -> T | None:
        """What `work` gives, after a line about it; None where it was skipped or failed."""
        floor = floors.seconds(steps, self.rates)
        done = self.attempt(shape, stage, floor, work)
        if done is None:
            return None
        self.add(Row(shape, stage, done.seconds, floor, done.peak, note(done.result)))
        return done.result

    def attempt(self, shape: str, stage: str, floor: float, work: Callable[[], T]) -> Done[T] | None:
        """What `work` gives and takes; None, after a line about it, where it was skipped or failed."""
        expected, left = floor * self._seen.get(stage, UNKNOWN), self.deadline - time.perf_counter()
        if expected > left:
            self.add(Row(shape, stage, note=f"skipped: {expected:.0f} s expected, {max(0, left):.0f} s left"))
            return None
        place, is_cuda = self.device.torch_device, self.device.is_cuda
        try:
            self.device.synchronize()
            if is_cuda:
                gc.collect()
                torch.cuda.reset_peak_memory_stats(place)
            began = time.perf_counter()
            result = work()
            self.device.synchronize()
            seconds = time.perf_counter() - began
        except (Refused, RuntimeError) as error:
            kind, lines = "refused" if isinstance(error, Refused) else "failed", str(error).splitlines()
            self.add(Row(shape, stage, note=f"{kind}: {lines[0] if lines else type(error).__name__}"))
            return None
        self._seen[stage] = seconds / floor
        return Done(result, seconds, torch.cuda.max_memory_allocated(place) if is_cuda else None)
