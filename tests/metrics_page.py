"""docs/metrics.md as data: its rows, and which of them a metric belongs to."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

# What stands for something else in a name; none of them is part of a word.
_STANDS_FOR = {"_bB": r"_b\d+", "_lL": r"_l\d+", "TASK": r"\w+"}


@dataclass(frozen=True)
class Row:
    """A line of a table: the metrics it is about, and what it says of them."""

    names: tuple[str, ...]
    unit: str
    better: str
    dense: str
    measured: str

    def is_about(self, metric: str) -> bool:
        """Whether the row lists this metric, or a pattern that it fits."""
        return any(re.fullmatch(_pattern(name), metric) for name in self.names)


def rows_of(page: Path) -> list[Row]:
    """All rows of a page's tables, in order."""
    lines = (line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("| `"))
    split = ([cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines)
    return [Row(tuple(re.findall(r"`([^`]+)`", names)), *others) for names, *others in split]


def without_dense(metric: str) -> str:
    """The metric that a figure of the dense model stands beside."""
    return metric.replace("/dense_", "/")


def _pattern(name: str) -> str:
    pattern = re.escape(name)
    for letters, meaning in _STANDS_FOR.items():
        pattern = pattern.replace(letters, meaning)
    return pattern
