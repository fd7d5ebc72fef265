"""Upper bounds on metrics, as `bound` gives them: what a run is checked for, and what searches keep to."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prune_lab.results.metrics import ENGINES, axis, find

# Metrics of what pruning costs; the others are of what it saves.
_QUALITY = ("quality/", "tasks/", "generation/", "shape/", *(f"{engine}/perplexity" for engine in ENGINES))
_FORM = re.compile(r"\s*([^<>=\s]+)\s*<=\s*(.+?)\s*")
_EXAMPLE = "such as params/total<=110e6, size/disk_mb<=150, latency/decode_ms_per_token_p50<=20, quality/kl<=0.1"


@dataclass(frozen=True)
class Bound:
    """The largest value that a metric may have."""

    metric: str
    limit: float

    @property
    def on_quality(self) -> bool:
        """True for a metric that pruning makes worse, rather than one that it saves."""
        return self.metric.startswith(_QUALITY)

    def holds(self, metrics: Mapping[str, float]) -> bool:
        """True where a run keeps to it; one that lacks the metric (it diverged, or was not measured) does not."""
        return metrics.get(self.metric, math.inf) <= self.limit

    def __str__(self) -> str:
        return f"{self.metric} <= {number(self.limit)}"


def texts_of(value: Any) -> tuple[str, ...]:
    """The texts of a value of `bound`: one, or a list of them; raises ValueError for anything else."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f'bound={value!r} is not a list of METRIC<=NUMBER, such as bound=["params/total<=110e6"]')
    return tuple(texts)


def read_bounds(texts: Iterable[str]) -> tuple[Bound, ...]:
    """The bounds that texts such as "params/total<=110e6" give; raises ValueError for what is none."""
    found = tuple(map(_read, texts))
    names = [bound.metric for bound in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"bound: {twice[0]} is bounded twice; give the smaller limit")
    return found


def check_metric(name: str, key: str = "bound") -> None:
    """Raises ValueError for a metric that cannot be bounded from above."""
    if "/" not in name or find(name) is None:
        raise ValueError(f"{key}: {name!r} is not a metric (docs/metrics.md lists them); give one {_EXAMPLE}")
    if (entry := find(name)) is not None and entry.by_step:
        raise ValueError(
            f"{key}: {name} is logged while a model trains and is no result of a run; give a metric of the result, "
            f"{_EXAMPLE}"
        )
    if axis(name).better != "lower":
        why = "is better when higher" if axis(name).better == "higher" else "is only shown"
        raise ValueError(
            f"{key}: {name} {why}, and what is bounded is the largest value of a metric that is better when lower; "
            f"give one {_EXAMPLE}"
        )


def _read(text: str) -> Bound:
    matched = _FORM.fullmatch(str(text))
    if matched is None:
        raise ValueError(f"bound: {text!r} is not METRIC<=NUMBER, {_EXAMPLE}")
    name, value = matched.groups()
    check_metric(name)
    entry = find(name)
    unit = entry.unit if entry is not None else ""
    try:
        limit = float(value.replace("_", ""))
    except ValueError:
        said = f" (its unit is {unit})" if unit else ""
        raise ValueError(
            f"bound: {value!r} in {text!r} is not a number: give it without a unit{said}, such as 110e6"
        ) from None
    if not math.isfinite(limit) or limit < 0:
        raise ValueError(f"bound: {value} in {text!r} must be a finite number, 0 or more")
    return Bound(name, limit)


def check_measured(name: str, measure: Mapping[str, Any]) -> None:
    """Raises ValueError for a metric that runs with these keys of `measure` do not measure."""
    parts = name.split("/", 1)
    engine = str(measure["engine"])
    needs: dict[str, Any] = {}
    if parts[0] in ENGINES:
        needs["engine"] = (engine == parts[0], parts[0])
    if parts[0] == "latency" or (parts[0] in ENGINES and "_ms_" in name):
        needs["latency"] = (measure["latency"], "true")
    if parts[1] == "peak_mb":
        needs["memory"] = (measure["memory"], "true")
    if parts[0] == "energy":
        needs["energy"] = (measure["energy"], "true")
    if parts[0] == "generation":
        needs["generation_prompts"] = (measure["generation_prompts"], "8")
    if parts[0] == "tasks":
        tasks = [str(task) for task in measure["tasks"]]
        needs["tasks"] = (any(parts[1].startswith(f"{task}_") for task in tasks), f"[{parts[1].split('_')[0]}]")
    if name.startswith("quality/kl"):
        needs["kl_windows"] = (measure["kl_windows"] != 0, "32")
    lacking = [f"measure.{key}={value}" for key, (is_measured, value) in needs.items() if not is_measured]
    if lacking:
        raise ValueError(f"bound: {name} would not be measured; give {' '.join(lacking)}, or bound another metric")


def hold(bounds: Iterable[Bound], metrics: Mapping[str, float]) -> bool:
    """True where a run keeps to all of them."""
    return all(bound.holds(metrics) for bound in bounds)


def not_kept(bounds: Iterable[Bound], metrics: Mapping[str, float]) -> list[str]:
    """Notes of the bounds that a run does not keep to."""
    return [
        f"bound {bound} is not kept: "
        + (f"it is {number(metrics[bound.metric])}" if bound.metric in metrics else "the run has not measured it")
        for bound in bounds
        if not bound.holds(metrics)
    ]


def said(bounds: Iterable[Bound]) -> str:
    """The bounds in one line."""
    return ", ".join(map(str, bounds))


def number(value: float) -> str:
    """A number as tables show it: whole ones of any size with all their digits."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
