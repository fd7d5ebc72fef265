"""Next-token losses, with gradients or without: the head over some positions at a time, wherever logits are needed.

The logits of a whole window are never held, forward or backward: with a vocabulary of 262,144 they are a megabyte for
each token, and a loss with its gradient needs several times that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from prune_lab.models.anatomy import Anatomy
from prune_lab.models.found import probe_tokens

LOGITS_AT_ONCE = 2**22  # elements; so peak memory does not grow with vocabulary x window
TIMES_ON_GPU = 16  # as many there: products of few positions, 32 of a vocabulary of 128,256, only read the head
LEAST = 128  # positions, however large the vocabulary: with 16 of 262,144 a loss takes thrice as long, to read the head


def last_states(model: Any, batch: Tensor) -> Tensor:
    """Hidden states that the head reads, shape (windows, tokens, hidden).

    Of a model that does more to its logits than the head does, the logits themselves: then `logits_of` leaves them.
    """
    if has_whole_logits(model):
        whole: Tensor = model(input_ids=batch, use_cache=False).logits
        return whole
    return states_before_head(model, batch)


def has_whole_logits(model: Any) -> bool:
    """True of a type that does more to its logits than the head does: its logits stand for its last states."""
    found = Anatomy(model).found
    return found is not None and found.whole_logits


def states_and_balance(model: Any, batch: Tensor, by_block: bool = False) -> tuple[Tensor, Tensor]:
    """Last states, as of `last_states`, and the load-balance loss of a mixture's routers on the same tokens, a scalar.

    One forward pass gives both. The load-balance loss (Switch Transformer, 2101.03961, equations 4 to 6) is the one
    that the model's own class computes, before its coefficient: at least the number of experts that a token has. It
    adds up all blocks before it compares the experts, so that an expert with few tokens in one block is made up for by
    others of its number. by_block: the mean of the blocks' own.
    """
    states, whole = list[Tensor](), has_whole_logits(model)
    hook = model.base_model.register_forward_hook(lambda *call: states.append(call[-1].last_hidden_state))
    try:
        keep = {} if whole else {"logits_to_keep": 1}
        output = model(input_ids=batch, use_cache=False, output_router_logits=True, **keep)
    finally:
        hook.remove()
    balance = output.aux_loss
    if by_block:
        balance = torch.stack([_balance_of_block(logits, _top_k(model)) for logits in output.router_logits]).mean()
    return output.logits if whole else states[-1], balance


def _balance_of_block(logits: Tensor, top_k: int) -> Tensor:
    """Load-balance loss of a block from its router's logits, shape (tokens, experts)."""
    shares = logits.float().softmax(1)
    chosen = shares.topk(top_k, dim=1).indices
    counts = torch.zeros_like(shares).scatter_(1, chosen, 1.0).mean(0)
    return (counts * shares.mean(0)).sum() * logits.shape[1]


def _top_k(model: Any) -> int:
    """Number of experts of a token."""
    places = (model, model.config.get_text_config())
    return next(place.num_experts_per_tok for place in places if hasattr(place, "num_experts_per_tok"))


def balance_coefficient(model: Any) -> float:
    """Coefficient of the load-balance loss that a model's config asks for; 0 where it asks for none."""
    for place in (model, model.config.get_text_config()):  # some classes have it from another key, such as DBRX
        for name in ("router_aux_loss_coef", "aux_loss_coef"):
            if isinstance(value := getattr(place, name, None), int | float):
                return float(value)
    return 0.0


@torch.no_grad()
def has_balance(model: Any) -> bool:
    """True for a model whose class computes a load-balance loss: a mixture of experts, if not every one."""
    if Anatomy(model).found is None:  # the described families are all dense
        return False
    try:
        _, balance = states_and_balance(model, probe_tokens(model))
    except Exception:  # of any modelling code of transformers: then it does not
        return False
    return isinstance(balance, Tensor)


def states_before_head(model: Any, batch: Tensor) -> Tensor:
    """Last states of the base model, shape (windows, tokens, hidden)."""
    states: Tensor = model.base_model(input_ids=batch, use_cache=False).last_hidden_state
    return states


def logits_of(model: Any, states: Tensor) -> Tensor:
    """Logits of some states, as `last_states` gives them, shape (rows, hidden): (rows, vocabulary), fp32."""
    return states.float() if has_whole_logits(model) else head_logits(model, states)


def head_logits(model: Any, states: Tensor) -> Tensor:
    """Logits of the output embeddings, scaled or soft-capped where the config says so: (rows, vocabulary), fp32."""
    config = model.config.get_text_config()
    logits: Tensor = model.get_output_embeddings()(states).float()
    if isinstance(scale := getattr(config, "logit_scale", None), int | float):  # Cohere
        logits = logits * scale
    if isinstance(scale := getattr(config, "logits_scaling", None), int | float):  # Granite
        logits = logits / scale
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2 and 4
    return logits if cap is None else cap * torch.tanh(logits / cap)


def by_chunks(model: Any, of_rows: Callable[..., Tensor], *rows: Tensor) -> Tensor:
    """Results of `of_rows`, shape (rows, ...), called with as many rows as the logits of may be held at once.

    rows: tensors with the same number of rows, such as states and targets. Where there are gradients, each chunk's
    logits are computed again in the backward pass.
    """
    vocabulary = model.get_output_embeddings().weight.shape[0]
    at_once = max(LEAST, LOGITS_AT_ONCE * (TIMES_ON_GPU if rows[0].is_cuda else 1) // vocabulary)
    chunks = list(zip(*(tensor.split(at_once) for tensor in rows), strict=True))
    if len(chunks) == 1 or not torch.is_grad_enabled():
        return torch.cat([of_rows(*chunk) for chunk in chunks])
    again = [checkpoint(of_rows, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    return torch.cat(again)


def losses_at(model: Any, states: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of targets in nats, in their shape (windows, tokens), fp32, from last states at their positions."""

    def of_rows(of_states: Tensor, wanted: Tensor) -> Tensor:
        return cross_entropy(logits_of(model, of_states), wanted, reduction="none")

    return by_chunks(model, of_rows, states.flatten(0, 1), targets.flatten()).view(targets.shape)


def targets_of(batch: Tensor, prefix: int = 0) -> Tensor:
    """Tokens of a batch that are predicted, shape (windows, seq_len - 1).

    `batch` has shape (windows, prefix + seq_len): of the text's tokens they are all but the first, whatever stands
    before it (a BOS token).
    """
    return batch[:, prefix + 1 :]


def target_states(model: Any, batch: Tensor, prefix: int = 0) -> Tensor:
    """Last states at the positions that predict `targets_of(batch, prefix)`: (windows, seq_len - 1, hidden)."""
    return last_states(model, batch)[:, prefix:-1]


def token_losses(model: Any, batch: Tensor, prefix: int = 0) -> Tensor:
    """Cross-entropy of `targets_of(batch, prefix)` in nats, in their shape, fp32; with gradients where they are on."""
    return losses_at(model, target_states(model, batch, prefix), targets_of(batch, prefix))


@torch.no_grad()
def window_losses(model: Any, batch: Tensor, prefix: int = 0) -> Tensor:
    """Mean cross-entropy of each window in nats, shape (windows,), fp32; `batch` as of `targets_of`."""
    return token_losses(model, batch, prefix).mean(1)
