"""The one place that knows architectures: where a model's blocks, Linears and units are.

A further family is one entry in FAMILIES. Names are those of `transformers`, relative to a decoder block.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from prune_lab.errors import Refused

if TYPE_CHECKING:  # checking a configuration asks for the family alone, and has no torch
    from torch import Tensor, nn

    from prune_lab.models.dense_facts import DenseFacts

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


@dataclass(frozen=True)
class Family:
    """Where the parts of one architecture are, and which config fields hold their counts."""

    blocks: str  # the ModuleList of decoder blocks
    mlp: tuple[Slot, ...]
    attention: tuple[Slot, ...]
    mlp_width: str = "intermediate_size"
    query_heads: str = "num_attention_heads"
    kv_heads: str | None = "num_key_value_heads"  # None: every query head has its own key and value
    # What its config can hold beside the present number of heads (seen with transformers 5.23). "any": head_dim is a
    # field of its own; "divisors": it is, but the query heads must divide hidden_size; "factors": it is, but lists of a
    # factor for each pair of a head's dimensions (longrope) must be as long as hidden_size / heads says; "present":
    # head_dim is always hidden_size / heads, so that fewer heads would be other heads.
    head_counts: str = "any"
    needs_bos: bool = False  # whether it predicts nothing sensible of a text without a BOS token before it
    stored_head: str = "lm_head"  # the name that the files have for it, whatever the model's is

    def stored_name(self, name: str) -> str:
        """The name that a tensor of the model has in files: save_pretrained of transformers renames some."""
        return f"{self.stored_head}.{name.removeprefix('lm_head.')}" if name.startswith("lm_head.") else name


_LLAMA_MLP = (Slot("mlp.gate_proj", "rows"), Slot("mlp.up_proj", "rows"), Slot("mlp.down_proj", "columns"))
_LLAMA_ATTENTION = (
    Slot("self_attn.q_proj", "rows", ("query",)),
    Slot("self_attn.k_proj", "rows", ("kv",)),
    Slot("self_attn.v_proj", "rows", ("kv",)),
    Slot("self_attn.o_proj", "columns", ("query",)),
)
_LLAMA_LIKE = Family("model.layers", _LLAMA_MLP, _LLAMA_ATTENTION)
_LLAMA_STRICT = replace(_LLAMA_LIKE, head_counts="divisors")

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
        (Slot("mlp.gate_up_proj", "rows", ("channel", "channel")), Slot("mlp.down_proj", "columns")),
        (Slot("self_attn.qkv_proj", "rows", ("query", "kv", "kv")), Slot("self_attn.o_proj", "columns", ("query",))),
        head_counts="factors",
    ),
    "gpt2": Family(
        "transformer.h",
        (Slot("mlp.c_fc", "rows"), Slot("mlp.c_proj", "columns")),
        (Slot("attn.c_attn", "rows", ("kv", "kv", "kv")), Slot("attn.c_proj", "columns", ("kv",))),
        mlp_width="n_inner",
        kv_heads=None,
        head_counts="present",
    ),
    "opt": Family(
        "model.decoder.layers",
        (Slot("fc1", "rows"), Slot("fc2", "columns")),
        (
            *(Slot(f"self_attn.{name}_proj", "rows", ("kv",)) for name in "qkv"),
            Slot("self_attn.out_proj", "columns", ("kv",)),
        ),
        mlp_width="ffn_dim",
        kv_heads=None,
        head_counts="present",
    ),
    "gpt_neox": Family(
        "gpt_neox.layers",
        (Slot("mlp.dense_h_to_4h", "rows"), Slot("mlp.dense_4h_to_h", "columns")),
        (Slot("attention.query_key_value", "rows", ("qkv",)), Slot("attention.dense", "columns", ("kv",))),
        kv_heads=None,
        head_counts="present",
        stored_head="embed_out",
    ),
}


def family_of(model_type: str) -> Family:
    """The family of a config's model_type; raises Refused with what to add and where."""
    if model_type not in FAMILIES:
        raise Refused(
            f"model family {model_type!r} is not known; known are {', '.join(sorted(FAMILIES))}. To add it, describe "
            "its blocks, MLP and attention Linears as one entry of FAMILIES in prune_lab/models/anatomy.py"
        )
    return FAMILIES[model_type]


