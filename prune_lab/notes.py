"""Plain words of a run where its figures could mislead."""

from __future__ import annotations

from typing import Any

_STAGES = ("prefill", "decode")


def of_calibration(protocol: dict[str, Any]) -> list[str]:
    """Plain words about the calibration text, where a run looked at any."""
    seen = protocol["calibration"]
    if seen is None or not seen["own"]:
        return []
    return [f"calibrated on {seen['source']} itself, apart from its test split: in-domain, which flatters perplexity"]


def of_figures(metrics: dict[str, float]) -> list[str]:
    """Plain words where the figures could mislead."""
    notes = []
    zeros = metrics["params/reduction"] - metrics["params/physical_reduction"]
    if zeros > 0.01:
        notes.append(
            f"{zeros:.0%} of the parameters are zeros in dense tensors: same bytes, same memory, no speed-up to expect"
        )
    return notes + _of_noise(metrics)


def _of_noise(m: dict[str, float]) -> list[str]:
    """Where the dense model, timed against itself, differs from itself."""
    return [
        f"the machine is not quiet: {stage} of the dense model against itself is {_interval(m, f'aa_{stage}')}, "
        "without 1.00; differences of that size are noise here (1 such interval in 20 misses 1.00 by chance)"
        for stage in _STAGES
        if f"latency/aa_{stage}_speedup" in m and not _contains_1(m, f"aa_{stage}")
    ]


def _contains_1(m: dict[str, float], stage: str) -> bool:
    return m[f"latency/{stage}_speedup_low"] <= 1 <= m[f"latency/{stage}_speedup_high"]


def _interval(m: dict[str, float], stage: str) -> str:
    value, low, high = (m[f"latency/{stage}_speedup{suffix}"] for suffix in ("", "_low", "_high"))
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"
