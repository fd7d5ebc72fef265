"""Families of models that are described: names of blocks, Linears and units, and config fields that count them.

They say what must be known before a model is run: to refuse counts and kinds of units before it is loaded, to compare
its files with its config, and which families need a BOS token before a text. Of any other type that stock transformers
has, blocks, matrices and units are found by running it (models/found.py, models/found_units.py); what is found of these
families is what stands here (tests/test_found_units.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from prune_lab.errors import Refused

QUERY_HEADS = "query_heads"  # the kind of unit of which each KV group loses the same number
UNGROUPED = "every query head has its own KV head, so that none can go without it"
HEADS_OF_RUN = {"kv": 1, "head": 1, "qkv": 3}  # a run named "query" has all query heads of a KV group


@dataclass(frozen=True)
class Slot:
    """One Linear of a unit: whether units are its rows (outputs) or columns (inputs), and the runs they come in.

    A fused Linear holds several runs, one after the other: Phi-3's qkv_proj has the query heads of all KV groups, then
    their keys, then their values. Runs of attention: "query" (the query heads of a KV group), "kv" (its one key or
    value head), "qkv" (query, key and value of one head, interleaved), "head" (one query head). Of an MLP: "channel".
    others: runs behind them that have one for each KV group and belong to no unit.
    """

    linear: str
    side: str  # "rows" | "columns"
    runs: tuple[str, ...] = ("channel",)
    others: tuple[str, ...] = ()


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
    the config in braces. groups: the config field of the number of groups that the units come in, one behind the other,
    each of which loses the same number; the count is that of one group then, to which counts are in proportion.
    """

    slots: tuple[Slot, ...]
    counts: tuple[str, ...]
    written_out: tuple[str, ...] = ()
    possible: Callable[[Any, int], list[int]] = _any_count
    limit: str = ""
    groups: str | None = None

    def groups_of(self, config: Any) -> int:
        """Number of groups that the units of a block come in."""
        if self.groups is None:
            return 1
        return int(getattr(config, self.groups, None) or getattr(config, self.counts[0]))

    def count_of(self, config: Any) -> int | None:
        """Number of units of a block, or of each group, that a config says; None where it leaves that to a default."""
        said = getattr(config, self.counts[0], None)
        return None if said is None else int(said) // self.groups_of(config)


@dataclass(frozen=True)
class Family:
    """Layout of one architecture: names of its modules, and the config fields that hold their counts.

    units: kinds of units that have no weight in common. finer: kinds of which a unit of those has several.
    left_alone: matrices inside a block that are no weight of a Linear, by the end of their names, and are not pruned.
    """

    blocks: str  # the ModuleList of decoder blocks
    units: dict[str, UnitKind]
    finer: dict[str, UnitKind] = field(default_factory=dict)
    attention_output: str = "self_attn.o_proj"  # the Linear that reads the query heads, one after the other
    query_heads: str = "num_attention_heads"
    needs_bos: bool = False  # whether it predicts nothing sensible of a text without a BOS token before it
    stored_head: str = "lm_head"  # the name that the files have for it, whatever the model's is
    left_alone: tuple[str, ...] = ()

    @property
    def kinds(self) -> dict[str, UnitKind]:
        """All kinds of units by name."""
        return self.units | self.finer

    def stored_name(self, name: str) -> str:
        """The name that a tensor of the model has in files: save_pretrained of transformers renames some."""
        return f"{self.stored_head}.{name.removeprefix('lm_head.')}" if name.startswith("lm_head.") else name


# Numbers of KV groups that a config can hold beside the present one (seen with transformers 5.23).


