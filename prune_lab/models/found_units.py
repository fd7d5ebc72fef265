"""Units of a model whose layout was found: channels of its MLPs and experts, and KV groups.

Found on a few tokens by moving outputs (unit_probe.py), counted by the config fields whose change the shapes follow
(unit_fields.py), and offered where a block without some of them gives what it gives with zeros in their place
(unit_cut.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from prune_lab.errors import Refused
from prune_lab.models import layout_cache
from prune_lab.models.anatomy import LABELS
from prune_lab.models.families import QUERY_HEADS
from prune_lab.models.found import Layout, evaluating, layout_of
from prune_lab.models.found_experts import EXPERTS, NO_EXPERTS, check_experts, find_experts
from prune_lab.models.offload.on_disk import weights_on_disk
from prune_lab.models.products import eager_experts
from prune_lab.models.rebuild import shapes
from prune_lab.models.unit_cut import check_cut
from prune_lab.models.unit_fields import choices, group_of
from prune_lab.models.unit_probe import Calls, find_sets
from prune_lab.models.unit_query_heads import BY_SHAPE, query_heads
from prune_lab.models.unit_sets import FoundGroup, FoundSet, read_group

_KEPT = "_found_units"  # with the model and its copies; in no export
_ON_DISK = "its weights are on disk (model.stream=true)"


@dataclass(frozen=True)
class FoundUnits:
    """Groups of units by name, and the reason by kind where there are none of it or not of every block."""

    groups: dict[str, FoundGroup]
    why_not: dict[str, str]


def units_of(model: Any) -> FoundUnits:
    """The units of a model, found once and kept with it."""
    kept = model.__dict__.get(_KEPT)
    if kept is None:
        kind, find = ("units", _find) if weights_on_disk(model) is None else ("experts", _find_on_disk)
        kept = model.__dict__[_KEPT] = layout_cache.kept(kind, model, lambda: find(model), _read, _is_whole)
    found: FoundUnits = kept
    return found


def _read(of: dict[str, Any]) -> FoundUnits:
    """The units that were kept in the cache."""
    return FoundUnits({name: read_group(group) for name, group in of["groups"].items()}, of["why_not"])


def _is_whole(units: FoundUnits) -> bool:
    """True where all kinds were found, but for experts: of the others weights may have hidden some."""
    by_shape = {_ON_DISK, *BY_SHAPE}
    hidden = {kind for kind, why in units.why_not.items() if why not in by_shape} - {EXPERTS}
    return not hidden and units.why_not.get(EXPERTS, NO_EXPERTS) == NO_EXPERTS


def forget_units(model: Any) -> None:
    """Has the units of a model found anew when they are asked for."""
    model.__dict__.pop(_KEPT, None)


def _find(model: Any) -> FoundUnits:
    layout, was_training = layout_of(model), model.training
    model.eval()
    try:
        with torch.no_grad(), eager_experts(model):
            try:
                calls = Calls(model, layout)
                sets = find_sets(model, layout, calls)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # of any modelling code of transformers
                reason = f"its blocks do not run by themselves ({type(error).__name__})"
                return FoundUnits({}, dict.fromkeys((*LABELS, EXPERTS), reason))
            groups, why_not = dict[str, FoundGroup](), dict[str, str]()
            for kind in LABELS:
                of = [s for of_kind, s in sets if of_kind == ("heads" if kind == QUERY_HEADS else kind)]
                found, why = (query_heads if kind == QUERY_HEADS else _groups_of_kind)(model, kind, of, calls)
                for group in found:
                    name = kind if len(found) == 1 else f"{kind}:{group.fields[0][1]}"
                    groups[name] = replace(group, name=name)
                if why is not None:
                    why_not[kind] = why
            _add_experts(model, layout, calls, FoundUnits(groups, why_not))
            return FoundUnits(groups, why_not)
    finally:
        model.train(was_training)


def _find_on_disk(model: Any) -> FoundUnits:
    """The experts alone: what other units there are is seen in many passes through each block."""
    layout, found = layout_of(model), FoundUnits({}, dict.fromkeys(LABELS, _ON_DISK))
    with evaluating(model), eager_experts(model):
        _add_experts(model, layout, Calls(model, layout), found)
    return found


def _add_experts(model: Any, layout: Layout, calls: Calls, units: FoundUnits) -> None:
    """Puts the experts among the groups, or the reason why there are none."""
    experts = find_experts(model, layout)
    why = check_experts(model, experts, calls) if isinstance(experts, FoundGroup) else experts
    if isinstance(experts, FoundGroup) and why is None:
        units.groups[EXPERTS] = experts
    else:
        units.why_not[EXPERTS] = str(why)


def _groups_of_kind(model: Any, kind: str, sets: list[FoundSet], calls: Calls) -> tuple[list[FoundGroup], str | None]:
    """Groups of a kind, and why some sets of it are in none."""
    label, was = LABELS[kind], shapes(model, model.config)
    if not sets:
        return [], f"no {label} are found that could go: outputs of a block's matrices move what several of them share"
    if was is None:
        return [], "its class of transformers cannot be built from its config"
    left, groups, why = list(sets), list[FoundGroup](), f"no field of the config holds the number of {label} alone"
    for fields, count in choices(model.config, kind, sets):
        here = [s for s in left if s.units % count == 0]
        group = group_of(model, kind, fields, count, here, was) if here else None
        reason = check_cut(model, group, calls) if isinstance(group, FoundGroup) else group
        if isinstance(group, FoundGroup) and reason is None:
            groups.append(group)
            gone = {id(s.sides[-1].matrix) for s in group.sets}
            left = [s for s in left if id(s.sides[-1].matrix) not in gone]
        why = reason or why
    return groups, why if left else None


def groups_of(model: Any, kind: str) -> list[str]:
    """Names of the groups of a kind; raises Refused, with the reason, where none can be cut."""
    units = units_of(model)
    names = [name for name, group in units.groups.items() if group.kind == kind]
    if not names:
        why = units.why_not.get(kind, f"it has no {LABELS[kind]}")
        raise Refused(
            f"method.units=[{kind}]: {LABELS[kind]} of this {model.config.model_type} model cannot be removed: {why}"
        )
    return names


def after_cut(model: Any, units: FoundUnits, name: str, count: int) -> None:
    """Has the units of a model that was cut be those of before, with another count of one group.

    KV groups have others of query heads then, and query heads are of other KV groups: those are forgotten.
    """
    layout, heads = layout_of(model), {"heads", QUERY_HEADS}
    others = heads - {units.groups[name].kind} if units.groups[name].kind in heads else set[str]()
    matrices = {matrix.name: matrix for of_block in layout.matrices for matrix in of_block}

    def now(group: FoundGroup) -> FoundGroup:
        is_cut = group.name == name
        sets = tuple(
            replace(
                s,
                units=s.multiple * count if is_cut else s.units,
                sides=tuple(replace(side, matrix=matrices[side.matrix.name]) for side in s.sides),
            )
            for s in group.sets
        )
        return replace(group, count=count if is_cut else group.count, sets=sets)

    groups = {of: now(group) for of, group in units.groups.items() if group.kind not in others}
    model.__dict__[_KEPT] = FoundUnits(groups, units.why_not)
