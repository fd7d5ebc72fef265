"""What a run says while it works: header, progress, notes. Quiet when nobody is watching."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console as RichConsole
from tqdm import tqdm

from prune_lab.system.timing_lock import timing_lock


class Console:
    """Writes to the terminal.

    Progress and notes appear only on a terminal; results appear in pipes and logs too; quiet=True hides both.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self._live = sys.stderr.isatty() and not quiet
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
        if self._live:
            tqdm.write(text, file=sys.stderr)

    def result(self, shown: Any) -> None:
        """A table or a line that is the outcome."""
        if not self.quiet:
            self._rich.print(shown)

    def progress(self, total: int | None, what: str, unit: str = "it") -> Any:
        """A progress bar (a tqdm bar: update, set_postfix, context manager) that leaves nothing behind.

        total=None: not known beforehand.
        """
        return _Bar(
            total=total, desc=what, unit=unit, unit_scale=unit in ("tok", "B"), leave=False, disable=not self._live,
            dynamic_ncols=True,
        )  # fmt: skip


class _Bar(tqdm):
    """What takes long tells it here, step by step; so here it also pauses while another job of the machine is timed."""

    def update(self, n: float | None = 1) -> bool | None:
        """Moves the bar on by n."""
        timing_lock.pause()
        return super().update(n)
