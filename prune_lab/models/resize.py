"""Config and module attributes after units or blocks were removed, and how many there were before."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from prune_lab.errors import Refused
from prune_lab.models.anatomy import Anatomy
from prune_lab.models.cuts import Cut
from prune_lab.models.fewer_blocks import rebuild_with_blocks
from prune_lab.models.rebuild import edited

# Kept with a model while it is pruned; in no export.
_DENSE, _NOW, _BLOCKS = "_dense_counts", "_present_counts", "_original_blocks"
_SIZES, _EXPERTS = "_dense_sizes", "_original_experts"


@dataclass(frozen=True)
class Shape:
    """Shape of a model: units of each kind in a block, which of the dense model's blocks it has, and its type.

    experts: of each block that lost experts its number, and which of the dense block's it has.
    """

    units: dict[str, int]
    blocks: list[int]
    model_type: str
    experts: list[tuple[int, list[int]]] = field(default_factory=list)


def shape_of(anatomy: Anatomy) -> Shape:
    """The present shape: units of groups that were cut, as they were noted; in a training they may not be found."""
    units = dict(sorted(anatomy.model.__dict__.get(_NOW, {}).items()))
    return Shape(units, original_blocks(anatomy), anatomy.config.model_type, sorted(original_experts(anatomy).items()))


def dense_count(anatomy: Anatomy, kind: str) -> int:
    """Number of units of a kind in each block, or of "blocks", before anything was removed."""
    counts = anatomy.model.__dict__.get(_DENSE, {})
    if kind in counts:
        return int(counts[kind])
    return len(anatomy.blocks) if kind == "blocks" else anatomy.unit_count(kind)


def original_blocks(anatomy: Anatomy) -> list[int]:
    """Indices in the dense model of the blocks that are still there, in order."""
    return list(anatomy.model.__dict__.get(_BLOCKS, range(len(anatomy.blocks))))


def original_experts(anatomy: Anatomy) -> dict[int, list[int]]:
    """By block that lost experts, the numbers in the dense block of those that are still there, in order."""
    return dict(anatomy.model.__dict__.get(_EXPERTS, {}))


def note_experts(anatomy: Anatomy, kept: dict[int, list[int]]) -> None:
    """Keeps which of its experts, by their numbers in the dense model, each block still has."""
    anatomy.model.__dict__[_EXPERTS] = kept


def note_count(anatomy: Anatomy, group: str, was: int, now: int) -> None:
    """Keeps the number of units of a group that there is now, and that there was before anything was removed."""
    anatomy.model.__dict__.setdefault(_DENSE, {}).setdefault(group, was)
    anatomy.model.__dict__.setdefault(_NOW, {})[group] = now


def dense_sizes(anatomy: Anatomy) -> list[dict[str, int]]:
    """Weights of each prunable matrix by name, for each block, before blocks were removed."""
    kept: list[dict[str, int]] | None = anatomy.model.__dict__.get(_SIZES)
    if kept is not None:
        return kept
    return [{name: linear.weight.numel() for name, linear in of_block} for of_block in anatomy.linears_by_block()]


def dense_name(anatomy: Anatomy, name: str) -> str:
    """Name in the dense model of a tensor of this one, whose blocks may have other numbers."""
    number, prefix = block_of(anatomy, name), f"{anatomy.family.blocks}."
    if number is None:
        return name
    return f"{prefix}{original_blocks(anatomy)[number]}{name.removeprefix(f'{prefix}{number}')}"


def block_of(anatomy: Anatomy, name: str) -> int | None:
    """Number of the block that a tensor or module is in by its full name; None of one that is in none."""
    prefix = f"{anatomy.family.blocks}."
    return int(name.removeprefix(prefix).partition(".")[0]) if name.startswith(prefix) else None


def config_with(anatomy: Anatomy, kind: str, count: int) -> Any:
    """The config of a described family with another count of units of a kind; raises ValueError for one it refuses."""
    units, was = anatomy.family.kinds[kind], anatomy.unit_count(kind)

    def edit(data: dict[str, Any]) -> None:
        data |= {name: getattr(anatomy, name) for name in units.written_out}
        data |= {name: count * ((data.get(name) or was) // was) for name in units.counts}

    if (made := edited(anatomy.config, edit)) is None:
        raise ValueError(f"a {anatomy.config.model_type} config cannot hold {count} units of the kind {kind}")
    return made


def check_removable(config: Any) -> None:
    """Raises Refused where a block's number is part of what it computes."""
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        raise Refused(
            "blocks cannot be removed: scale_attn_by_inverse_layer_idx=true scales attention by a block's number, "
            "which removal changes"
        )


def keep_blocks(anatomy: Anatomy, kept: list[int]) -> list[Cut]:
    """Keeps the blocks with these indices, in order, renumbered, and writes their number into the config.

    Settings with one entry for each block keep those of the blocks. Returns what lost a part outside of the blocks.
    Raises Refused where a block's number is part of what it computes.
    """
    count, original, sizes = len(anatomy.blocks), original_blocks(anatomy), dense_sizes(anatomy)
    check_removable(anatomy.config)
    parts = rebuild_with_blocks(anatomy, kept)
    kept_with = anatomy.model.__dict__
    kept_with.setdefault(_DENSE, {}).setdefault("blocks", count)
    kept_with[_SIZES] = sizes
    kept_with[_BLOCKS] = [original[index] for index in kept]
    return parts
