"""Token-level perplexity, the figure that pruning papers quote."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prune_lab.models.anatomy import Anatomy
from prune_lab.models.blocks import BlockStream
from prune_lab.models.loss import window_losses
from prune_lab.system.console import Console
from prune_lab.system.device import Device
from prune_lab.text.bos import NO_BOS, Bos


@dataclass(frozen=True)
class Quality:
    """Perplexity, and bits per byte, which a tokenizer cannot flatter. Each field is a metric of its name."""

    perplexity: float
    bits_per_byte: float


def measure_quality(
    model: Any,
    windows: Tensor,
    bytes_per_token: float,
    batch_size: int,
    device: Device,
    console: Console,
    bos: Bos = NO_BOS,
) -> Quality:
    """exp of the mean over windows of the mean cross-entropy of each window's seq_len - 1 next-token targets.

    `windows` has shape (windows, seq_len); with a `bos` it stands before each, and the targets are the same. The result
    does not depend on `batch_size`, but for rounding.
    """
    anatomy, losses = Anatomy(model), list[Tensor]()
    blocks = len(anatomy.blocks) if anatomy.is_on_disk else 0
    with console.progress(windows.numel() * (blocks or 1), "perplexity", unit="tok") as bar:
        stream = BlockStream(anatomy, bos.before(windows), batch_size) if blocks else None
        if stream is not None:  # every window through a block before the next block is read
            stream.run(bar.update)
        for number, batch in enumerate(windows.split(batch_size)):
            with stream.replayed(number) if stream is not None else nullcontext():
                tokens = bos.before(batch).to(device.torch_device, torch.int64)
                losses.append(window_losses(model, tokens, bos.length).double().cpu())
            if stream is None:
                bar.update(batch.numel())
    mean = float(torch.cat(losses).mean())
    return Quality(_perplexity(mean), mean / math.log(2) / bytes_per_token)


def _perplexity(loss: float) -> float:
    """exp of a loss in nats; of a diverged model infinite, never an OverflowError."""
    return math.exp(loss) if loss < 700 else math.inf
