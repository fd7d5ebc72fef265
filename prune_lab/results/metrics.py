"""Metrics by name: their axes in a plot, which direction is better, the dense model's, a speed-up in words."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Direction = Literal["lower", "higher"]

# By the end of a metric's name, the first that fits. A metric that is not here is drawn, but has no front.
_BETTER: tuple[tuple[str, Direction], ...] = (
    ("reduction", "higher"),
    ("amount/requested", "higher"),  # of two runs of equal quality the one that removed more is preferred
    ("amount/realized", "higher"),
    ("_speedup", "higher"),
    ("_speedup_low", "higher"),
    ("_speedup_high", "higher"),
    ("tokens_per_s", "higher"),
    ("_acc", "higher"),
    ("_acc_norm", "higher"),
    ("perplexity", "lower"),
    ("perplexity_ratio", "lower"),
    ("bits_per_byte", "lower"),
    ("params/total", "lower"),
    ("params/nonzero", "lower"),
    ("macs_per_token", "lower"),
    ("joules_per_token", "lower"),
    ("_mb", "lower"),
    ("_ms_p50", "lower"),
    ("_ms_p95", "lower"),
    ("_ms_per_token_p50", "lower"),
    ("_ms_per_token_p95", "lower"),
    ("_s", "lower"),
)
_TITLES = {
    "quality/perplexity": "perplexity",
    "quality/perplexity_ratio": "perplexity, times the dense model's",
    "quality/bits_per_byte": "bits per byte",
    "params/total": "parameters (millions)",
    "params/nonzero": "non-zero parameters (millions)",
    "size/disk_mb": "bytes on disk (MB)",
    "memory/weights_mb": "weights in memory (MB)",
    "memory/peak_mb": "peak memory (MB)",
    "latency/prefill_ms_p50": "prefill (ms, median)",
    "latency/decode_ms_per_token_p50": "decode (ms per token, median)",
    "latency/prefill_speedup": "prefill speed-up",
    "latency/decode_speedup": "decode speed-up",
    "throughput/decode_tokens_per_s": "decode (tokens per second)",
}
_SHAPE = re.compile(r"_b\d+_l\d+(?=$|_low$|_high$)")  # of one batch and length among several that were timed
_MILLIONS = ("params/total", "params/nonzero")
_LOGARITHMIC = ("quality/perplexity", "quality/perplexity_ratio")  # a bad run is many times a good one


@dataclass(frozen=True)
class Axis:
    """A metric on an axis. Its values are divided by `unit`; `better` is None where nobody said which is."""

    metric: str
    title: str
    unit: float
    better: Direction | None
    logarithmic: bool


def axis(metric: str) -> Axis:
    """The axis of a metric, by its public name."""
    kind = _SHAPE.sub("", metric)
    better = next((direction for end, direction in _BETTER if kind.endswith(end)), None)
    title = _TITLES.get(metric, metric)
    if better:
        title += f", {better} is better"
    return Axis(metric, title, 1e6 if metric in _MILLIONS else 1.0, better, metric in _LOGARITHMIC)


def dense_figures(metrics: dict[str, float]) -> dict[str, float]:
    """The figures of the dense model among a run's metrics."""
    return {name: value for name, value in metrics.items() if "/dense_" in name}


def of_dense(metrics: dict[str, float]) -> dict[str, float]:
    """The dense model beside a run, by the names that the figures of a run have: nothing removed, no faster.

    Figures that only a run has, such as seconds spent on pruning, are missing.
    """
    found = {name.replace("/dense_", "/"): value for name, value in dense_figures(metrics).items()}
    if "params/total" in found:  # records of older versions did not count the dense model's zeros
        found.setdefault("params/nonzero", found["params/total"])
    if "latency/decode_ms_per_token_p50" in found:
        found["throughput/decode_tokens_per_s"] = 1e3 / found["latency/decode_ms_per_token_p50"]
    for name in metrics:
        if name.startswith("amount/") or name.endswith("reduction"):
            found[name] = 0.0
        elif name == "quality/perplexity_ratio" or "_speedup" in name:
            found[name] = 1.0
    return found


def speedup(metrics: dict[str, float], stage: str, at: str = "") -> str:
    """A speed-up with its interval, or "no change" where its interval contains 1. `at`: one shape, such as _b4_l128."""
    name = f"latency/{stage}_speedup{at}"
    if name not in metrics:
        return "-"
    value, low, high = (metrics[f"{name}{suffix}"] for suffix in ("", "_low", "_high"))
    verdict = "no change" if low <= 1 <= high else f"{value:.2f}"
    return f"{verdict} [{low:.2f}, {high:.2f}]"
