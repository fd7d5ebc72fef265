"""When to prune how much: a schedule yields cumulative amounts, ending in the final one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """A schedule option."""

    def amounts(self, final: float) -> Iterator[float]:
        """Cumulative amounts, ascending, the last one `final`; recovery follows each."""
        raise NotImplementedError


@dataclass(frozen=True)
class OneShot(Schedule):
    """schedule=one_shot: the whole amount at once."""

    def amounts(self, final: float) -> Iterator[float]:
        """The final amount alone."""
        yield final
