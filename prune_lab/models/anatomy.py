"""Architectures: where a model's blocks, Linears and units are.

FAMILIES describes some, so that they can be streamed from disk and refused before they are loaded; names are those of
`transformers`, relative to a decoder block. Of any other type that stock transformers has, blocks, matrices and units
are found by running it (models/found.py, models/found_units.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from prune_lab.errors import Refused

if TYPE_CHECKING:  # checking a configuration asks for the family alone, and has no torch
    from torch import Tensor, nn

    from prune_lab.dense_cache import DenseCache
    from prune_lab.models.found import Layout

# Kinds of units, as method.units names them, and what a person calls several of a kind.
LABELS = {"mlp": "MLP channels", "heads": "KV groups"}
ACTIVE = "active_experts"  # experts that a token goes to, which no tensor counts (active_experts.py)
HIDDEN = "hidden"  # channels of the states, which no block has for itself (hidden.py)
ALIGNED = 8  # channels of an expert: 16 bytes of bfloat16, at multiples of which rows of grouped products begin
MANY = 64  # counts that are tried one by one
MANY_SIZES = 1024  # of the hidden size, of which but the config is asked
HEADS_OF_RUN = {"kv": 1, "qkv": 3}  # a run named "query" has all query heads of a KV group


@dataclass(frozen=True)
class Slot:
    """One Linear of a unit: whether units are its rows (outputs) or columns (inputs), and the runs they come in.

    A fused Linear holds several runs, one after the other: Phi-3's qkv_proj has the query heads of all KV groups, then
    their keys, then their values. Runs of attention: "query" (the query heads of a KV group), "kv" (its one key or
    value head), "qkv" (query, key and value of one head, interleaved). Of an MLP: "channel".
    """

    linear: str
    side: str  # "rows" | "columns"
    runs: tuple[str, ...] = ("channel",)


def _any_count(config: Any, present: int) -> list[int]:
    """Every count, up to the present one."""
    return list(range(1, present + 1))


@dataclass(frozen=True)
class UnitKind:
    """A kind of unit that is removed in equal numbers from every block: its matrices, and where its count stands.

    slots: the Linears of a block that they are made of, the one that reads them (by its columns) last. counts: config
    fields that are in proportion to the count, the first one equal to it; one that is None stands for the count as
    built. written_out: config fields whose default would change with the count. possible: the counts that a config of
    this family can hold, up to the present one, ascending; limit: the reason that there are no others, with fields of
    the config in braces.
    """

    slots: tuple[Slot, ...]
    counts: tuple[str, ...]
    written_out: tuple[str, ...] = ()
    possible: Callable[[Any, int], list[int]] = _any_count
    limit: str = ""


@dataclass(frozen=True)
class Family:
    """Layout of one architecture: names of its modules, and the config fields that hold their counts.

    left_alone: matrices inside a block that are no weight of a Linear, by the end of their names, and are not pruned.
    """

    blocks: str  # the ModuleList of decoder blocks
    units: dict[str, UnitKind]
    attention_output: str = "self_attn.o_proj"  # the Linear that reads the query heads, one after the other
    query_heads: str = "num_attention_heads"
    needs_bos: bool = False  # whether it predicts nothing sensible of a text without a BOS token before it
    stored_head: str = "lm_head"  # the name that the files have for it, whatever the model's is
    left_alone: tuple[str, ...] = ()

    def stored_name(self, name: str) -> str:
        """The name that a tensor of the model has in files: save_pretrained of transformers renames some."""
        return f"{self.stored_head}.{name.removeprefix('lm_head.')}" if name.startswith("lm_head.") else name


# Numbers of KV groups that a config can hold beside the present one (seen with transformers 5.23).


def _divisors(config: Any, present: int) -> list[int]:
    """Counts for a config with a head_dim of its own whose query heads must divide hidden_size."""
    heads = config.num_attention_heads
    return [n for n in range(1, present + 1) if config.hidden_size % (n * heads // present) == 0]


def _present_alone(config: Any, present: int) -> list[int]:
    """Present count alone, for a config whose head_dim is hidden_size / heads: fewer heads would be other heads."""
    return [present]


def _by_rope_factors(config: Any, present: int) -> list[int]:
    """Counts for a config with a head_dim of its own, but lists of a factor for each pair of dimensions (longrope).

    They must be as long as hidden_size / heads says.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    lists = [rope[key] for key in ("short_factor", "long_factor") if rope.get(key) is not None]
    share = rope.get("partial_rotary_factor") or 1.0
    per_group = config.num_attention_heads // present

    def pairs(count: int) -> int:
        return int(config.hidden_size // (count * per_group) * share) // 2

    return [n for n in range(1, present + 1) if all(len(factors) == pairs(n) for factors in lists)]


def _channels(*slots: Slot, count: str = "intermediate_size") -> UnitKind:
    return UnitKind(slots, (count,))


_LLAMA_CHANNELS = _channels(
    Slot("mlp.gate_proj", "rows"), Slot("mlp.up_proj", "rows"), Slot("mlp.down_proj", "columns")
)
_LLAMA_GROUPS = UnitKind(
    (
        Slot("self_attn.q_proj", "rows", ("query",)),
        Slot("self_attn.k_proj", "rows", ("kv",)),
        Slot("self_attn.v_proj", "rows", ("kv",)),
        Slot("self_attn.o_proj", "columns", ("query",)),
    ),
    counts=("num_key_value_heads", "num_attention_heads"),
    written_out=("head_dim",),
)


def _heads(*slots: Slot) -> UnitKind:
    """KV groups of a family in which every query head has its own key and value, and fewer would be other heads."""
    limit = "the size of a head is hidden_size / heads, so that fewer heads would be other heads"
    return UnitKind(slots, ("num_attention_heads",), possible=_present_alone, limit=limit)


_LLAMA_LIKE = Family("model.layers", {"mlp": _LLAMA_CHANNELS, "heads": _LLAMA_GROUPS})
_STRICT_GROUPS = replace(
    _LLAMA_GROUPS, possible=_divisors, limit="the number of query heads must divide hidden_size={hidden_size}"
)
_LLAMA_STRICT = replace(_LLAMA_LIKE, units={"mlp": _LLAMA_CHANNELS, "heads": _STRICT_GROUPS})

FAMILIES = {
    "llama": _LLAMA_STRICT,
    "mistral": _LLAMA_LIKE,
    "qwen2": _LLAMA_LIKE,
    "qwen3": _LLAMA_LIKE,
    "gemma": replace(_LLAMA_LIKE, needs_bos=True),
    "gemma2": replace(_LLAMA_STRICT, needs_bos=True),
    "gemma3_text": replace(_LLAMA_STRICT, needs_bos=True),
    "phi3": Family(
        "model.layers",
        {
            "mlp": _channels(
                Slot("mlp.gate_up_proj", "rows", ("channel", "channel")), Slot("mlp.down_proj", "columns")
            ),
            "heads": replace(
                _LLAMA_GROUPS,
                slots=(
                    Slot("self_attn.qkv_proj", "rows", ("query", "kv", "kv")),
                    Slot("self_attn.o_proj", "columns", ("query",)),
                ),
                possible=_by_rope_factors,
                limit="its lists of rotary factors are as long as hidden_size / heads says",
            ),
        },
    ),
    "gpt2": Family(
        "transformer.h",
        {
            "mlp": _channels(Slot("mlp.c_fc", "rows"), Slot("mlp.c_proj", "columns"), count="n_inner"),
            "heads": _heads(Slot("attn.c_attn", "rows", ("kv", "kv", "kv")), Slot("attn.c_proj", "columns", ("kv",))),
        },
        attention_output="attn.c_proj",
    ),
    "opt": Family(
        "model.decoder.layers",
        {
            "mlp": _channels(Slot("fc1", "rows"), Slot("fc2", "columns"), count="ffn_dim"),
            "heads": _heads(
                *(Slot(f"self_attn.{name}_proj", "rows", ("kv",)) for name in "qkv"),
                Slot("self_attn.out_proj", "columns", ("kv",)),
            ),
        },
        attention_output="self_attn.out_proj",
    ),
    "gpt_neox": Family(
        "gpt_neox.layers",
        {
            "mlp": _channels(Slot("mlp.dense_h_to_4h", "rows"), Slot("mlp.dense_4h_to_h", "columns")),
            "heads": _heads(
                Slot("attention.query_key_value", "rows", ("qkv",)), Slot("attention.dense", "columns", ("kv",))
            ),
        },
        attention_output="attention.dense",
        stored_head="embed_out",
    ),
}


def is_known(model_type: str) -> bool:
    """True for a type that is in FAMILIES or that stock transformers has, which is imported to say so of others."""
    if model_type in FAMILIES:
        return True
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return model_type in CONFIG_MAPPING_NAMES


def check_type(model_type: str) -> None:
    """Raises Refused for a type of model that stock transformers does not have."""
    if not is_known(model_type):
        raise Refused(
            f"model family {model_type!r} (model_type in config.json) is not known: transformers {_version()} has none "
            "such. Install a newer transformers, if the model is newer; code that comes with a model is not run"
        )


def _version() -> str:
    from importlib.metadata import version

    return version("transformers")


def needs_bos(model_type: str) -> bool | None:
    """True for a type of model that needs a BOS token before its text; None where nobody has said so."""
    if model_type in FAMILIES:
        return FAMILIES[model_type].needs_bos
    return True if "gemma" in model_type else None


_CONTEXTS = ("max_position_embeddings", "max_target_positions", "n_positions", "max_seq_len")


def context_of(config: Any) -> int | None:
    """Most tokens that a model of this config sees at once; None where it does not say."""
    values = config.get_text_config().to_dict()
    return next((values[key] for key in _CONTEXTS if isinstance(values.get(key), int) and values[key] > 0), None)


def family_of(model_type: str) -> Family:
    """The family of a config's model_type; raises Refused with what to add and where."""
    if model_type not in FAMILIES:
        raise Refused(
            f"model family {model_type!r} is not described; described are {', '.join(sorted(FAMILIES))}. To add it, "
            "describe its blocks, MLP and attention Linears as one entry of FAMILIES in prune_lab/models/anatomy.py"
        )
    return FAMILIES[model_type]


def out_in(module: nn.Module, tensor: Tensor) -> Tensor:
    """A view of a weight, or of its mask, as (out, in); and back, since GPT-2's Conv1D stores (in, out)."""
    from transformers.pytorch_utils import Conv1D

    return tensor.T if isinstance(module, Conv1D) else tensor


@dataclass(frozen=True)
class UnitLinear:
    """One Linear of a block's units: each unit is `width` consecutive rows or columns in each of its runs."""

    name: str
    linear: Any  # an nn.Linear, or GPT-2's Conv1D
    side: str
    widths: tuple[int, ...]  # of a unit in each run

    @property
    def weight(self) -> Tensor:
        """The weight as a view of shape (out, in)."""
        return out_in(self.linear, self.linear.weight)

    def lines(self, units: Tensor) -> Tensor:
        """Widens one value for each unit to one for each row or column."""
        import torch

        return torch.cat([units.repeat_interleave(width) for width in self.widths]).to(self.linear.weight.device)


@dataclass(frozen=True)
class UnitSet:
    """Units of a block that one Linear reads, which comes last in `parts`.

    units: their number. multiple: how many of them there are for one that the config counts.
    """

    block: int
    parts: list[UnitLinear]
    units: int
    multiple: int = 1


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
                )
                for slot in self.family.units[kind].slots
            ]
            for index, block in enumerate(self.blocks)
        ]

    def unit_groups(self, kind: str) -> list[str]:
        """Names of the groups of units of a kind, each with a count of its own in the config; of a family, the kind.

        Raises Refused where there are none.
        """
        if self.found is None:
            return [kind]
        from prune_lab.models.found_units import groups_of

        return groups_of(self.model, kind)

    def unit_sets(self, group: str) -> list[UnitSet]:
        """The units of a group, block by block; a block with experts has many such sets, others may have none."""
        if self.found is None:
            count = self.unit_count(group)
            return [UnitSet(index, parts, count) for index, parts in enumerate(self.unit_linears(group))]
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
            )
            for s in sets
        ]

    def unit_count(self, kind: str) -> int:
        """Number of units of a group in each block, or of HIDDEN or ACTIVE; as built, where a config has a default.

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
        said = getattr(self.config, self.family.units[kind].counts[0], None)
        if said is not None:
            return int(said)
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


def unit_kind(config: Any, kind: str) -> UnitKind:
    """A kind of unit of the described family of a config; raises Refused where the family has none such."""
    units = family_of(config.model_type).units
    if kind not in units:
        raise Refused(
            f"method.units: {config.model_type} models have no units of the kind {kind!r}; they have {', '.join(units)}"
        )
    return units[kind]


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
                    "prune_lab/models/anatomy.py, if it is to stay as it is"
                )
