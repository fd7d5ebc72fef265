"""A loaded model with its parts named: blocks, Linears and units, wherever they are known from.

Of a described family they stand in models/families.py; of any other type they are found by running it (models/found.py,
models/found_units.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prune_lab.errors import Refused
from prune_lab.models.families import FAMILIES, HEADS_OF_RUN, QUERY_HEADS, Family, Slot, family_of, unit_kind

if TYPE_CHECKING:  # checking a configuration asks for the family alone, and has no torch
    from torch import Tensor, nn

    from prune_lab.dense_cache import DenseCache
    from prune_lab.models.found import Layout

# Kinds of units, as method.units names them, and what a person calls several of a kind.
LABELS = {"mlp": "MLP channels", "heads": "KV groups", QUERY_HEADS: "query heads of a KV group"}
ACTIVE = "active_experts"  # experts that a token goes to, which no tensor counts (active_experts.py)
HIDDEN = "hidden"  # channels of the states, which no block has for itself (hidden.py)
ALIGNED = 8  # channels of an expert: 16 bytes of bfloat16, at multiples of which rows of grouped products begin
MANY = 64  # counts that are tried one by one
MANY_SIZES = 1024  # of the hidden size, of which but the config is asked


def out_in(module: nn.Module, tensor: Tensor) -> Tensor:
    """A view of a weight, or of its mask, as (out, in); and back, since GPT-2's Conv1D stores (in, out)."""
    from transformers.pytorch_utils import Conv1D

    return tensor.T if isinstance(module, Conv1D) else tensor


@dataclass(frozen=True)
class UnitLinear:
    """One Linear of a block's units: each unit is `width` consecutive rows or columns in each of its runs.

    others: rows or columns behind the runs that belong to no unit.
    """

    name: str
    linear: Any  # an nn.Linear, or GPT-2's Conv1D
    side: str
    widths: tuple[int, ...]  # of a unit in each run
    others: int = 0

    @property
    def weight(self) -> Tensor:
        """The weight as a view of shape (out, in)."""
        return out_in(self.linear, self.linear.weight)

    def lines(self, units: Tensor) -> Tensor:
        """Widens one value for each unit to one for each row or column; 1, or True, for those of no unit."""
        import torch

        of_units = [units.repeat_interleave(width) for width in self.widths]
        return torch.cat([*of_units, units.new_ones(self.others)]).to(self.linear.weight.device)


@dataclass(frozen=True)
class UnitSet:
    """Units of a block that one Linear reads, which comes last in `parts`.

    units: their number. multiple: how many of them there are for one that the config counts. groups: number of equal
    groups that they come in, one behind the other, each of which loses the same number.
    """

    block: int
    parts: list[UnitLinear]
    units: int
    multiple: int = 1
    groups: int = 1


