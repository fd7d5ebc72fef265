"""Training losses: next-token cross-entropy and distillation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from prune_lab.models.loss import by_chunks, last_states, logits_of, token_losses

Loss = Callable[[Any, Tensor], Tensor]  # of a model and a batch of shape (windows, prefix + seq_len): a scalar


def next_token_loss(prefix: int = 0) -> Loss:
    """Mean cross-entropy of the next token, in nats, of a text after `prefix` tokens that are none of it (BOS)."""

    def loss_of(model: Any, batch: Tensor) -> Tensor:
        return token_losses(model, batch, prefix).mean()

    return loss_of


def distillation_loss(teacher: Any, temperature: float, alpha: float, prefix: int = 0) -> Loss:
    """alpha * soft loss + (1 - alpha) * cross-entropy of the next token, both means over tokens, in nats.

    Both leave out `prefix` tokens before the text of a window.
    """

    def loss_of(student: Any, batch: Tensor) -> Tensor:
        def of_rows(mine: Tensor, theirs: Tensor, targets: Tensor) -> Tensor:
            found = logits_of(student, mine)
            with torch.no_grad():
                wanted = logits_of(teacher, theirs)
            hard = cross_entropy(found, targets, reduction="none")
            return alpha * soft_losses(found, wanted, temperature) + (1 - alpha) * hard

        with torch.no_grad():
            theirs = last_states(teacher, batch)[:, prefix:-1].flatten(0, 1)
        mine = last_states(student, batch)[:, prefix:-1].flatten(0, 1)
        return by_chunks(student, of_rows, mine, theirs, batch[:, prefix + 1 :].flatten()).mean()

    return loss_of


def soft_losses(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(teacher || student) at temperature T of each token; logits of shape (tokens, vocabulary): (tokens,).

    T^2 keeps the gradient's size as T changes, since it shrinks as 1 / T^2.
    """
    found = log_softmax(student.float() / temperature, dim=-1)
    wanted = log_softmax(teacher.float() / temperature, dim=-1)
    return kl_div(found, wanted, reduction="none", log_target=True).sum(-1) * temperature**2
