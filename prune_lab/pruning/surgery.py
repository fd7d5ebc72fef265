"""Taking units out of a model: MLP channels and KV groups, physically or as zeros."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prune_lab.models.anatomy import Anatomy, UnitLinear, out_in
from prune_lab.models.resize import set_unit_count


def unit_sums(part: UnitLinear, values: Tensor) -> Tensor:
    """Sums over each unit of one Linear, fp32, shape (units,), of values with the weight's shape (out, in)."""
    lines = values.float().sum(1 if part.side == "rows" else 0)
    units = len(lines) // sum(part.widths)
    runs = lines.split([units * width for width in part.widths])
    return torch.stack([run.view(units, -1).sum(1) for run in runs]).sum(0)


def unit_masks(parts: list[UnitLinear], kept: Tensor) -> dict[str, Tensor]:
    """Keep-masks of a block's Linears' weights by name, from the units it keeps: bools of shape (units,)."""
    masks = {}
    for part in parts:
        lines = part.lines(kept)
        mask = (lines[:, None] if part.side == "rows" else lines).expand_as(part.weight)
        masks[part.name] = out_in(part.linear, mask)
    return masks


@torch.no_grad()
def zero_units(parts: list[UnitLinear], kept: Tensor) -> None:
    """Zeroes a block's units where `kept`, bools of shape (units,), is False, biases too, and leaves every shape."""
    for part, mask in zip(parts, unit_masks(parts, kept).values(), strict=True):
        part.linear.weight.masked_fill_(~mask, 0)
        if part.side == "rows" and part.linear.bias is not None:
            part.linear.bias[~part.lines(kept)] = 0


@torch.no_grad()
def compensate(part: UnitLinear, kept: Tensor, mean: Tensor) -> None:
    """Adds to the bias what the units that go gave on average; `mean` is that of each of its inputs, shape (in,).

    FLAP's bias compensation (2312.11983). `part` reads the units (its columns) and has a bias.
    """
    gone = ~part.lines(kept)
    shift = part.weight.float()[:, gone] @ mean[gone]
    part.linear.bias.copy_(part.linear.bias.float() + shift)


@torch.no_grad()
def remove_units(anatomy: Anatomy, kind: str, keep: list[Tensor]) -> None:
    """Cuts the units that `keep` drops out of every block and writes the new count into the config.

    Every block must keep the same count: stock transformers builds all blocks from one config.
    """
    counts = {int(kept.sum()) for kept in keep}
    if len(counts) != 1:
        raise ValueError(f"every block must keep the same number of units, not {sorted(counts)}")
    count = counts.pop()
    was = len(keep[0])
    if count == was:
        return
    for parts, kept in zip(anatomy.unit_linears(kind), keep, strict=True):
        for part in parts:
            _cut(part, part.lines(kept).nonzero().flatten())
    set_unit_count(anatomy, kind, count, was)


def _cut(part: UnitLinear, index: Tensor) -> None:
    linear, learns = part.linear, part.linear.weight.requires_grad
    weight = part.weight.index_select(0 if part.side == "rows" else 1, index)
    linear.weight = nn.Parameter(out_in(linear, weight).contiguous(), requires_grad=learns)
    if part.side == "rows" and linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.index_select(0, index), requires_grad=learns)
    sizes = ("out_features", "in_features") if isinstance(linear, nn.Linear) else ("nf", "nx")
    for name, size in zip(sizes, weight.shape, strict=True):
        setattr(linear, name, size)
