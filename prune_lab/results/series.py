"""Series of runs: one recipe at several amounts or patterns, each perhaps with several seeds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import mean

from prune_lab.fingerprint import NO_FIGURE
from prune_lab.results.metrics import Interval
from prune_lab.results.summary import Summary

_STEPS = ("amount", "method.amount", "method.pattern")
_UNUSED = ("null", "None", "n/a")
_NOT_SERIES = (*_STEPS, "seed", *NO_FIGURE)
_PLAIN = {"export": ("none", "hf")}  # options of a group that give the same figures


@dataclass(frozen=True)
class Position:
    """Series of a job, and its step in the series: an amount or an N:M pattern."""

    series: str
    step: str


def position(summary: Summary, shared: Iterable[str]) -> Position:
    """Position of a job, from its overrides without those that all jobs share."""
    asked, common = keys(summary.overrides), keys(shared)
    own = {
        key: value
        for key, value in asked.items()
        if key not in (*common, *_NOT_SERIES, "method") and value not in _PLAIN.get(key, ())
    }
    parts = [summary.choices.get("method", ""), *(f"{key.removeprefix('method.')}={own[key]}" for key in own)]
    pattern = asked.get("method.pattern", "null")
    amount = summary.metrics.get("amount/requested")
    step = pattern if pattern not in _UNUSED else f"{amount:g}" if amount is not None else ""
    return Position(" ".join(parts), step)


def shared(overrides: list[list[str]]) -> list[str]:
    """Overrides that all runs have."""
    return [override for override in overrides[0] if all(override in other for other in overrides)]


def telling(runs: list[dict[str, str]]) -> list[list[str]]:
    """Facts of each run (key -> value) that tell it from others, as key=value.

    A key of an option, such as recovery.steps, counts where runs of the same option differ in it. recovery=none
    is told by not being said.
    """
    values: dict[tuple[str, str], set[str]] = {}
    for facts in runs:
        for key, value in facts.items():
            values.setdefault((_option(facts, key), key), set()).add(value)
    return [
        [
            f"{key}={value}"
            for key, value in facts.items()
            if value not in (*_UNUSED, "none")
            and (key == "method.pattern" or len(values[_option(facts, key), key]) > 1)
        ]
        for facts in runs
    ]


def _option(facts: dict[str, str], key: str) -> str:
    """Option that a dotted key belongs to; empty for a key of the root."""
    group, dot, _ = key.partition(".")
    return facts.get(group, "") if dot else ""


def keys(overrides: Iterable[str]) -> dict[str, str]:
    """Overrides as key -> value, without Hydra's signs."""
    split = (plain(override).partition("=") for override in overrides)
    return {key.lstrip("+~"): value for key, _, value in split}


def plain(override: str) -> str:
    """Override as a person would type it: Hydra escapes the colon of 2:4."""
    return override.replace("\\:", ":")


def place_on_line(step: str) -> tuple[bool, float, str]:
    """Sorting key of a step: amounts by size, then patterns by what they keep, the most first."""
    kept, pattern, of = step.partition(":")
    try:
        return bool(pattern), (1 - float(kept) / float(of) if pattern else float(kept)), step
    except (ValueError, ZeroDivisionError):
        return bool(pattern), 0.0, step


def pivot(found: list[tuple[Position, float]]) -> list[list[str]]:
    """Table of perplexities: a row for each series, a column for each step, over seeds the mean and the range.

    Empty where that would not be a table: fewer than two rows or columns.
    """
    series = list(dict.fromkeys(place.series for place, _ in found))
    steps = sorted(dict.fromkeys(place.step for place, _ in found), key=place_on_line)
    if len(series) < 2 or len(steps) < 2:
        return []
    table = [["perplexity", *steps]]
    for name in series:
        cells = [[value for place, value in found if place == Position(name, step)] for step in steps]
        table.append([name, *(_cell(values) for values in cells)])
    return table


def _cell(values: list[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.4g}" if values else ""
    return f"{Interval(mean(values), min(values), max(values)):.4g}"