def out_in(module: nn.Module, tensor: Tensor) -> Tensor:
    """A view of a weight, or of its mask, as (out, in); and back, since GPT-2's Conv1D stores (in, out)."""
    from torch import nn

    return tensor if isinstance(module, nn.Linear) else tensor.T


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


class Anatomy:
    """A loaded causal language model with its parts named: the view of it that pruning works on.

    dense: facts about the model that it was copied from.
    """

    def __init__(self, model: Any, dense: DenseFacts | None = None) -> None:
        self.model, self._dense = model, dense
        self.config = model.config
        self.family = family_of(model.config.model_type)

    @property
    def facts(self) -> DenseFacts | None:
        """What is known of this model: only while it is as the dense one, and in memory to be compared with it."""
        if self.is_on_disk:
            return None
        return self._dense if self._dense is not None and self._dense.are_of(self.model) else None

    @property
    def blocks(self) -> list[nn.Module]:
        """The decoder blocks in order."""
        return list(self.model.get_submodule(self.family.blocks))

    @property
    def is_on_disk(self) -> bool:
        """Whether the blocks' weights rest on disk: then they are there within `at_hand` only."""
        from prune_lab.models.on_disk import weights_on_disk

        return weights_on_disk(self.model) is not None

    def at_hand(self, index: int) -> AbstractContextManager[None]:
        """Within it a block has its weights, wherever they rest; what was changed rests there afterwards."""
        from prune_lab.models.on_disk import at_hand

        return at_hand(self.model, f"{self.family.blocks}.{index}")

    def linears(self) -> Iterator[tuple[str, Any]]:
        """Every prunable Linear (or Conv1D) with its full name, block by block: those inside decoder blocks."""
        for of_block in self.linears_by_block():
            yield from of_block

    def linears_by_block(self) -> list[list[tuple[str, Any]]]:
        """The prunable Linears of each block, with their full names."""
        from torch import nn
        from transformers.pytorch_utils import Conv1D

        return [
            [
                (f"{self.family.blocks}.{index}.{name}", module)
                for name, module in block.named_modules()
                if isinstance(module, nn.Linear | Conv1D)
            ]
            for index, block in enumerate(self.blocks)
        ]

    def unit_linears(self, kind: str) -> list[list[UnitLinear]]:
        """For each block, the Linears that make up its units of a kind: mlp (MLP channels) or heads (KV groups)."""
        slots = self.family.mlp if kind == "mlp" else self.family.attention
        return [
            [
                UnitLinear(
                    f"{self.family.blocks}.{index}.{slot.linear}",
                    block.get_submodule(slot.linear),
                    slot.side,
                    tuple(self._width(run) for run in slot.runs),
                )
                for slot in slots
            ]
            for index, block in enumerate(self.blocks)
        ]

    def unit_count(self, kind: str) -> int:
        """How many units of a kind each block has: MLP channels (mlp) or KV groups (heads)."""
        if kind == "mlp":  # as built: a config may leave its width to a default
            last = self.unit_linears("mlp")[0][-1]
            return int(last.weight.shape[1])
        return int(getattr(self.config, self.family.kv_heads or self.family.query_heads))

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

    def possible_counts(self, kind: str) -> list[int]:
        """Unit counts that the family's config can hold, up to the present one, ascending."""
        return possible_head_counts(self.config) if kind == "heads" else list(range(1, self.unit_count(kind) + 1))


def possible_head_counts(config: Any) -> list[int]:
    """Numbers of KV groups that a config of transformers can hold, up to its present one, ascending."""
    family = family_of(config.model_type)
    heads = int(getattr(config, family.query_heads))
    present = int(getattr(config, family.kv_heads or family.query_heads))
    counts = range(1, present + 1)
    if family.head_counts == "present":
        return [present]
    if family.head_counts == "divisors":
        return [n for n in counts if config.hidden_size % (n * heads // present) == 0]
    if family.head_counts == "factors":
        rope = getattr(config, "rope_parameters", None) or {}
        lists = [rope[key] for key in ("short_factor", "long_factor") if rope.get(key) is not None]
        share = rope.get("partial_rotary_factor") or 1.0
        pairs = [int(config.hidden_size // (n * heads // present) * share) // 2 for n in counts]
        return [n for n, of_n in zip(counts, pairs, strict=True) if all(len(factors) == of_n for factors in lists)]
    return list(counts)
