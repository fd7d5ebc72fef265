"""Low-rank adapters: what LoRA trains in place of the weights, merged into them at the end."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as apply_linear

from prune_lab.models.anatomy import Anatomy, out_in
from prune_lab.models.found import uncalled_linears
from prune_lab.models.products import FusedMatrix
from prune_lab.pruning.masks import Masks, clear
from prune_lab.recovery import expert_adapters

_A, _B = "lora_a", "lora_b"


def attach(anatomy: Anatomy, masks: Masks, rank: int, scale: float, seed: int) -> list[str]:
    """Gives every prunable Linear and expert an update scale * B A to train, and freezes everything else.

    A, shape (rank, in), is drawn uniformly from +-1/sqrt(in); B, shape (out, rank), is zero, so the model computes what
    it did (Hu et al., 2106.09685). Where a mask prunes single weights, the update is masked as it is used, so what is
    trained is what `merge` leaves. Returns Linears that have none: the model uses their weights without calling them.
    """
    generator = torch.Generator().manual_seed(seed % 2**63)
    anatomy.model.requires_grad_(False)
    without = [] if anatomy.found is None else uncalled_linears(anatomy.model, anatomy.found)
    for name, linear in _linears(anatomy):
        if name in without:
            continue
        out_features, in_features = out_in(linear, linear.weight).shape
        a = expert_adapters.drawn(generator, rank, in_features)
        like = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        linear.register_parameter(_A, nn.Parameter(a.to(**like)))
        linear.register_parameter(_B, nn.Parameter(torch.zeros(out_features, rank, **like)))
        keep = masks.keep.get(name)
        if keep is not None:
            keep = out_in(linear, keep).to(linear.weight.device)
        linear.__dict__["forward"] = partial(_forward, linear, keep, scale)
    expert_adapters.attach(anatomy, masks, rank, scale, generator)
    return without


@torch.no_grad()
def merged(anatomy: Anatomy, masks: Masks, scale: float) -> dict[str, Tensor]:
    """The weights by name as `merge` would leave them."""
    found = {
        name: weight
        for name, weight in anatomy.model.named_parameters()
        if name.rpartition(".")[2] not in (_A, _B) and not expert_adapters.is_of_adapter(name)
    }
    for name, linear in _adapted(anatomy):
        found[f"{name}.weight"] = linear.weight + out_in(linear, _update(linear, masks.keep.get(name), scale))
    return found | expert_adapters.updated(anatomy.model)


@torch.no_grad()
def merge(anatomy: Anatomy, masks: Masks, scale: float) -> None:
    """Adds every update to its weights, through the masks, and takes the adapters off."""
    expert_adapters.merge(anatomy.model)
    for name, linear in _adapted(anatomy):
        out_in(linear, linear.weight).add_(_update(linear, masks.keep.get(name), scale))
        del linear.__dict__["forward"], linear._parameters[_A], linear._parameters[_B]


def _linears(anatomy: Anatomy) -> Iterator[tuple[str, Any]]:
    return ((name, linear) for name, linear in anatomy.linears() if not isinstance(linear, FusedMatrix))


def _adapted(anatomy: Anatomy) -> Iterator[tuple[str, Any]]:
    return ((name, linear) for name, linear in _linears(anatomy) if _A in linear._parameters)


def _update(linear: Any, keep: Tensor | None, scale: float) -> Tensor:
    update = scale * (getattr(linear, _B) @ getattr(linear, _A))
    if keep is not None:
        clear(update, out_in(linear, keep).to(update.device))
    return update


def _forward(linear: Any, keep: Tensor | None, scale: float, inputs: Tensor) -> Tensor:
    """Forward pass of a Linear with an adapter."""
    weight, a, b = out_in(linear, linear.weight), getattr(linear, _A), getattr(linear, _B)
    if keep is None:
        low = apply_linear(apply_linear(inputs, a), b)
        return apply_linear(inputs, weight, linear.bias) + scale * low
    return apply_linear(inputs, weight + scale * (b @ a) * keep, linear.bias)
