"""Config fields that count units, found by changing them: whose shapes follow is one group, and is cut together."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from prune_lab.models.anatomy import ALIGNED, LABELS
from prune_lab.models.products import experts_of
from prune_lab.models.rebuild import edited, shapes, text_parts
from prune_lab.models.unit_sets import Beside, FoundGroup, FoundSet, Side, dimension

Shapes = dict[str, tuple[int, ...]]
_MOST_EDITS = 64  # of a config, until its fields for a width are given up
_NOT_OF_CHANNELS = re.compile(
    r"head|vocab|layer|position|token|window|^hidden_size|experts|rank"
)  # a bottleneck is no MLP
_PROPORTIONS = re.compile(r"ratio|mult")  # of the hidden size
_UNSAID = re.compile(r"inner|intermediate|ffn")  # widths that may be None


def _may_count(kind: str, key: str) -> bool:
    """True for a config field that may count units of a kind, by its name."""
    if kind == "heads":
        return "head" in key and "dim" not in key
    return _NOT_OF_CHANNELS.search(key) is None


def _places(config: Any, kind: str, sets: list[FoundSet]) -> Iterator[tuple[tuple[int, str], int]]:
    """Config fields that may hold the number of units of some sets, each with that number."""
    counts = sorted({s.units for s in sets})
    for number, part in enumerate(text_parts(config.to_dict())):
        hidden = next((part[key] for key in ("hidden_size", "d_model", "n_embd") if isinstance(part.get(key), int)), 0)
        for key, value in part.items():
            if not _may_count(kind, key):
                continue
            if value is None and _UNSAID.search(key):  # GPT-2's n_inner: left to a default
                yield from (((number, key), count) for count in counts)
                continue
            values = value if isinstance(value, list) else [value]
            if not values or any(one != values[0] for one in values) or not isinstance(values[0], int | float):
                continue
            value = values[0]
            for count in counts:
                of_field = value * hidden if kind == "mlp" and _PROPORTIONS.search(key) else value
                if of_field > 0 and (of_field % count == 0 if kind == "heads" else of_field in (count, 2 * count)):
                    yield (number, key), count


def choices(config: Any, kind: str, sets: list[FoundSet]) -> Iterator[tuple[tuple[tuple[int, str], ...], int]]:
    """Choices of config fields that may count the units of some sets together, each with the count; likely ones first.

    An attention's heads stand in two fields as a rule, a width in one.
    """
    by_count = dict[int, list[tuple[int, str]]]()
    for field, count in dict.fromkeys(_places(config, kind, sets)):
        by_count.setdefault(count, []).append(field)
    found = list[tuple[tuple[tuple[int, str], ...], int]]()
    for count, fields in by_count.items():
        sizes = (2, 1, 3, len(fields)) if kind == "heads" else (1, 2, 3, len(fields))
        of_count = [(chosen, count) for size in sizes for chosen in itertools.combinations(fields, size)]
        found += list(dict.fromkeys(of_count))[:_MOST_EDITS]
    yield from found


def shapes_with(model: Any, group: FoundGroup, count: int) -> Shapes | None:
    """Shapes of the tensors of a model with another count of a group; None where it cannot be built."""
    config = config_of(model, group, count)
    return None if config is None else shapes(model, config)


def group_of(
    model: Any, kind: str, fields: tuple[tuple[int, str], ...], count: int, sets: list[FoundSet], was: Shapes
) -> FoundGroup | str | None:
    """The group of those sets whose shapes follow these fields; None where none does, or a reason.

    was: shapes of the model's tensors. Where a config says no size of a head, it must say it when there are fewer.
    """
    why: str | None = None
    for writes_head_dim in (True, False) if kind == "heads" else (False,):
        group = FoundGroup(kind, kind, count, fields, (), (), writes_head_dim)
        for fewer in dict.fromkeys((count // 2, count - 1, 3 * count // 4, count // 4)):
            if not 0 < fewer < count:
                continue
            now = shapes_with(model, group, fewer)
            if now is None or now == was:
                continue
            found = explained(model, was, now, kind, sets, count, fewer)
            if isinstance(found, str):
                why = why or found
            elif found[0]:
                chosen, beside = found
                multiples = tuple(replace(s, multiple=s.units // count) for s in chosen)
                return replace(group, sets=multiples, beside=tuple(beside))
    return why


def config_of(model: Any, group: FoundGroup, count: int) -> Any | None:
    """The model's config with another count of a group; None where it cannot hold that."""
    fits = True

    def scaled(value: Any) -> Any:
        nonlocal fits
        if isinstance(value, list):
            return [scaled(one) for one in value]
        if value is None:
            return count
        if isinstance(value, int):
            fits = fits and value * count % group.count == 0
            return value * count // group.count
        return value * count / group.count

    def edit(data: dict[str, Any]) -> None:
        parts = text_parts(data)
        if group.writes_head_dim:
            write_head_dim_out(parts)
        for number, key in group.fields:
            parts[number][key] = scaled(parts[number][key])

    made = edited(model.config, edit)
    return made if fits else None


