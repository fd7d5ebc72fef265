"""Console of a run: header, progress bars, notes. Quiet when it is no terminal."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console as RichConsole
from tqdm import tqdm

from prune_lab.system.run_clock import RunClock, in_words
from prune_lab.system.timing_lock import timing_lock


class Console:
    """Writes to the terminal.

    Progress and notes appear only on a terminal; results appear in pipes and logs too; quiet=True hides both.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self._clock: RunClock | None = None
        self.is_live = sys.stderr.isatty() and not quiet
        width = None if sys.stdout.isatty() else 160
        self._rich = RichConsole(
            file=sys.stdout, width=width, highlight=False, soft_wrap=True, markup=False, emoji=False
        )  # [x] and :x: are what people call things

    @property
    def width(self) -> int:
        """Characters of a line."""
        return self._rich.width

    def note(self, text: str) -> None:
        """One line about what is going on, for a person who waits."""
        if self.is_live:
            tqdm.write(text, file=sys.stderr)

    def expect(self, seconds: Mapping[str, float]) -> None:
        """Says how long the stages of a run will take, and from then on, beside each progress bar, what is left."""
        self._clock = RunClock(seconds)
        stages = ", ".join(f"{stage} {in_words(took)}" for stage, took in seconds.items() if took >= 1)
        self.note(f"time      about {in_words(sum(seconds.values()))}" + f" ({stages})" * bool(stages))

    def enter(self, stage: str) -> None:
        """Begins a stage of those that are expected."""
        if self._clock is not None:
            self._clock.enter(stage)

    def result(self, shown: Any) -> None:
        """A table or a line that is the outcome."""
        if not self.quiet:
            self._rich.print(shown)

    def progress(self, total: int | None, what: str, unit: str = "it") -> Any:
        """A progress bar (a tqdm bar: update, set_postfix, context manager) that leaves nothing behind.

        total=None: not known beforehand.
        """
        return _Bar(
            self._clock, total=total, desc=what, unit=unit, unit_scale=unit in ("tok", "B"), leave=False,
            disable=not self.is_live, dynamic_ncols=True,
        )  # fmt: skip


class _Bar(tqdm):
    """Progress bar that says what is left of the run.

    Its updates also pause this job while another job of the machine is timed.
    """

    def __init__(self, clock: RunClock | None, **keys: Any) -> None:
        self._clock = clock
        super().__init__(**keys)

    def update(self, n: float | None = 1) -> bool | None:
        """Moves the bar on by n."""
        timing_lock.pause()
        return super().update(n)

    @property
    def format_dict(self) -> dict[str, Any]:
        """Values that tqdm shows, with the time that is left of the run."""
        shown = dict(super().format_dict)
        if self._clock is not None:
            run = f"run: {in_words(self._clock.left())} left"
            shown["postfix"] = ", ".join(filter(None, (shown["postfix"], run)))
        return shown
