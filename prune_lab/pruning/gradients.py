"""First- and second-order Taylor saliency: gradients of the loss, summed up as they come and freed at once."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from prune_lab.errors import Refused
from prune_lab.models.anatomy import Anatomy, out_in
from prune_lab.models.loss import token_losses
from prune_lab.models.products import FusedMatrix
from prune_lab.system.console import Console
from prune_lab.system.world import World

Reduce = Callable[[str, Tensor], Tensor]
FLOAT16_SCALE = 2.0**10  # of the loss, since gradients of a mean loss vanish in float16; scores only compare


def saliency(
    anatomy: Anatomy,
    windows: Tensor,
    order: int,
    console: Console,
    reduce: Reduce = lambda name, value: value,
    only: Collection[str] | None = None,
    prefix: int = 0,
    world: World | None = None,
) -> dict[str, Tensor]:
    """Mean over windows of |w * g| (order 1) or (w * g)^2 (order 2) by Linear, all of them or `only` those; float32.

    g is the gradient of one window's mean next-token loss (Molchanov et al., 1611.06440 and 1906.10771; LLM-Pruner,
    2305.11627, whose second order is w^2 times the mean squared per-sample gradient). `reduce(name, values)` turns
    the values of one Linear, shape (out, in), into what is summed up, such as sums over units. The loss leaves out
    `prefix` tokens before the text of a window. world: the processes that share the windows out; None: this one alone.
    Raises Refused where a gradient is not finite.
    """
    model, sums, world = anatomy.model, dict[str, Tensor](), world or World()
    mine = world.part(windows)
    linears = {name: linear for name, linear in anatomy.linears() if only is None or name in only}
    scale = FLOAT16_SCALE if next(iter(linears.values())).weight.dtype == torch.float16 else 1.0

    by_parameter = dict[int, tuple[Any, list[tuple[str, Any]]]]()  # all experts of a fused one
    for name, linear in linears.items():
        of = linear.parameter if isinstance(linear, FusedMatrix) else linear.weight
        by_parameter.setdefault(id(of), (of, []))[1].append((name, linear))

    def take(parts: list[tuple[str, Any]]) -> Callable[[Tensor], None]:
        def gather(weight: Tensor) -> None:
            assert weight.grad is not None
            value = (weight.detach().float() * weight.grad.float() / scale).abs()
            value = value if order == 1 else value.square()
            for name, linear in parts:
                of_linear = linear.of(value) if isinstance(linear, FusedMatrix) else out_in(linear, value)
                part = reduce(name, of_linear)
                # A part of a fused one is a view of all its experts, which would stay.
                part = part.clone() if isinstance(linear, FusedMatrix) and part is of_linear else part
                sums[name] = part if name not in sums else sums[name].add_(part)
            weight.grad = None

        return gather

    hooks, learned = [], {weight: weight.requires_grad for weight in model.parameters()}
    model.requires_grad_(False)
    for weight, parts in by_parameter.values():
        weight.requires_grad_(True)
        hooks.append(weight.register_post_accumulate_grad_hook(take(parts)))
    try:
        device = next(model.parameters()).device
        with console.progress(mine.numel(), "gradients", unit="tok") as bar, torch.enable_grad():
            for window in mine.split(1):
                tokens = window.to(device)
                (token_losses(model, tokens, prefix).mean() * scale).backward()
                bar.update(tokens.numel())
    finally:
        for hook in hooks:
            hook.remove()
        for weight, learns in learned.items():
            weight.requires_grad_(learns)
    for name, linear in linears.items():  # behind a choice of tokens, which has no gradient
        if name not in sums:
            sums[name] = reduce(name, torch.zeros_like(out_in(linear, linear.weight.detach()), dtype=torch.float32))
    world.sum(sums[name] for name in linears)
    for name, value in sums.items():
        if not value.isfinite().all():
            raise Refused(f"the gradient of {name} is not finite: give dtype=float32 or bfloat16")
    return {name: value / len(windows) for name, value in sums.items()}
