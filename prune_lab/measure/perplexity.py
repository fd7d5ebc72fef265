"""Token-level perplexity, the figure that pruning papers quote."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prune_lab.console import Console
from prune_lab.device import Device

LOGITS_AT_ONCE = 2**22  # elements; so peak memory does not grow with vocabulary x window


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


@torch.no_grad()
def window_losses(model: Any, batch: Tensor) -> Tensor:
    """Mean cross-entropy of each window in nats, shape (windows,), fp32; `batch` has shape (windows, seq_len).

    The head runs over a few positions at a time, so the logits of a whole window are never held.
    """
    hidden = model.base_model(input_ids=batch, use_cache=False).last_hidden_state[:, :-1]
    head, targets = model.get_output_embeddings(), batch[:, 1:].reshape(-1, 1)
    rows = max(1, LOGITS_AT_ONCE // head.weight.shape[0])
    cap = getattr(model.config, "final_logit_softcapping", None)  # Gemma 2 bends its logits after the head
    losses = []
    for states, wanted in zip(hidden.reshape(-1, hidden.shape[-1]).split(rows), targets.split(rows), strict=True):
        logits = head(states).float()
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        losses.append(logits.logsumexp(-1) - logits.gather(1, wanted)[:, 0])
    return torch.cat(losses).view(len(batch), -1).mean(1)