class Anatomy:
    """A loaded causal language model with its parts named: the view of it that pruning works on.

    dense: results about the model that it was copied from.
    """

    def __init__(self, model: Any, dense: DenseCache | None = None) -> None:
        self.model, self._dense = model, dense
        self.look()

    def look(self) -> None:
        """Takes config and layout from the model, again after it was rebuilt."""
        model = self.model
        self.config = model.config
        self.found = None if model.config.model_type in FAMILIES else _layout_of(model)
        self.family = family_of(model.config.model_type) if self.found is None else Family(self.found.blocks, {})

    @property
    def dense_cache(self) -> DenseCache | None:
        """Results about the dense model, while this one equals it and is in memory to be compared; else None."""
        if self.is_on_disk:
            return None
        return self._dense if self._dense is not None and self._dense.are_of(self.model) else None

    @property
    def blocks(self) -> list[nn.Module]:
        """The decoder blocks in order."""
        return list(self.model.get_submodule(self.family.blocks))

    @property
    def is_on_disk(self) -> bool:
        """True where the blocks' weights are on disk: then they are in memory within `at_hand` only."""
        from prune_lab.models.offload.on_disk import weights_on_disk

        return weights_on_disk(self.model) is not None

    def at_hand(self, index: int) -> AbstractContextManager[None]:
        """Context in which a block has its weights in memory; changes are written back where they are kept."""
        from prune_lab.models.offload.on_disk import at_hand

        return at_hand(self.model, f"{self.family.blocks}.{index}")

    def linears(self) -> Iterator[tuple[str, Any]]:
        """Every prunable Linear (or Conv1D) with its full name, block by block: those inside decoder blocks."""
        for of_block in self.linears_by_block():
            yield from of_block

    def linears_by_block(self) -> list[list[tuple[str, Any]]]:
        """The prunable Linears of each block, with their full names."""
        from torch import nn
        from transformers.pytorch_utils import Conv1D

        if self.found is not None:
            return [self.found.modules(self.model, index) for index in range(len(self.found.matrices))]
        return [
            [
                (f"{self.family.blocks}.{index}.{name}", module)
                for name, module in block.named_modules()
                if isinstance(module, nn.Linear | Conv1D)
            ]
            for index, block in enumerate(self.blocks)
        ]

    def unit_linears(self, kind: str) -> list[list[UnitLinear]]:
        """Linears that make up the units of a kind, for each block."""
        return [
            [
                UnitLinear(
                    f"{self.family.blocks}.{index}.{slot.linear}",
                    block.get_submodule(slot.linear),
                    slot.side,
                    tuple(self._width(run) for run in slot.runs),
                    self._others(slot),
                )
                for slot in self.family.kinds[kind].slots
            ]
            for index, block in enumerate(self.blocks)
        ]

    def unit_groups(self, kind: str) -> list[str]:
        """Names of the groups of units of a kind, each with a count of its own in the config; of a family, the kind.

        Raises Refused where there are none.
        """
        if self.found is None:
            unit_kind(self.config, kind)
            return [kind]
        from prune_lab.models.found_units import groups_of

        return groups_of(self.model, kind)

    def unit_sets(self, group: str) -> list[UnitSet]:
        """The units of a group, block by block; a block with experts has many such sets, others may have none."""
        if self.found is None:
            count, groups = self.unit_count(group), self.family.kinds[group].groups_of(self.config)
            return [
                UnitSet(index, parts, count * groups, groups, groups)
                for index, parts in enumerate(self.unit_linears(group))
            ]
        from prune_lab.models.found import matrices_of
        from prune_lab.models.found_units import units_of

        sets = units_of(self.model).groups[group].sets
        linears = dict(matrices_of(self.model, {side.matrix.name for s in sets for side in s.sides}))
        return [
            UnitSet(
                s.block,
                [UnitLinear(side.matrix.name, linears[side.matrix.name], side.side, side.widths) for side in s.sides],
                s.units,
                s.multiple,
                s.groups,
            )
            for s in sets
        ]

    def unit_count(self, kind: str) -> int:
        """Number of units of a group in each block, or of HIDDEN or ACTIVE; as built, where a config has a default.

        Of query heads the number in each KV group.

        Raises Refused where the experts of a token are not known.
        """
        if kind == HIDDEN:
            return int(self.model.get_input_embeddings().weight.shape[1])
        if kind == ACTIVE:
            from prune_lab.models.active_experts import top_k_of_model

            return top_k_of_model(self.model).count
        if self.found is not None:
            from prune_lab.models.found_units import units_of

            return units_of(self.model).groups[kind].count
        said = self.family.kinds[kind].count_of(self.config)
        if said is not None:
            return said
        reader = self.unit_linears(kind)[0][-1]
        return int(reader.weight.shape[1]) // sum(reader.widths)

    @property
    def head_dim(self) -> int:
        """Rows of a head in the query, key and value projections."""
        return int(getattr(self.config, "head_dim", None) or self.config.hidden_size // self.query_heads)

    @property
    def query_heads(self) -> int:
        """Number of query heads of each block."""
        return int(getattr(self.config, self.family.query_heads))

    def _width(self, run: str) -> int:
        if run == "channel":
            return 1
        heads = self.query_heads // self.unit_count("heads") if run == "query" else HEADS_OF_RUN[run]
        return heads * self.head_dim

    def _others(self, slot: Slot) -> int:
        """Rows or columns of a Linear that belong to no unit."""
        return sum(self._width(run) * self.unit_count("heads") for run in slot.others)

    def can_hold(self, group: str, count: int) -> bool:
        """True for a count of units of a group that the config, or that of a stand-in (stand_in.py), can hold."""
        if group == HIDDEN:
            from prune_lab.models import hidden

            return hidden.can_hold(self.model, count)
        if self.found is None:
            from prune_lab.models.stand_in import held

            return count in held(self.config, group, self.unit_count(group))
        from prune_lab.models.found_units import units_of
        from prune_lab.models.unit_fields import can_hold

        return can_hold(self.model, units_of(self.model).groups[group], count)

    def fits_experts(self, group: str, count: int) -> bool:
        """False where a count of MLP channels is one of experts that stock transformers does not multiply."""
        if self.found is None or group == HIDDEN:
            return True
        from prune_lab.models.found_units import units_of
        from prune_lab.models.unit_fields import fits_experts

        return fits_experts(self.model, units_of(self.model).groups[group], count)

    def possible_counts(self, group: str, near: int) -> list[int]:
        """Counts that the config can hold, up to the present one, ascending: of many, the nearest to `near`."""
        counts, span = range(1, self.unit_count(group) + 1), MANY_SIZES if group == HIDDEN else MANY
        if group != HIDDEN and (self.found is None or len(counts) <= MANY):
            return [count for count in counts if self.can_hold(group, count)]
        below, above = range(near - 1, max(0, near - span), -1), range(near + 1, min(len(counts), near + span) + 1)
        found = [next((count for count in side if self.can_hold(group, count)), None) for side in (below, above)]
        return [count for count in found if count is not None]


def _layout_of(model: Any) -> Layout:
    from prune_lab.models.found import layout_of

    return layout_of(model)


@dataclass(frozen=True)
class Scope:
    """Matrices of a model that methods of single weights prune: their number, weights, and share of the blocks'.

    left_alone: reason by full name of each other matrix inside the blocks, with its number of weights.
    """

    matrices: int
    weights: int
    share: float
    left_alone: dict[str, tuple[str, int]]


def scope_of(anatomy: Anatomy) -> Scope:
    """The scope of a model that is not post-compressed."""
    sizes = [out_in(linear, linear.weight).numel() for _, linear in anatomy.linears()]
    blocks = anatomy.model.get_submodule(anatomy.family.blocks)
    total = sum(parameter.numel() for parameter in blocks.parameters())
    reasons = anatomy.found.left_alone if anatomy.found is not None else {}
    left = {name: (reason, anatomy.model.get_parameter(name).numel()) for name, reason in reasons.items()}
    return Scope(len(sizes), sum(sizes), sum(sizes) / total, left)


def routers_of(model: Any) -> list[nn.Module]:
    """Modules that choose the experts of each token; none of most types."""
    from prune_lab.models.found import ROUTER

    reasons = found.left_alone if (found := Anatomy(model).found) is not None else {}
    names = [name for name, reason in reasons.items() if reason == ROUTER]
    return [model.get_submodule(name.rpartition(".")[0]) for name in names]


def check_one_by_one(model: Any) -> None:
    """Raises Refused for a model on disk whose blocks, called one by one, do not give what it gives as a whole."""
    from prune_lab.models.offload.on_disk import weights_on_disk

    found, weights = Anatomy(model).found, weights_on_disk(model)
    assert weights is not None, "a model on disk is checked"
    if found is not None and found.blocks != weights.list_of_blocks:
        raise Refused(
            f"model.stream=true: this {model.config.model_type} model computes text by {found.blocks}, and "
            f"{weights.list_of_blocks} is its largest list of blocks, of which one is read at a time; give "
            "model.stream=false"
        )
    if found is not None and not found.one_by_one:
        raise Refused(
            f"model.stream=true: the blocks of this {model.config.model_type} model, called one by one, do not give "
            "its states, so that each batch would read all of them; give model.stream=false"
        )


def check_matrices(model: Any) -> None:
    """Raises Refused where a block holds a matrix that is neither prunable nor named by its family as left alone.

    It would be left out of every amount without a word. Matrices are parameters of two dimensions or more.
    """
    anatomy = Anatomy(model)
    if anatomy.found is not None:  # it says what it leaves alone
        return
    prunable = {f"{name}.weight" for name, _ in anatomy.linears()}
    for index, block in enumerate(anatomy.blocks):
        for name, parameter in block.named_parameters(f"{anatomy.family.blocks}.{index}"):
            if parameter.ndim >= 2 and name not in prunable and not name.endswith(anatomy.family.left_alone):
                raise Refused(
                    f"model family {model.config.model_type!r}: {name} of shape {list(parameter.shape)} is no weight "
                    "of a Linear, so that no method would prune it: name it in `left_alone` of its entry in "
                    "prune_lab/models/families.py, if it is to stay as it is"
                )
