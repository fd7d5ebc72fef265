"""Plain words of a run where its figures could mislead."""

from __future__ import annotations

from typing import Any


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
    for name, count in metrics.items():
        if name.startswith("tasks/") and name.endswith("_truncated") and "/dense_" not in name:
            task = name.removeprefix("tasks/").removesuffix("_truncated")
            notes.append(f"{task}: {count:.0f} documents are longer than the model's context and lost their beginning")
    return notes
