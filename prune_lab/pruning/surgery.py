"""Taking units out of a model: MLP channels and KV groups, physically or as zeros."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prune_lab.models.anatomy import Anatomy, UnitLinear, out_in


def unit_weights(part: UnitLinear) -> Tensor:
    """The weights of each unit in one Linear, shape (units, weights of a unit)."""
    lines = part.weight if part.side == "rows" else part.weight.T
    units = lines.shape[0] // sum(part.widths)
    runs = lines.split([units * width for width in part.widths])
    return torch.cat([run.reshape(units, -1) for run in runs], dim=1)


def unit_masks(anatomy: Anatomy, kind: str, keep: list[Tensor]) -> dict[str, Tensor]:
    """Keep-masks of the Linears' weights by name, from what each block keeps: (units,) bools a block."""
    masks = {}
    for parts, kept in zip(anatomy.unit_linears(kind), keep, strict=True):
        for part in parts:
            lines = part.lines(kept)
            mask = (lines[:, None] if part.side == "rows" else lines).expand_as(part.weight)
            masks[part.name] = out_in(part.linear, mask)
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
            _cut(part, part.lines(kept).nonzero().flatten())
    anatomy.set_unit_count(kind, count)


def _cut(part: UnitLinear, index: Tensor) -> None:
    linear = part.linear
    weight = part.weight.index_select(0 if part.side == "rows" else 1, index)
    linear.weight = nn.Parameter(out_in(linear, weight).contiguous(), requires_grad=False)
    if part.side == "rows" and linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.index_select(0, index), requires_grad=False)
    sizes = ("out_features", "in_features") if isinstance(linear, nn.Linear) else ("nf", "nx")
    for name, size in zip(sizes, weight.shape, strict=True):
        setattr(linear, name, size)
