"""Taking units out of a model: MLP channels and KV groups, physically or as zeros."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prune_lab.models.anatomy import Anatomy, UnitLinear, out_in
from prune_lab.models.resize import Shape, keep_blocks, original_blocks, set_unit_count
from prune_lab.pruning.refit import check_finite, refit_columns
from prune_lab.pruning.statistics import LinearStatistics


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
def shift_bias(reader: UnitLinear, kept: Tensor, mean: Tensor) -> None:
    """Adds to the bias what the units that go gave on average; `mean` is that of each of its inputs, shape (in,).

    FLAP's bias compensation (2312.11983). `reader` reads the units by its columns and has a bias.
    """
    gone = ~reader.lines(kept)
    _move_bias(reader, reader.weight.float()[:, gone] @ mean[gone])


@torch.no_grad()
def refit_reader(reader: UnitLinear, kept: Tensor, statistics: LinearStatistics) -> float:
    """Refits the columns of the Linear that reads the units to make up for those that go; returns the damping.

    statistics: gram, of a Linear with a bias mean and tokens, and the error of a target (refit.py).
    """
    assert statistics.gram is not None
    assert statistics.tokens is not None
    lines, bias = reader.lines(kept), reader.linear.bias
    mean, tokens = (None, 0) if bias is None else (statistics.mean, int(statistics.tokens))
    columns = refit_columns(reader.weight, statistics.gram, lines, mean, tokens, error=statistics.error)
    refitted = columns.weight.to(reader.weight.dtype)
    check_finite(reader.name, refitted)
    reader.weight[:, lines] = refitted
    if columns.shift is not None:
        _move_bias(reader, columns.shift)
    return columns.damping


def _move_bias(reader: UnitLinear, shift: Tensor) -> None:
    moved = (reader.linear.bias.float() + shift).to(reader.linear.bias.dtype)
    check_finite(reader.name, moved)
    reader.linear.bias.copy_(moved)


@dataclass(frozen=True)
class Cut:
    """A parameter that took another's place: what `old` has at `index` of dimension `dim`."""

    old: nn.Parameter
    new: nn.Parameter
    dim: int
    index: Tensor


@torch.no_grad()
def remove_units(anatomy: Anatomy, kind: str, keep: list[Tensor]) -> list[Cut]:
    """Cuts the units that `keep` drops out of every block, writes the new count into the config, says what it cut.

    Every block must keep the same count: stock transformers builds all blocks from one config.
    """
    counts = {int(kept.sum()) for kept in keep}
    if len(counts) != 1:
        raise ValueError(f"every block must keep the same number of units, not {sorted(counts)}")
    count, was, cuts = counts.pop(), len(keep[0]), list[Cut]()
    if count == was:
        return cuts
    for parts, kept in zip(anatomy.unit_linears(kind), keep, strict=True):
        for part in parts:
            cuts += _cut(part, part.lines(kept).nonzero().flatten())
    set_unit_count(anatomy, kind, count, was)
    return cuts


def take_shape(anatomy: Anatomy, shape: Shape) -> None:
    """Cuts a dense model to a shape, whatever its weights: those of a checkpoint are put in afterwards."""
    if shape.blocks != original_blocks(anatomy):
        keep_blocks(anatomy, shape.blocks)
    for kind, count in shape.units.items():
        first = torch.arange(anatomy.unit_count(kind)) < count
        remove_units(anatomy, kind, [first for _ in anatomy.blocks])


def _cut(part: UnitLinear, index: Tensor) -> list[Cut]:
    linear, is_linear = part.linear, isinstance(part.linear, nn.Linear)
    dim = int((part.side == "rows") != is_linear)  # of the weight as it is stored: Conv1D's is (in, out)
    cuts = [_cut_parameter(linear, "weight", dim, index)]
    if part.side == "rows" and linear.bias is not None:
        cuts.append(_cut_parameter(linear, "bias", 0, index))
    for name, size in zip(
        ("out_features", "in_features") if is_linear else ("nf", "nx"), part.weight.shape, strict=True
    ):
        setattr(linear, name, size)
    return cuts


def _cut_parameter(linear: nn.Module, name: str, dim: int, index: Tensor) -> Cut:
    old = linear.get_parameter(name)
    new = nn.Parameter(old.detach().index_select(dim, index).contiguous(), requires_grad=old.requires_grad)
    setattr(linear, name, new)
    return Cut(old, new, dim, index)
