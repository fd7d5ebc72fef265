"""The optimizer of a training: AdamW over what is trained, and its learning rate by step."""

from __future__ import annotations

import math
from typing import Any

import torch

from prune_lab.models.cuts import Cut
from prune_lab.recovery.recipe import TrainingRecipe


def adamw(model: Any, recipe: TrainingRecipe) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter, 1711.05101) over what requires gradients; norms and biases are not decayed."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    groups = [
        {"params": [w for w in trained if w.ndim >= 2], "weight_decay": recipe.weight_decay},
        {"params": [w for w in trained if w.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=(recipe.beta1, recipe.beta2), fused=True)


def follow(optimizer: torch.optim.Optimizer, model: Any, cuts: list[Cut]) -> None:
    """Has an optimizer train the parameters that took others' places, with the same part of their state."""
    for cut in cuts:
        state = optimizer.state.pop(cut.old, {})
        optimizer.state[cut.new] = {
            key: cut.of(value) if value.shape == cut.old.shape else value for key, value in state.items()
        }
    places, alive = {cut.old: cut.new for cut in cuts}, set(model.parameters())
    for group in optimizer.param_groups:
        group["params"] = [weight for old in group["params"] if (weight := places.get(old, old)) in alive]
    for gone in [weight for weight in optimizer.state if weight not in alive]:
        del optimizer.state[gone]


def lr_factor(step: int, steps: int, warmup: float, final_lr: float) -> float:
    """Fraction of the peak learning rate at a step of `steps`: linear warm-up, then cosine down to `final_lr`.

    warmup is a fraction of the steps (cosine decay: Loshchilov & Hutter, 1608.03983).
    """
    warm = math.ceil(round(warmup * steps, 6))  # 0.07 * 100 is a little more than 7
    if step < warm:
        return (step + 1) / warm
    progress = (step - warm) / max(1, steps - 1 - warm)
    return final_lr + (1 - final_lr) * 0.5 * (1 + math.cos(math.pi * progress))
