"""Query heads of the KV groups that were found: each group loses the same number, and its key and value stay.

The config's count of query heads says how many there are in a group. Those matrices of the group whose shapes follow it
are the query heads', which lie one behind the other in each group.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from prune_lab.models.anatomy import LABELS
from prune_lab.models.families import UNGROUPED
from prune_lab.models.rebuild import shapes, text_parts
from prune_lab.models.unit_cut import check_cut
from prune_lab.models.unit_fields import explained, shapes_with
from prune_lab.models.unit_probe import Calls
from prune_lab.models.unit_sets import FoundGroup, FoundSet, Side

_COUNTS = re.compile(r"attention_heads(_per_layer)?$|^num_heads$|^n_heads?$")  # config fields of query heads
_FUSED = "queries, keys and values are rows of one matrix"
_NO_FIELD = "no field of the config holds the number of query heads alone"
BY_SHAPE = (UNGROUPED, _FUSED, _NO_FIELD)  # reasons that no weight can hide


def query_heads(model: Any, kind: str, sets: list[FoundSet], calls: Calls) -> tuple[list[FoundGroup], str | None]:
    """Groups of query heads of sets of KV groups, and why those of some are in none."""
    if not sets:
        return [], f"no {LABELS['heads']} are found"
    left, groups, failed = list(sets), list[FoundGroup](), None
    for fields, heads in _fields(model.config):
        for count in dict.fromkeys(heads // s.units for s in left if heads % s.units == 0 and heads > s.units):
            here = [s for s in left if s.units * count == heads]
            group = _group_of(model, kind, fields, count, here)
            reason = check_cut(model, group, calls) if isinstance(group, FoundGroup) else group
            if isinstance(group, FoundGroup) and reason is None:
                groups.append(group)
                gone = {id(s.sides[-1].matrix) for s in group.sets}
                left = [s for s in left if id(s.sides[-1].matrix) not in gone]
            failed = reason or failed
    if groups:  # what is left are heads of another sort, unless something says otherwise
        return groups, failed if left and failed != _NO_FIELD else None
    return groups, failed or UNGROUPED


def _fields(config: Any) -> Iterator[tuple[tuple[tuple[int, str], ...], int]]:
    """Config fields that may count the query heads of all blocks, those of a number together or one, and the number."""
    found = dict[int, list[tuple[int, str]]]()
    for number, part in enumerate(text_parts(config.to_dict())):
        for key, value in part.items():
            values = value if isinstance(value, list) else [value]
            if _COUNTS.search(key) and values and all(type(one) is int and one == values[0] for one in values):
                found.setdefault(values[0], []).append((number, key))
    for heads, places in found.items():
        yield tuple(places), heads
        if len(places) > 1:
            yield from (((place,), heads) for place in places)


def _group_of(
    model: Any, kind: str, fields: tuple[tuple[int, str], ...], count: int, sets: list[FoundSet]
) -> FoundGroup | str:
    """The group of the query heads of some sets of KV groups, `count` in each; or the reason that there is none."""
    was, why = shapes(model, model.config), _NO_FIELD
    for writes_head_dim in (True, False):
        group = FoundGroup(kind, kind, count, fields, (), (), writes_head_dim)
        for fewer in range(count - 1, 0, -1):
            now = shapes_with(model, group, fewer)
            if was is None or now is None or was.keys() != now.keys() or was == now:
                continue
            changed = {name for name, shape in was.items() if now[name] != shape}
            inner = [found for s in sets if (found := _inner(s, count, changed)) is not None]
            if not inner:
                why = _FUSED if any(side.matrix.place.parameter in changed for s in sets for side in s.sides) else why
                continue
            chosen = explained(model, was, now, kind, inner, count, fewer)
            if not isinstance(chosen, str) and chosen[0]:
                return replace(group, sets=tuple(chosen[0]), beside=tuple(chosen[1]))
            why = chosen if isinstance(chosen, str) else why
    return why


def _inner(s: FoundSet, count: int, changed: set[str]) -> FoundSet | None:
    """The query heads of a set of KV groups, of its matrices that change with their number; None without such."""
    sides = [side for side in s.sides if side.matrix.place.parameter in changed]
    if len(sides) < 2 or sides[-1] is not s.sides[-1]:
        return None
    if any(len(side.widths) > 1 or side.widths[0] % count for side in sides):
        return None
    inner = tuple(Side(side.matrix, side.side, (side.widths[0] // count,)) for side in sides)
    return FoundSet(s.block, s.units * count, inner, s.units, s.units)
