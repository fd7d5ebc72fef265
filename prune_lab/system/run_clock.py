"""Time that a run will still take: estimated before its work begins, corrected by how long its stages take."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

LEAST = 1.0  # seconds that finished stages must have been expected to take before they correct the rest
FASTEST, SLOWEST = 0.2, 5.0  # the most that they correct it by


class RunClock:
    """Expected seconds of the stages of a run, by name, in their order."""

    def __init__(self, expected: Mapping[str, float], now: Callable[[], float] = time.monotonic) -> None:
        self.expected = dict(expected)
        self._now = now
        self._took: dict[str, float] = {}
        self._current: str | None = None
        self._began = now()

    def enter(self, stage: str) -> None:
        """Ends the stage before, and begins this one."""
        if self._current is not None:
            self._took[self._current] = self._took.get(self._current, 0.0) + self._now() - self._began
        self._current, self._began = stage, self._now()

    def left(self) -> float:
        """Seconds that the run will still take."""
        later = list(self.expected)
        here = 0.0
        if self._current in self.expected:
            later = later[later.index(self._current) + 1 :]
            here = max(0.0, self.expected[self._current] * self._pace() - (self._now() - self._began))
        return here + self._pace() * sum(self.expected[stage] for stage in later)

    def _pace(self) -> float:
        """Time that the finished stages took, in times of what was expected of them."""
        known = sum(self.expected.get(stage, 0.0) for stage in self._took)
        took = sum(seconds for stage, seconds in self._took.items() if stage in self.expected)
        return 1.0 if known < LEAST else min(max(took / known, FASTEST), SLOWEST)


def in_words(seconds: float) -> str:
    """A time for a person who waits: 40 s, 3 min, 2 h 10 min."""
    if seconds < 55:
        return f"{max(5, 5 * round(seconds / 5))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
