"""Comparability of runs: those with other text, windows, precision or device must not be compared."""

from __future__ import annotations

from prune_lab.results.summary import Summary

STAMP = ("dataset", "test_tokens_sha256", "seq_len", "windows", "divergence", "generation", "bos", "dtype", "device")
_HASH = 36  # as much of a hash as MLflow keeps; a tenth of that is enough to read


def warnings(runs: list[tuple[str, str, Summary]]) -> list[str]:
    """A sentence for each part of the stamp in which runs differ. Each run is its source, its label and its summary.

    A run that lacks a part, such as one of which only MLflow's parameters are left, is not held against the others.
    """
    found = []
    for key in STAMP:
        holders: dict[str, list[tuple[str, str]]] = {}
        for source, label, summary in runs:
            if (value := summary.protocol.get(key)) is not None:
                holders.setdefault(_value(key, value), []).append((source, label))
        if len(holders) > 1:
            sources = {source for source, _, _ in runs}
            parts = [f"{_short(key, value)} in {_who(who, sources)}" for value, who in holders.items()]
            found.append(f"{key} is " + ", ".join(parts))
    return found


def _value(key: str, value: object) -> str:
    """A part's value as text; of a part with parts of its own, each with its name."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_short(name, _value(name, inner))}" for name, inner in value.items())
    return str(value)[:_HASH] if "sha256" in key else str(value)


def _short(key: str, value: str) -> str:
    return value[:8] if "sha256" in key else value


def _who(holders: list[tuple[str, str]], sources: set[str]) -> str:
    """The sources that hold a value, or the runs where it is one source that differs in itself."""
    names = list(dict.fromkeys(source if len(sources) > 1 else label for source, label in holders))
    if len(names) <= 3:
        return " and ".join(names)
    return f"{names[0]} and {len(names) - 1} more"
