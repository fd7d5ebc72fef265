"""Training losses: next-token cross-entropy, distillation, and what keeps the experts of a mixture in use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from prune_lab.errors import Refused
from prune_lab.models.load import Loaded
from prune_lab.models.loss import (
    balance_coefficient,
    by_chunks,
    has_balance,
    last_states,
    logits_of,
    losses_at,
    states_and_balance,
    targets_of,
)
from prune_lab.recovery.context import TrainingContext


class TrainingLoss(NamedTuple):
    """Loss of a batch: what is minimised, a scalar with gradients, and the part that is the routers' load balance.

    balance: before its coefficient, without gradients; None where it is not trained on.
    """

    total: Tensor
    balance: Tensor | None = None


Loss = Callable[[Any, Tensor], TrainingLoss]  # of a model and a batch of shape (windows, prefix + seq_len)


@dataclass(frozen=True)
class Balance:
    """Load-balance loss that is added: its coefficient, 0 for none, and whether each block has its own (or all one)."""

    coefficient: float = 0.0
    by_block: bool = False


NO_BALANCE = Balance()


def check_balance(asked: float | None, dense: Loaded) -> None:
    """Raises Refused where a load-balance loss is asked for that transformers does not compute for a model."""
    if asked and not has_balance(dense.model):
        raise Refused(
            f"recovery.router_aux_loss={asked} is of the routers of a mixture of experts, and transformers computes no "
            f"load-balance loss for models of the type {dense.family}: give null"
        )


def balance_of(asked: float | None, by_block: bool, training: TrainingContext) -> Balance:
    """Load-balance loss of a training, with the coefficient that was asked for, else that of the model's config.

    None where there is none to add: transformers computes it for most mixtures of experts. Notes a config's that it
    does not compute; raises Refused for one that was asked for.
    """
    check_balance(asked, training.dense)
    model = training.dense.model
    coefficient = balance_coefficient(model) if asked is None else asked
    if coefficient == 0 or has_balance(model):
        return Balance(coefficient, by_block)
    training.warn(
        f"trained without the load-balance loss that the model's config asks for (coefficient {coefficient:g}): "
        f"transformers computes none for models of the type {training.dense.family}"
    )
    return NO_BALANCE


def next_token_loss(prefix: int = 0, balance: Balance = NO_BALANCE) -> Loss:
    """Mean cross-entropy of the next token, in nats, of a text after `prefix` tokens that are none of it (BOS)."""

    def loss_of(model: Any, batch: Tensor) -> TrainingLoss:
        states, of_routers = _states(model, batch, balance)
        losses = losses_at(model, states[:, prefix:-1], targets_of(batch, prefix))
        return _sum(losses.mean(), of_routers, balance)

    return loss_of


def _states(model: Any, batch: Tensor, balance: Balance) -> tuple[Tensor, Tensor | None]:
    if balance.coefficient == 0:
        return last_states(model, batch), None
    return states_and_balance(model, batch, balance.by_block)


def _sum(loss: Tensor, of_routers: Tensor | None, balance: Balance) -> TrainingLoss:
    if of_routers is None:
        return TrainingLoss(loss)
    return TrainingLoss(loss + balance.coefficient * of_routers, of_routers.detach())


def distillation_loss(
    teacher: Any, temperature: float, alpha: float, prefix: int = 0, balance: Balance = NO_BALANCE
) -> Loss:
    """alpha * soft loss + (1 - alpha) * cross-entropy of the next token, both means over tokens, in nats.

    Both leave out `prefix` tokens before the text of a window. balance: as of `next_token_loss`, of the student.
    """

    def loss_of(student: Any, batch: Tensor) -> TrainingLoss:
        def of_rows(mine: Tensor, theirs: Tensor, targets: Tensor) -> Tensor:
            found = logits_of(student, mine)
            with torch.no_grad():
                wanted = logits_of(teacher, theirs)
            hard = cross_entropy(found, targets, reduction="none")
            return alpha * soft_losses(found, wanted, temperature) + (1 - alpha) * hard

        with torch.no_grad():
            theirs = last_states(teacher, batch)[:, prefix:-1].flatten(0, 1)
        states, of_routers = _states(student, batch, balance)
        mine = states[:, prefix:-1].flatten(0, 1)
        losses = by_chunks(student, of_rows, mine, theirs, targets_of(batch, prefix).flatten())
        return _sum(losses.mean(), of_routers, balance)

    return loss_of


def soft_losses(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(teacher || student) at temperature T of each token; logits of shape (tokens, vocabulary): (tokens,).

    T^2 keeps the gradient's size as T changes, since it shrinks as 1 / T^2.
    """
    found = log_softmax(student.float() / temperature, dim=-1)
    wanted = log_softmax(teacher.float() / temperature, dim=-1)
    return kl_div(found, wanted, reduction="none", log_target=True).sum(-1) * temperature**2
