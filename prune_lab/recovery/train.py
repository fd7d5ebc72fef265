"""The training loop: every recovery, and training from scratch, is this one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prune_lab.device import Device, native_bfloat16
from prune_lab.errors import Refused
from prune_lab.pruning.surgery import Cut
from prune_lab.recovery import checkpoint
from prune_lab.recovery.base import Training
from prune_lab.recovery.dropout import residual_dropout
from prune_lab.recovery.order import WindowOrder

if TYPE_CHECKING:
    from prune_lab.recovery.finetune import Finetune

LOG_EVERY = 10  # steps


def train(model: Any, recipe: Finetune, training: Training, loss_of: Callable[[Any, Tensor], Tensor]) -> None:
    """Trains `model` in place for recipe.steps steps, pruning as the schedule says, and leaves it in eval mode.

    The weights are float32 while they train, whatever the run's number type: small updates vanish in 16 bits.
    A checkpoint left by an interrupted run is gone on from, and ends in the same weights.
    """
    device, stream = training.device, training.tokens.stream("train")
    if len(stream) < training.seq_len:
        raise Refused(
            f"dataset.seq_len={training.seq_len}: the train split has only {len(stream)} tokens: give more text"
        )
    order = WindowOrder(stream, training.seq_len, recipe.batch_size, training.seed)
    saved = checkpoint.read(training.checkpoint)
    if saved is None:
        training.prune_before(0)
    else:
        saved.shape_model(model)
        training.pruned = saved.pruned
        training.console.note(f"going on from the checkpoint at step {saved.step}")
    _cast_weights(model, torch.float32)
    model.train()
    optimizer = _optimizer(model, recipe)
    if saved is not None:
        saved.fill(model, optimizer)
    start = saved.step if saved is not None else 0
    autocast = torch.autocast(device.torch_device.type, torch.bfloat16, enabled=uses_autocast(recipe.autocast, device))
    tokens_per_step = recipe.batch_size * training.seq_len
    progress = training.console.progress(recipe.steps * tokens_per_step, "training", unit="tok")
    with progress as bar, residual_dropout(model, recipe.dropout):
        bar.update(start * tokens_per_step)
        for step in range(start, recipe.steps):
            if step > 0:
                _prune(model, optimizer, training, step)
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * lr_factor(step, recipe)
            loss = _accumulate(model, order.batch(step), recipe.accumulate, loss_of, autocast, device)
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            training.pruned.masks.hold(model)
            bar.update(tokens_per_step)
            if (step + 1) % LOG_EVERY == 0 or step + 1 == recipe.steps:
                figures = {"train/loss": loss, "train/lr": optimizer.param_groups[0]["lr"]}
                bar.set_postfix(loss=f"{figures['train/loss']:.3f}")
                training.log(step + 1, figures)
            if (step + 1) % recipe.checkpoint_every == 0:
                checkpoint.save(training.checkpoint, step + 1, model, optimizer, training.pruned)
        _prune(model, optimizer, training, recipe.steps)
    model.eval()
    _cast_weights(model, device.dtype)
    training.pruned.masks.hold(model)
    model.requires_grad_(False)


def _accumulate(
    model: Any, batch: Tensor, parts: int, loss_of: Callable[[Any, Tensor], Tensor], autocast: Any, device: Device
) -> float:
    """Gradients of the mean loss over a batch, computed in `parts` parts one after the other; returns that loss."""
    total = 0.0
    for part in batch.chunk(parts):
        with autocast:
            loss = loss_of(model, part.to(device.torch_device)) * (len(part) / len(batch))
        loss.backward()
        total += float(loss.detach())
    return total


def _prune(model: Any, optimizer: torch.optim.Optimizer, training: Training, step: int) -> None:
    """Prunes if it is time to; the optimizer goes on with the state of what stays."""
    model.eval()
    if training.prune_before(step):
        follow(optimizer, model, training.pruned.cuts)
    model.train()


def follow(optimizer: torch.optim.Optimizer, model: Any, cuts: list[Cut]) -> None:
    """Has an optimizer train the parameters that took others' places, with the same part of their state."""
    for cut in cuts:
        state = optimizer.state.pop(cut.old, {})
        optimizer.state[cut.new] = {
            key: value.index_select(cut.dim, cut.index) if value.shape == cut.old.shape else value
            for key, value in state.items()
        }
    places, alive = {cut.old: cut.new for cut in cuts}, set(model.parameters())
    for group in optimizer.param_groups:
        group["params"] = [weight for old in group["params"] if (weight := places.get(old, old)) in alive]
    for gone in [weight for weight in optimizer.state if weight not in alive]:
        del optimizer.state[gone]


def lr_factor(step: int, recipe: Finetune) -> float:
    """Fraction of the peak learning rate at a step: linear warm-up, then cosine down to recipe.final_lr."""
    warmup = math.ceil(round(recipe.warmup * recipe.steps, 6))  # 0.07 * 100 is a little more than 7
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, recipe.steps - 1 - warmup)
    return recipe.final_lr + (1 - recipe.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def uses_autocast(setting: str, device: Device) -> bool:
    """Whether to compute in bfloat16: where it pays, that is where the hardware multiplies it."""
    return native_bfloat16(device.torch_device) if setting == "auto" else setting == "bfloat16"


def _cast_weights(model: Any, dtype: torch.dtype) -> None:
    """Casts the weights, not the buffers: rotary frequencies stay float32, as in a model loaded from disk."""
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)


def _optimizer(model: Any, recipe: Finetune) -> torch.optim.AdamW:
    for weight in model.parameters():
        weight.requires_grad_(True)
    groups = [
        {"params": [w for w in model.parameters() if w.ndim >= 2], "weight_decay": recipe.weight_decay},
        {"params": [w for w in model.parameters() if w.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=(recipe.beta1, recipe.beta2), fused=True)