def _divisors(config: Any, present: int) -> list[int]:
    """Counts for a config with a head_dim of its own whose query heads must divide hidden_size.

    Of KV groups or of the query heads of each: the config's query heads are in proportion to both.
    """
    heads = config.num_attention_heads
    return [n for n in range(1, present + 1) if config.hidden_size % (n * heads // present) == 0]


def _present_alone(config: Any, present: int) -> list[int]:
    """Present count alone, for a config whose head_dim is hidden_size / heads: fewer heads would be other heads."""
    return [present]


def _by_rope_factors(config: Any, present: int) -> list[int]:
    """Counts for a config with a head_dim of its own, but lists of a factor for each pair of dimensions (longrope).

    They must be as long as hidden_size / heads says. Of KV groups or of the query heads of each.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    lists = [rope[key] for key in ("short_factor", "long_factor") if rope.get(key) is not None]
    share = rope.get("partial_rotary_factor") or 1.0
    per_unit = config.num_attention_heads // present

    def pairs(count: int) -> int:
        return int(config.hidden_size // (count * per_unit) * share) // 2

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


_LLAMA_QUERY_HEADS = UnitKind(
    (Slot("self_attn.q_proj", "rows", ("head",)), Slot("self_attn.o_proj", "columns", ("head",))),
    counts=("num_attention_heads",),
    written_out=("head_dim",),
    groups="num_key_value_heads",
)


def _heads(*slots: Slot) -> UnitKind:
    """KV groups of a family in which every query head has its own key and value, and fewer would be other heads."""
    limit = "the size of a head is hidden_size / heads, so that fewer heads would be other heads"
    return UnitKind(slots, ("num_attention_heads",), possible=_present_alone, limit=limit)


_LLAMA_LIKE = Family(
    "model.layers", {"mlp": _LLAMA_CHANNELS, "heads": _LLAMA_GROUPS}, {QUERY_HEADS: _LLAMA_QUERY_HEADS}
)
_STRICT: dict[str, Any] = {
    "possible": _divisors, "limit": "the number of query heads must divide hidden_size={hidden_size}"
}  # fmt: skip
_LLAMA_STRICT = replace(
    _LLAMA_LIKE,
    units={"mlp": _LLAMA_CHANNELS, "heads": replace(_LLAMA_GROUPS, **_STRICT)},
    finer={QUERY_HEADS: replace(_LLAMA_QUERY_HEADS, **_STRICT)},
)
_BY_ROPE: dict[str, Any] = {
    "possible": _by_rope_factors, "limit": "its lists of rotary factors are as long as hidden_size / heads says"
}  # fmt: skip

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
                **_BY_ROPE,
            ),
        },
        {
            QUERY_HEADS: replace(
                _LLAMA_QUERY_HEADS,
                slots=(
                    Slot("self_attn.qkv_proj", "rows", ("head",), others=("kv", "kv")),
                    Slot("self_attn.o_proj", "columns", ("head",)),
                ),
                **_BY_ROPE,
            )
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
            "describe its blocks, MLP and attention Linears as one entry of FAMILIES in prune_lab/models/families.py"
        )
    return FAMILIES[model_type]


def unit_kind(config: Any, kind: str) -> UnitKind:
    """A kind of unit of the described family of a config; raises Refused where the family has none such."""
    family = family_of(config.model_type)
    if kind == QUERY_HEADS and kind not in family.kinds:
        raise Refused(f"method.units=[{kind}]: in {config.model_type} models {UNGROUPED}; give one of {_names(family)}")
    if kind not in family.kinds:
        raise Refused(
            f"method.units: {config.model_type} models have no units of the kind {kind!r}; they have "
            f"{', '.join(family.kinds)}"
        )
    return family.kinds[kind]


def check_grouped(config: Any, kind: str, count: int | None) -> None:
    """Raises Refused where `count` units of a kind are the single query head of each KV group of a described family."""
    if kind == QUERY_HEADS and count == 1:
        raise Refused(
            f"method.units=[{QUERY_HEADS}]: in this {config.model_type} model {UNGROUPED}; give one of "
            f"{_names(family_of(config.model_type))}"
        )


def _names(family: Family) -> str:
    return ", ".join(f"method.units=[{kind}]" for kind in family.units)