def write_head_dim_out(parts: list[dict[str, Any]]) -> None:
    """Has the parts of a config say the size of a head, which the number of heads would be the default for."""
    for part in parts:
        hidden, heads = part.get("hidden_size"), part.get("num_attention_heads")
        if isinstance(hidden, int) and isinstance(heads, int) and heads and part.get("head_dim") is None:
            part["head_dim"] = hidden // heads


def can_hold(model: Any, group: FoundGroup, count: int) -> bool:
    """True where a model of stock transformers can have this count of a group, and nothing else differs."""
    if count == group.count:
        return True
    if not fits_experts(model, group, count):
        return False
    was, now = shapes(model, model.config), shapes_with(model, group, count) if count > 0 else None
    if was is None or now is None:
        return False
    found = explained(model, was, now, group.kind, list(group.sets), group.count, count)
    return not isinstance(found, str) and len(found[0]) == len(group.sets)


def fits_experts(model: Any, group: FoundGroup, count: int) -> bool:
    """False for a width of experts that the grouped products of PyTorch, transformers' default, do not take.

    Their rows begin at multiples of 16 bytes: 8 numbers of 2 bytes, in which mixtures are used and trained.
    """
    fused = [s for s in group.sets if not s.sides[-1].matrix.is_linear]
    if not fused or experts_of(model) in (None, "eager") or group.kind != "mlp":
        return True
    widths = {s.units // group.count for s in fused}
    return all(width * group.count % ALIGNED or width * count % ALIGNED == 0 for width in widths)


def explained(
    model: Any, was: Shapes, now: Shapes, kind: str, sets: list[FoundSet], count: int, fewer: int
) -> tuple[list[FoundSet], list[Beside]] | str:
    """The sets that are smaller in `now`, and what goes with them; or a tensor whose change no set explains."""
    if was.keys() != now.keys():
        return f"another number of {LABELS[kind]} would be another set of tensors"
    changed = {name for name, shape in was.items() if now[name] != shape}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    chosen = [s for s in sets if s.sides[-1].matrix.place.parameter in changed]
    explained = dict[tuple[str, int], set[int]]()  # dimension of a tensor: sizes that it should have
    for s in chosen:
        for side in s.sides:
            name = side.matrix.place.parameter
            dim = dimension(parameters[name], side)
            size = was[name][dim] * fewer
            explained.setdefault((name, dim), set()).add(size // count if size % count == 0 else -1)
    for (name, dim), sizes in explained.items():
        if sizes != {now[name][dim]}:
            return f"with other fields of the config {name} would not follow"
    beside = list[Beside]()
    for name in sorted(changed):
        for dim, (old, new) in enumerate(zip(was[name], now[name], strict=True)):
            if old == new or (name, dim) in explained:
                continue
            found = _goes_with(name, dim, was[name], chosen)
            if found is None or new * count != old * fewer:
                return f"{name} would change, too, and it is not known how it belongs to the {LABELS[kind]}"
            beside.append(found)
    return chosen, beside


def _common(one: str, other: str) -> int:
    """Number of characters with which both begin."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _goes_with(name: str, dim: int, shape: tuple[int, ...], sets: list[FoundSet]) -> Beside | None:
    """The units along a dimension of a tensor beside their matrices: as those of the nearest one, or of each expert."""
    nearest: tuple[tuple[int, bool], int, Side] | None = None
    for index, s in enumerate(sets):
        for side in s.sides:
            near = _common(name, side.matrix.place.parameter)
            if shape[dim] % s.units == 0 and (nearest is None or (near, shape[dim] == side.lines) > nearest[0]):
                nearest = (near, shape[dim] == side.lines), index, side
    if nearest is None:
        return None
    (_, is_alike), index, side = nearest
    widths = side.widths if is_alike else (shape[dim] // sets[index].units,)
    parameter = side.matrix.place.parameter
    alike = [
        number for number, s in enumerate(sets) if any(other.matrix.place.parameter == parameter for other in s.sides)
    ]  # fmt: skip
    if len(alike) == 1:
        return Beside(name, dim, (alike[0],), widths)
    return Beside(name, dim, tuple(alike), widths) if dim > 0 and shape[0] == len(alike) else None
