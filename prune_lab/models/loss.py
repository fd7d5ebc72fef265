"""Next-token losses and logits at the positions that predict them, for perplexity, calibration and sensitivity."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

LOGITS_AT_ONCE = 2**22  # elements; so peak memory does not grow with vocabulary x window
TIMES_ON_GPU = 16  # as many there: products of few positions, 32 of a vocabulary of 128,256, only read the head


def window_losses(model: Any, batch: Tensor, prefix: int = 0) -> Tensor:
    """Mean cross-entropy of each window in nats, shape (windows,), fp32.

    `batch` has shape (windows, prefix + seq_len): of the text's tokens all but the first are predicted, whatever stands
    before it (a BOS token).
    """
    return token_losses(model, target_states(model, batch, prefix), targets_of(batch, prefix)).mean(1)


def targets_of(batch: Tensor, prefix: int = 0) -> Tensor:
    """Tokens that are predicted, shape (windows, seq_len - 1), of a batch as `window_losses` takes it."""
    return batch[:, prefix + 1 :]


@torch.no_grad()
def target_states(model: Any, batch: Tensor, prefix: int = 0) -> Tensor:
    """Last hidden states at the positions that predict `targets_of(batch, prefix)`: (windows, seq_len - 1, hidden)."""
    states: Tensor = model.base_model(input_ids=batch, use_cache=False).last_hidden_state[:, prefix:-1]
    return states


@torch.no_grad()
def token_losses(
    model: Any, states: Tensor, targets: Tensor, watch: Callable[[int, Tensor], None] | None = None
) -> Tensor:
    """Cross-entropy of each target in nats, in the shape of `targets` (windows, seq_len - 1), fp32.

    The head runs over a few positions at a time, so the logits of a whole window are never held. `watch` is called with
    each such part: the number of its first position, over all windows one after the other, and its logits.
    """
    flat = states.reshape(-1, states.shape[-1])
    rows = LOGITS_AT_ONCE * (TIMES_ON_GPU if flat.is_cuda else 1) // model.get_output_embeddings().weight.shape[0]
    losses, begin = [], 0
    for part, wanted in zip(flat.split(max(1, rows)), targets.reshape(-1).split(max(1, rows)), strict=True):
        logits = logits_at(model, part)
        losses.append(cross_entropy(logits, wanted, reduction="none"))
        if watch is not None:
            watch(begin, logits)
        begin += len(part)
    return torch.cat(losses).view(targets.shape)


@torch.no_grad()
def logits_at(model: Any, states: Tensor) -> Tensor:
    """Logits of last hidden states, shape (positions, hidden): (positions, vocabulary), fp32."""
    logits: Tensor = model.get_output_embeddings()(states).float()
    cap = getattr(model.config, "final_logit_softcapping", None)  # Gemma 2 soft-caps its logits
    return logits if cap is None else cap * torch.tanh(logits / cap)
