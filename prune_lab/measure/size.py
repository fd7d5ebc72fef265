"""Four sizes that are never mixed: non-zero weights, parameters, bytes in memory, bytes on disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

MB = 1e6


@dataclass(frozen=True)
class Size:
    """Counts of a model's own tensors; a tied matrix counts once."""

    params: int
    nonzero: int
    weights_mb: float
    disk_mb: float


def measure_size(model: Any, folder: Path) -> Size:
    """Sizes of `model` and of the safetensors it was saved as in `folder`."""
    weights = list(model.parameters())  # yields a tied parameter once
    held = [*weights, *model.buffers()]
    return Size(
        params=sum(w.numel() for w in weights),
        nonzero=sum(int(torch.count_nonzero(w)) for w in weights),
        weights_mb=sum(t.numel() * t.element_size() for t in held) / MB,
        disk_mb=sum(file.stat().st_size for file in folder.glob("*.safetensors")) / MB,
    )
