"""The part of each tensor that stays when units go, and the test that a block is then one with zeros in their place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from prune_lab.models.anatomy import LABELS
from prune_lab.models.cuts import Selection, selected
from prune_lab.models.found import is_same, layout_of, probe_tokens
from prune_lab.models.offload.on_disk import set_parameters
from prune_lab.models.rebuild import rebuilt, skeleton, tensors_of
from prune_lab.models.unit_fields import can_hold, config_of
from prune_lab.models.unit_probe import Calls, generic
from prune_lab.models.unit_sets import FoundGroup, FoundSet, dimension, unit_of_line


def selections(model: Any, group: FoundGroup, keep: list[Tensor]) -> dict[str, list[Selection]]:
    """The part of each tensor that stays where each set of a group keeps these units, bools (units,)."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    parts = dict[tuple[str, int], dict[int, Tensor]]()  # by place: lines that stay
    for s, kept in zip(group.sets, keep, strict=True):
        for side in s.sides:
            name, offset = side.matrix.place.parameter, side.matrix.place.offset
            dim = dimension(parameters[name], side)
            parts.setdefault((name, dim), {})[offset] = (
                kept.cpu()[unit_of_line(side.widths, s.units)].nonzero().flatten()
            )
    found = dict[str, list[Selection]]()
    for (name, dim), by_offset in parts.items():
        parameter = parameters[name]
        indices = [by_offset[offset] for offset in sorted(by_offset)]
        lines = next(side.lines for s in group.sets for side in s.sides if side.matrix.place.parameter == name
                     and dimension(parameter, side) == dim)  # fmt: skip
        if len(indices) == 1:
            index = indices[0]
        elif parameter.shape[dim] == lines:  # experts one behind the other in the first dimension
            index = torch.stack(indices)
        else:  # experts stacked in this one
            index = torch.cat([offset // parameter.stride(dim) + of for offset, of in sorted(by_offset.items())])
        found.setdefault(name, []).append(Selection(dim, index))
    for beside in group.beside:
        indices = [
            keep[number].cpu()[unit_of_line(beside.widths, group.sets[number].units)].nonzero().flatten()
            for number in beside.sets
        ]
        index = torch.stack(indices) if len(indices) > 1 else indices[0]
        found.setdefault(beside.tensor, []).append(Selection(beside.dim, index))
    return found


def cut_tensors(model: Any, chosen: dict[str, list[Selection]]) -> dict[str, Tensor]:
    """The tensors of a model by name, cut where something is chosen, else the objects themselves."""
    found = tensors_of(model)
    for name, of_tensor in chosen.items():
        found[name] = selected(found[name].detach(), tuple(of_tensor))
    return found


def check_cut(model: Any, group: FoundGroup, calls: Calls) -> str | None:
    """None where a model without some units gives what it gives with zeros in their place; else the reason.

    Block by block, one of each sort; or the model as a whole, where a block of a new model does not run by itself.
    """
    label = LABELS[group.kind]
    counts = [c for c in (group.count // 2, group.count - 1, *range(group.count - 2, 0, -1)) if 0 < c < group.count]
    count = next((c for c in counts[:8] if can_hold(model, group, c)), None)
    if count is None:
        return f"no other number of {label} can be held by the config"
    generator, keep = torch.Generator().manual_seed(0), list[Tensor]()
    for s in group.sets:
        order = torch.stack([torch.randperm(s.units // s.groups, generator=generator) for _ in range(s.groups)])
        keep.append((order < s.multiple * count // s.groups).flatten())
    config, chosen = config_of(model, group, count), selections(model, group, keep)
    try:
        if _is_same_by_block(model, group, keep, skeleton(model, config), chosen, calls):
            return None
        tokens = probe_tokens(model)[:1]
        second = rebuilt(model, config, cut_tensors(model, chosen))
        found = second(input_ids=tokens, use_cache=False).logits
        both = list(zip(group.sets, keep, strict=True))
        wanted = _with_zeros(model, both, lambda: model(input_ids=tokens, use_cache=False).logits)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of any modelling code of transformers
        return f"a model with fewer {label} does not run ({type(error).__name__})"
    return None if is_same(found, wanted) else f"a model with fewer {label} is not one with zeros in their place"


def _is_same_by_block(
    model: Any, group: FoundGroup, keep: list[Tensor], made: Any, chosen: dict[str, list[Selection]], calls: Calls
) -> bool:
    """True where one block of each sort in `made`, a model of the new config, gives what it gives with zeros."""
    blocks, seen = layout_of(model).blocks, set[Any]()
    made.eval()
    for number in dict.fromkeys(s.block for s in group.sets):
        path = f"{blocks}.{number}"
        of_block = [(s, kept) for s, kept in zip(group.sets, keep, strict=True) if s.block == number]
        sort = tuple(
            (generic(side.matrix.name.removeprefix(path)), s.units) for s, _ in of_block for side in s.sides
        )  # fmt: skip
        if sort in seen:
            continue
        seen.add(sort)
        try:
            with filled(made, model, path, chosen) as block:
                found = calls.output(number, block)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # of any modelling code of transformers: it needs what a whole pass sets
            return False
        if not is_same(found, _with_zeros(model, of_block, partial(calls.output, number))):
            return False
    return True


@contextmanager
def filled(made: Any, model: Any, path: str, chosen: dict[str, list[Selection]]) -> Iterator[Any]:
    """A block of a skeleton with the tensors of the model's, cut; its parameters go when the context ends."""
    block, empty = made.get_submodule(path), dict(made.get_submodule(path).named_parameters())
    _fill(block, model, path, chosen)
    try:
        yield block
    finally:
        set_parameters(block, empty)


def _fill(block: Any, model: Any, path: str, chosen: dict[str, list[Selection]]) -> None:
    own = model.get_submodule(path)
    for name, module in block.named_modules():
        source = own.get_submodule(name)
        prefix = f"{path}.{name}." if name else f"{path}."
        for key, tensor in [*source._parameters.items(), *source._buffers.items()]:
            if tensor is None:
                continue
            is_buffer = key in source._buffers
            made_here = module._buffers.get(key) if is_buffer else None
            if is_buffer and prefix + key not in chosen and made_here is not None and made_here.shape != tensor.shape:
                module._buffers[key] = made_here.to(tensor.device)
                continue
            value = tensor.detach()
            value = selected(value, tuple(chosen.get(prefix + key, ())))
            (module._buffers if is_buffer else module._parameters)[key] = (
                value if is_buffer else torch.nn.Parameter(value, requires_grad=False)
            )


def _with_zeros(model: Any, sets: list[tuple[FoundSet, Tensor]], compute: Callable[[], Tensor]) -> Tensor:
    """Result of `compute` while the columns that read the units that go are zero."""
    saved = list[tuple[Tensor, Tensor]]()
    for s, kept in sets:
        reader = s.sides[-1]
        view = reader.matrix.place.view(model.get_parameter(reader.matrix.place.parameter).detach())
        saved.append((view, view.clone()))
        view[:, ~kept.to(view.device)[unit_of_line(reader.widths, s.units)]] = 0
    try:
        return compute()
    finally:
        for view, before in saved:
            view.copy_(before)
