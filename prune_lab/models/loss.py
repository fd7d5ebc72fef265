"""Next-token loss of each window, for perplexity, calibration and sensitivity analysis."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

LOGITS_AT_ONCE = 2**22  # elements; so peak memory does not grow with vocabulary x window
TIMES_ON_GPU = 16  # as many there: products of few positions, 32 of a vocabulary of 128,256, only read the head


@torch.no_grad()
def window_losses(model: Any, batch: Tensor, prefix: int = 0) -> Tensor:
    """Mean cross-entropy of each window in nats, shape (windows,), fp32.

    `batch` has shape (windows, prefix + seq_len): of the text's tokens all but the first are predicted, whatever stands
    before it (a BOS token).
    The head runs over a few positions at a time, so the logits of a whole window are never held.
    """
    hidden = model.base_model(input_ids=batch, use_cache=False).last_hidden_state[:, prefix:-1]
    head, targets = model.get_output_embeddings(), batch[:, prefix + 1 :].reshape(-1)
    rows = max(1, LOGITS_AT_ONCE * (TIMES_ON_GPU if hidden.is_cuda else 1) // head.weight.shape[0])
    cap = getattr(model.config, "final_logit_softcapping", None)  # Gemma 2 soft-caps its logits
    losses = []
    for states, wanted in zip(hidden.reshape(-1, hidden.shape[-1]).split(rows), targets.split(rows), strict=True):
        logits = head(states).float()
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        losses.append(cross_entropy(logits, wanted, reduction="none"))
    return torch.cat(losses).view(len(batch), -1).mean(1)
