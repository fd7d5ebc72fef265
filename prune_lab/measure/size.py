"""Four sizes that are never mixed: non-zero weights, parameters, bytes in memory, bytes on disk."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prune_lab.models.contents import count_nonzero, count_weights

MB = 1e6


@dataclass(frozen=True)
class Size:
    """Counts of a model's own tensors, and their megabytes (10^6 bytes); a tied matrix counts once."""

    params: int
    nonzero: int
    weights_mb: float
    disk_mb: float


def held_bytes(tensor: Any) -> int:
    """Bytes that a tensor holds; of one made of others (2:4 values and their places), those of its parts."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(held_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return int(tensor.numel() * tensor.element_size())


def measure_size(model: Any, files: Iterable[Path]) -> Size:
    """Sizes of `model` and of the files that hold its weights."""
    held = [*model.parameters(), *model.buffers()]  # a tied matrix once
    return Size(
        params=count_weights(model),
        nonzero=count_nonzero(model),
        weights_mb=sum(held_bytes(t) for t in held) / MB,
        disk_mb=sum(file.stat().st_size for file in files) / MB,
    )
