"""Trial of batch sizes for perplexity: the configuration fixes the size, a run never chooses it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from prune_lab.models.loss import window_losses
from prune_lab.system.device import Device

REPEATS = 3
ENOUGH = 0.95  # of the best speed: beyond that a larger batch only takes memory


@dataclass(frozen=True)
class Trial:
    """A batch size, and the tokens per second that the perplexity is measured at with it."""

    batch_size: int
    tokens_per_s: float


def try_batch_sizes(model: Any, windows: Tensor, device: Device) -> list[Trial]:
    """Batch sizes 1, 2, 4 ... up to the number of windows, shape (windows, seq_len).

    Ends early where a GPU's memory is full, and where twice in a row the best was not beaten by a twentieth.
    """
    trials: list[Trial] = []
    batch_size, since_best = 1, 0
    while batch_size <= len(windows) and since_best < 2:
        batch = windows[:batch_size].to(device.torch_device, torch.int64)
        try:
            speed = batch.numel() / median(_seconds(model, batch, device) for _ in range(REPEATS))
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            break
        best = max((trial.tokens_per_s for trial in trials), default=0.0)
        since_best = 0 if speed * ENOUGH > best else since_best + 1
        trials.append(Trial(batch_size, speed))
        batch_size *= 2
    return trials


def suggest(trials: list[Trial]) -> int:
    """The smallest batch size that is nearly as fast as the fastest."""
    best = max(trial.tokens_per_s for trial in trials)
    return min(trial.batch_size for trial in trials if trial.tokens_per_s >= ENOUGH * best)


def _seconds(model: Any, batch: Tensor, device: Device) -> float:
    device.synchronize()
    began = time.perf_counter()
    window_losses(model, batch)
    device.synchronize()
    return time.perf_counter() - began
