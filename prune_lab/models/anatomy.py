"""The one place that knows architectures: where a model's blocks, Linears and units are.

A further family is one entry in FAMILIES. Names are those of `transformers`, relative to a decoder block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from prune_lab.errors import Refused


@dataclass(frozen=True)
class Slot:
    """One Linear of a unit, and whether the unit is a run of its rows (outputs) or columns (inputs)."""

    linear: str
    side: str  # "rows" | "columns"
    heads: str = "kv"  # attention only: a KV group owns one head here ("kv") or all its query heads ("query")


@dataclass(frozen=True)
class Family:
    """Where the parts of one architecture are, and which config fields hold their counts."""

    blocks: str  # the ModuleList of decoder blocks
    mlp: tuple[Slot, ...]  # a channel is one row or column of each
    attention: tuple[Slot, ...]  # a KV group is head_dim rows or columns for each of its heads
    mlp_width: str = "intermediate_size"
    query_heads: str = "num_attention_heads"
    kv_heads: str = "num_key_value_heads"
    # The family's config refuses a hidden_size that the number of query heads does not divide, even where
    # head_dim is set (seen with transformers 5.23).
    heads_divide_hidden: bool = False


_LLAMA_MLP = (Slot("mlp.gate_proj", "rows"), Slot("mlp.up_proj", "rows"), Slot("mlp.down_proj", "columns"))
_LLAMA_ATTENTION = (
    Slot("self_attn.q_proj", "rows", heads="query"),
    Slot("self_attn.k_proj", "rows"),
    Slot("self_attn.v_proj", "rows"),
    Slot("self_attn.o_proj", "columns", heads="query"),
)

FAMILIES = {
    "llama": Family("model.layers", _LLAMA_MLP, _LLAMA_ATTENTION, heads_divide_hidden=True),
    "mistral": Family("model.layers", _LLAMA_MLP, _LLAMA_ATTENTION),
    "qwen2": Family("model.layers", _LLAMA_MLP, _LLAMA_ATTENTION),
    "qwen3": Family("model.layers", _LLAMA_MLP, _LLAMA_ATTENTION),
}


def family_of(model_type: str) -> Family:
    """The family of a config's model_type; raises Refused with what to add and where."""
    if model_type not in FAMILIES:
        raise Refused(
            f"model family {model_type!r} is not known; known are {', '.join(sorted(FAMILIES))}. To add it, describe "
            "its blocks, MLP and attention Linears as one entry of FAMILIES in prune_lab/models/anatomy.py"
        )
    return FAMILIES[model_type]


@dataclass(frozen=True)
class UnitLinear:
    """One Linear of a block's units: each unit is `width` consecutive rows or columns of it."""

    name: str
    linear: nn.Linear
    side: str
    width: int

    def lines(self, units: Tensor) -> Tensor:
        """Widens one bool for each unit to one for each row or column."""
        return units.repeat_interleave(self.width).to(self.linear.weight.device)


class Anatomy:
    """A loaded causal language model with its parts named: the view of it that pruning works on."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.config = model.config
        self.family = family_of(model.config.model_type)

    @property
    def blocks(self) -> list[nn.Module]:
        """The decoder blocks in order."""
        return list(self.model.get_submodule(self.family.blocks))

    def linears(self) -> Iterator[tuple[str, nn.Linear]]:
        """Every prunable Linear with its full name, block by block: those inside decoder blocks, no others."""
        for index, block in enumerate(self.blocks):
            for name, module in block.named_modules():
                if isinstance(module, nn.Linear):
                    yield f"{self.family.blocks}.{index}.{name}", module

    def unit_linears(self, kind: str) -> list[list[UnitLinear]]:
        """For each block, the Linears that make up its units of a kind: mlp (MLP channels) or heads (KV groups)."""
        slots = self.family.mlp if kind == "mlp" else self.family.attention
        return [
            [
                UnitLinear(f"{self.family.blocks}.{index}.{slot.linear}", _linear(block, slot), slot.side, width)
                for slot, width in ((slot, self._width(kind, slot)) for slot in slots)
            ]
            for index, block in enumerate(self.blocks)
        ]

    def unit_count(self, kind: str) -> int:
        """How many units of a kind each block has: MLP channels (mlp) or KV groups (heads)."""
        return int(getattr(self.config, self.family.mlp_width if kind == "mlp" else self.family.kv_heads))

    @property
    def head_dim(self) -> int:
        """Rows of a head in the query, key and value projections."""
        return int(getattr(self.config, "head_dim", None) or self.config.hidden_size // self.query_heads)

    @property
    def query_heads(self) -> int:
        """Number of query heads of each block."""
        return int(getattr(self.config, self.family.query_heads))

    def _width(self, kind: str, slot: Slot) -> int:
        if kind == "mlp":
            return 1
        heads = self.query_heads // self.unit_count("heads") if slot.heads == "query" else 1
        return heads * self.head_dim

    def possible_counts(self, kind: str) -> list[int]:
        """Unit counts that the family's config can hold, up to the present one, ascending."""
        present = self.unit_count(kind)
        counts = range(1, present + 1)
        if kind == "mlp" or not self.family.heads_divide_hidden:
            return list(counts)
        per_group = self.query_heads // present
        return [n for n in counts if self.config.hidden_size % (n * per_group) == 0]

    def set_unit_count(self, kind: str, count: int) -> None:
        """Writes a new unit count into the config, so that stock transformers builds the smaller model."""
        if kind == "mlp":
            setattr(self.config, self.family.mlp_width, count)
            return
        per_group, head_dim = self.query_heads // self.unit_count("heads"), self.head_dim
        self.config.head_dim = head_dim
        setattr(self.config, self.family.query_heads, count * per_group)
        setattr(self.config, self.family.kv_heads, count)


def _linear(block: nn.Module, slot: Slot) -> nn.Linear:
    found = block.get_submodule(slot.linear)
    if not isinstance(found, nn.Linear):
        raise Refused(f"{slot.linear} is a {type(found).__name__}, not a Linear: this model cannot be cut")
    return found
