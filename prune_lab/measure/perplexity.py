"""Token-level perplexity, the figure that pruning papers quote."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prune_lab.console import Console
from prune_lab.device import Device
from prune_lab.models.loss import window_losses


@dataclass(frozen=True)
class Quality:
    """Perplexity, and bits per byte, which a tokenizer cannot flatter."""

    perplexity: float
    bits_per_byte: float


def measure_quality(
    model: Any, windows: Tensor, bytes_per_token: float, batch_size: int, device: Device, console: Console
) -> Quality:
    """exp of the mean over windows of the mean cross-entropy of each window's seq_len - 1 next-token targets.

    `windows` has shape (windows, seq_len). The result does not depend on `batch_size`, but for rounding.
    """
    losses: list[Tensor] = []
    with console.progress(windows.numel(), "perplexity", unit="tok") as bar:
        for batch in windows.split(batch_size):
            losses.append(window_losses(model, batch.to(device.torch_device, torch.int64)).double().cpu())
            bar.update(batch.numel())
    mean = float(torch.cat(losses).mean())
    # A diverged model is reported as infinite, never as an OverflowError.
    return Quality(math.exp(mean) if mean < 700 else math.inf, mean / math.log(2) / bytes_per_token)
