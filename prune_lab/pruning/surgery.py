"""Taking units out of a model: MLP channels and KV groups, physically or as zeros."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from prune_lab.errors import Refused
from prune_lab.models.active_experts import set_top_k, top_k_of_model
from prune_lab.models.anatomy import ACTIVE, HIDDEN, LABELS, Anatomy, UnitLinear, out_in
from prune_lab.models.cuts import Cut, Selection, cut, selected
from prune_lab.models.found import evaluating, forget_layout, is_same, layout_of, probe_tokens
from prune_lab.models.found import keep as keep_layout
from prune_lab.models.found_experts import EXPERTS, gives_the_same, mixtures_of, router_groups, with_experts
from prune_lab.models.found_units import after_cut, forget_units, units_of
from prune_lab.models.hidden import remove_hidden
from prune_lab.models.offload.streamed import cut_on_disk
from prune_lab.models.rebuild import rebuild, skeleton, tensors_of
from prune_lab.models.resize import (
    Shape,
    config_with,
    keep_blocks,
    note_count,
    note_experts,
    original_blocks,
    original_experts,
)
from prune_lab.models.stand_in import take_stand_in
from prune_lab.models.unit_cut import filled, selections
from prune_lab.models.unit_fields import config_of
from prune_lab.models.unit_probe import Calls
from prune_lab.models.unit_sets import FoundGroup
from prune_lab.models.watched_experts import without_experts
from prune_lab.pruning.refit import check_finite, refit_columns
from prune_lab.pruning.statistics import LinearStatistics


def unit_sums(part: UnitLinear, values: Tensor) -> Tensor:
    """Sums over each unit of one Linear, fp32, shape (units,), of values with the weight's shape (out, in)."""
    lines = values.float().sum(1 if part.side == "rows" else 0)
    lines = lines[: len(lines) - part.others]
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


@torch.no_grad()
def remove_units(anatomy: Anatomy, group: str, keep: list[Tensor]) -> list[Cut]:
    """Cuts the units that `keep` drops, bools (units,) of each set of a group, out of every block; says what it cut.

    The new count is written into the config. Every block must keep the same count: stock transformers builds all blocks
    from one config.
    """
    sets, was = anatomy.unit_sets(group), anatomy.unit_count(group)
    counts = {int(kept.sum()) / s.multiple for s, kept in zip(sets, keep, strict=True)}
    if len(counts) != 1:
        raise ValueError(f"every block must keep the same number of units, not {sorted(counts)}")
    count = int(counts.pop())
    if count == was:
        return []
    if anatomy.found is not None:
        return _remove_found(anatomy, group, keep, count)
    if count not in anatomy.family.kinds[group].possible(anatomy.config, was):
        take_stand_in(anatomy)
    chosen, model = dict[str, list[Selection]](), anatomy.model
    for s, kept in zip(anatomy.unit_sets(group), keep, strict=True):
        for part in s.parts:
            chosen |= _selections(part, part.lines(kept).nonzero().flatten())
    cuts = _rebuild(model, config_with(anatomy, group, count), chosen)
    note_count(anatomy, group, was, count)
    forget_layout(model)
    forget_units(model)
    anatomy.look()
    return cuts


def _selections(part: UnitLinear, index: Tensor) -> dict[str, list[Selection]]:
    """The parts that stay of the tensors of a Linear, those of lines of these indices."""
    # The weight as it is stored: Conv1D's is (in, out).
    dim = int((part.side == "rows") != isinstance(part.linear, nn.Linear))
    found = {f"{part.name}.weight": [Selection(dim, index)]}
    if part.side == "rows" and part.linear.bias is not None:
        found[f"{part.name}.bias"] = [Selection(0, index)]
    return found


def _rebuild(model: Any, config: Any, chosen: dict[str, list[Selection]]) -> list[Cut]:
    """Rebuilds a model from another config with the parts of its tensors that were chosen; says what was cut."""
    cuts, places, tensors = list[Cut](), dict[int, Tensor](), tensors_of(model)
    for name, of_tensor in chosen.items():
        old = tensors[name]
        if id(old) in places:  # under another of its names
            continue
        if isinstance(old, nn.Parameter):
            cuts.append(cut(old, *of_tensor))
            places[id(old)] = cuts[-1].new
        else:
            places[id(old)] = selected(old, tuple(of_tensor))
    # A tied tensor has several names.
    rebuild(model, config, {key: places.get(id(tensor), tensor) for key, tensor in tensors.items()})
    return cuts


def _remove_found(anatomy: Anatomy, name: str, keep: list[Tensor], count: int) -> list[Cut]:
    """Rebuilds a model without units of a found group; raises Refused where it is not what it was with zeros."""
    model, units = anatomy.model, units_of(anatomy.model)
    group = units.groups[name]
    if anatomy.is_on_disk:
        _remove_on_disk(anatomy, group, keep, count)
        return []
    tokens, was = probe_tokens(model)[:1], group.count
    for s, kept in zip(anatomy.unit_sets(name), keep, strict=True):
        zero_units(s.parts, kept)
    with evaluating(model):
        calls = Calls(model, layout_of(model))
    numbers = [s.block for s in group.sets]
    with evaluating(model), _without(model, group, keep):
        wanted = model(input_ids=tokens, use_cache=False).logits
        of_blocks = _outputs(anatomy, calls, numbers)
    cuts = _rebuild(model, config_of(model, group, count), selections(model, group, keep))
    note_count(anatomy, name, was, count)
    forget_layout(model)
    if name == EXPERTS:
        forget_units(model)  # the channels of those that stay have other names
        _note_experts(anatomy, group, keep)
    else:
        after_cut(model, units, name, count)
    anatomy.look()
    with evaluating(model):
        found = model(input_ids=tokens, use_cache=False).logits
        cut_blocks = _outputs(anatomy, calls, numbers)
    # In few bits a router's choice may turn on rounding, and then all that follows; not within one block.
    alike = bool(of_blocks) and len(of_blocks) == len(cut_blocks) and all(map(is_same, cut_blocks, of_blocks))
    if not alike and not is_same(found, wanted):
        way = "" if name == EXPERTS else "; give method.physical=false, which leaves zeros"
        raise _not_the_same(model, group, was - count, way)
    return cuts


