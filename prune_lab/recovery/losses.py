"""Training losses: next-token cross-entropy and distillation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

Loss = Callable[[Any, Tensor], Tensor]  # of a model and a batch of shape (windows, prefix + seq_len): a scalar


def next_token_loss(prefix: int = 0) -> Loss:
    """Mean cross-entropy of the next token, in nats, of a text after `prefix` tokens that are none of it (BOS)."""

    def loss_of(model: Any, batch: Tensor) -> Tensor:
        logits = model(input_ids=batch, use_cache=False).logits
        return cross_entropy(logits[:, prefix:-1].flatten(0, 1).float(), batch[:, prefix + 1 :].flatten())

    return loss_of


def distillation_loss(teacher: Any, temperature: float, alpha: float, prefix: int = 0) -> Loss:
    """alpha * soft loss + (1 - alpha) * cross-entropy of the next token, both means over tokens, in nats.

    Both leave out `prefix` tokens before the text of a window.
    """

    def loss_of(student: Any, batch: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = teacher(input_ids=batch, use_cache=False).logits[:, prefix:-1]
        found = student(input_ids=batch, use_cache=False).logits[:, prefix:-1]
        soft = soft_loss(found.flatten(0, 1), wanted.flatten(0, 1), temperature)
        hard = cross_entropy(found.flatten(0, 1).float(), batch[:, prefix + 1 :].flatten())
        return alpha * soft + (1 - alpha) * hard

    return loss_of


def soft_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(teacher || student) at temperature T, averaged over tokens; both of shape (tokens, vocabulary).

    T^2 keeps the gradient's size as T changes, since it shrinks as 1 / T^2.
    """
    found = log_softmax(student.float() / temperature, dim=-1)
    wanted = log_softmax(teacher.float() / temperature, dim=-1)
    return kl_div(found, wanted, reduction="batchmean", log_target=True) * temperature**2
