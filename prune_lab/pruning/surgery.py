"""Taking units out of a model: MLP channels and KV groups, physically or as zeros."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prune_lab.models.anatomy import Anatomy, Slot


def unit_slices(anatomy: Anatomy, kind: str, slot: Slot, linear: nn.Linear) -> Tensor:
    """The weights of each unit in one Linear, shape (units, width, other side); a view where possible."""
    weight = linear.weight if slot.side == "rows" else linear.weight.T
    return weight.reshape(anatomy.unit_count(kind), anatomy.unit_width(kind, slot), -1)


@torch.no_grad()
def zero_units(anatomy: Anatomy, kind: str, keep: list[Tensor]) -> None:
    """Zeroes the units that `keep` drops and leaves every shape; `keep` has, for each block, (units,) bools."""
    for block, kept in zip(anatomy.blocks, keep, strict=True):
        for slot in anatomy.slots(kind):
            linear = block.get_submodule(slot.linear)
            dropped = (~kept).repeat_interleave(anatomy.unit_width(kind, slot)).to(linear.weight.device)
            if slot.side == "columns":
                linear.weight[:, dropped] = 0
                continue
            linear.weight[dropped] = 0
            if linear.bias is not None:
                linear.bias[dropped] = 0


@torch.no_grad()
def remove_units(anatomy: Anatomy, kind: str, keep: list[Tensor]) -> None:
    """Cuts the units that `keep` drops out of every block and writes the new count into the config.

    Every block must keep the same count: stock transformers builds all blocks from one config.
    """
    counts = {int(kept.sum()) for kept in keep}
    if len(counts) != 1:
        raise ValueError(f"every block must keep the same number of units, not {sorted(counts)}")
    for block, kept in zip(anatomy.blocks, keep, strict=True):
        for slot in anatomy.slots(kind):
            linear = block.get_submodule(slot.linear)
            index = kept.repeat_interleave(anatomy.unit_width(kind, slot)).nonzero().flatten()
            _cut(linear, slot.side, index.to(linear.weight.device))
        _renew_counts(block, kind, counts)
    anatomy.set_unit_count(kind, counts.pop())


def _cut(linear: nn.Linear, side: str, index: Tensor) -> None:
    dim = 0 if side == "rows" else 1
    linear.weight = nn.Parameter(linear.weight.index_select(dim, index), requires_grad=False)
    linear.out_features, linear.in_features = linear.weight.shape
    if side == "rows" and linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.index_select(0, index), requires_grad=False)


def _renew_counts(block: nn.Module, kind: str, counts: set[int]) -> None:
    """Modules that keep the count as an attribute must not contradict their weights."""
    for module in block.modules():
        if kind == "mlp" and isinstance(getattr(module, "intermediate_size", None), int):
            module.intermediate_size = next(iter(counts))  # type: ignore[assignment]