def _not_the_same(model: Any, group: FoundGroup, gone: int, way: str = "") -> Refused:
    return Refused(
        f"without {gone} of {group.count} {LABELS.get(group.kind, EXPERTS)} the {model.config.model_type} model is not "
        f"what it is where they are there and do nothing{way}"
    )


def _note_experts(anatomy: Anatomy, group: FoundGroup, keep: list[Tensor]) -> None:
    before = original_experts(anatomy)
    stay = {s.block: kept.nonzero().flatten().tolist() for s, kept in zip(group.sets, keep, strict=True)}
    note_experts(anatomy, {b: [before[b][i] for i in of] if b in before else of for b, of in stay.items()})


def _remove_on_disk(anatomy: Anatomy, group: FoundGroup, keep: list[Tensor], count: int) -> None:
    """Writes each block without those of its experts that go, into new files, and has the model be of them.

    Raises Refused where a block is not what it was while no token chose them.
    """
    model, config = anatomy.model, config_of(anatomy.model, group, count)
    mixtures = mixtures_of(model, group)
    if isinstance(mixtures, str):
        raise Refused(f"method=experts: {mixtures}")
    of_block = {mixture.block: (mixture, ~kept) for mixture, kept in zip(mixtures, keep, strict=True)}
    layout, chosen = layout_of(model), selections(model, group, keep)
    with evaluating(model), cut_on_disk(model, skeleton(model, config), skeleton(model, config)) as cut_copy:
        calls = Calls(model, layout)
        for index in range(len(anatomy.blocks)):
            path = f"{anatomy.family.blocks}.{index}"
            with anatomy.at_hand(index), filled(cut_copy.model, model, path, chosen) as block:
                if index in of_block and not gives_the_same(model, *of_block[index], calls, block):
                    raise _not_the_same(model, group, group.count - count)
                cut_copy.put(path, chosen.keys())
    note_count(anatomy, group.name, group.count, count)
    keep_layout(model, with_experts(model, layout, group.count, count))
    forget_units(model)
    _note_experts(anatomy, group, keep)
    anatomy.look()


def _outputs(anatomy: Anatomy, calls: Calls, numbers: list[int]) -> list[Tensor]:
    """Outputs of blocks in calls that were recorded; none where they do not run by themselves."""
    try:
        return [calls.output(number, anatomy.blocks[number]) for number in dict.fromkeys(numbers)]
    except torch.OutOfMemoryError:
        raise
    except Exception:  # of any modelling code of transformers
        return []


def _without(model: Any, group: FoundGroup, keep: list[Tensor]) -> AbstractContextManager[None]:
    """Context in which a model chooses none of the experts that go; of other units nothing is to be done."""
    mixtures = mixtures_of(model, group) if group.name == EXPERTS else []
    if isinstance(mixtures, str):
        raise Refused(f"method=experts: {mixtures}")
    gone = {s.block: ~kept for s, kept in zip(group.sets, keep, strict=True)}
    return without_experts(model, mixtures, gone)


def set_active_experts(anatomy: Anatomy, count: int) -> None:
    """Has each token go to so many experts, which its router can choose (active_experts.has_count)."""
    model, top = anatomy.model, top_k_of_model(anatomy.model)
    if count == top.count:
        return
    set_top_k(model, top, count)
    note_count(anatomy, ACTIVE, top.count, count)
    forget_layout(model)
    forget_units(model)
    anatomy.look()


def take_shape(anatomy: Anatomy, shape: Shape) -> None:
    """Cuts a dense model to a shape, whatever its weights: those of a checkpoint are put in afterwards."""
    if shape.model_type != anatomy.config.model_type:
        take_stand_in(anatomy)
    if shape.blocks != original_blocks(anatomy):
        keep_blocks(anatomy, shape.blocks)
    for group, count in shape.units.items():
        if group == HIDDEN:
            remove_hidden(anatomy, torch.arange(anatomy.unit_count(HIDDEN)) < count)
            continue
        if group == ACTIVE:
            set_active_experts(anatomy, count)
            continue
        # Of the experts of each run that a router chooses among first as many; of other units of each group.
        runs, sets = router_groups(anatomy.config)[0] if group == EXPERTS else 1, anatomy.unit_sets(group)
        keep = [
            torch.arange(s.units) % (s.units // (runs * s.groups)) < s.multiple * count // (runs * s.groups)
            for s in sets
        ]
        remove_units(anatomy, group, keep)
    if shape.experts:
        note_experts(anatomy, {block: list(numbers) for block, numbers in shape.experts})
