"""Taking units out of a model: MLP channels and KV groups, physically or as zeros."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prune_lab.models.anatomy import Anatomy, UnitLinear


def unit_weights(part: UnitLinear) -> Tensor:
    """The weights of each unit in one Linear, shape (units, width * other side)."""
    lines = part.linear.weight if part.side == "rows" else part.linear.weight.T
    return lines.reshape(lines.shape[0] // part.width, -1)


def unit_masks(anatomy: Anatomy, kind: str, keep: list[Tensor]) -> dict[str, Tensor]:
    """Keep-masks of the Linears' weights by name, from what each block keeps: (units,) bools a block."""
    masks = {}
    for parts, kept in zip(anatomy.unit_linears(kind), keep, strict=True):
        for part in parts:
            lines = part.lines(kept)
            masks[part.name] = (lines[:, None] if part.side == "rows" else lines).expand_as(part.linear.weight)
    return masks


@torch.no_grad()
def zero_units(anatomy: Anatomy, kind: str, keep: list[Tensor]) -> None:
    """Zeroes the units that `keep` drops, biases too, and leaves every shape."""
    masks = unit_masks(anatomy, kind, keep)
    for parts, kept in zip(anatomy.unit_linears(kind), keep, strict=True):
        for part in parts:
            part.linear.weight.masked_fill_(~masks[part.name], 0)
            if part.side == "rows" and part.linear.bias is not None:
                part.linear.bias[~part.lines(kept)] = 0


@torch.no_grad()
def remove_units(anatomy: Anatomy, kind: str, keep: list[Tensor]) -> None:
    """Cuts the units that `keep` drops out of every block and writes the new count into the config.

    Every block must keep the same count: stock transformers builds all blocks from one config.
    """
    counts = {int(kept.sum()) for kept in keep}
    if len(counts) != 1:
        raise ValueError(f"every block must keep the same number of units, not {sorted(counts)}")
    count = counts.pop()
    if count == anatomy.unit_count(kind):
        return
    for parts, kept in zip(anatomy.unit_linears(kind), keep, strict=True):
        for part in parts:
            _cut(part.linear, part.side, part.lines(kept).nonzero().flatten())
    if kind == "mlp":  # modules that keep the width as an attribute must not contradict their weights
        for module in anatomy.model.modules():
            if isinstance(getattr(module, "intermediate_size", None), int):
                module.intermediate_size = count
    anatomy.set_unit_count(kind, count)


def _cut(linear: nn.Linear, side: str, index: Tensor) -> None:
    dim = 0 if side == "rows" else 1
    linear.weight = nn.Parameter(linear.weight.index_select(dim, index), requires_grad=False)
    linear.out_features, linear.in_features = linear.weight.shape
    if side == "rows" and linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.index_select(0, index), requires_grad=False)
