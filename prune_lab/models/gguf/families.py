"""Families that llama.cpp loads, what it computes of each, and the metadata that it reads (checked without PyTorch).

A setting that llama.cpp does not have, or computes in one way only, is refused here: its own converter leaves several
of them out without a word. The facts are those of src/models/*.cpp and conversion/*.py of llama.cpp (the release of
llama-cpp-python 0.3.36).
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from prune_lab.errors import Refused
from prune_lab.models.families import QUERY_HEADS

if TYPE_CHECKING:
    from gguf import GGUFWriter

_PLAIN_ROPES = ("default", "linear", "yarn")


@dataclass(frozen=True)
class Architecture:
    """An architecture that llama.cpp has, for a family of transformers.

    name: in general.architecture. ropes: kinds of rotary scaling. fixed: fields of a config and the one value that
    they may have. in_pairs: rows of queries and keys are stored in the order of rotary pairs. norms_plus_one: norms are
    stored with the 1 that the model adds to them. square: heads x head_dim must be hidden_size. ungrouped: there must
    be as many KV heads as heads. own_head: the file has a head also where it is tied; tied_only: it never has one.
    alternates: every so many blocks one sees all tokens. read_again: transformers reads its files, so that the logits
    can be compared.
    """

    name: str
    ropes: tuple[str, ...] = _PLAIN_ROPES
    fixed: dict[str, Any] = field(default_factory=dict)
    in_pairs: bool = False
    norms_plus_one: bool = False
    square: bool = False
    ungrouped: bool = False
    own_head: bool = False
    tied_only: bool = False
    alternates: int = 0
    read_again: bool = False


_SILU = {"hidden_act": "silu"}
_NO_BIAS = {"attention_bias": False}
_TANH = _NO_BIAS | {"hidden_activation": "gelu_pytorch_tanh", "use_bidirectional_attention": False}
_LLAMA = Architecture("llama", (*_PLAIN_ROPES, "llama3"), _SILU, in_pairs=True, read_again=True)
_QWEN3 = Architecture("qwen3", fixed=_SILU | _NO_BIAS, read_again=True)
_GEMMA2 = Architecture(
    "gemma2", ("default",), _TANH, norms_plus_one=True, tied_only=True, alternates=2, read_again=True
)
ARCHITECTURES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": replace(_LLAMA, read_again=False),
    "qwen2": Architecture("qwen2", fixed=_SILU, square=True, read_again=True),
    "qwen3": _QWEN3,
    "qwen3_moe": replace(
        _QWEN3,
        name="qwen3moe",
        fixed=_QWEN3.fixed | {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
    ),
    "gemma": Architecture(
        "gemma",
        ("default",),
        _NO_BIAS | {"hidden_act": "gelu_pytorch_tanh", "use_bidirectional_attention": False},
        norms_plus_one=True,
        tied_only=True,
    ),
    "gemma2": _GEMMA2,
    "gemma3_text": replace(
        _GEMMA2,
        name="gemma3",
        ropes=("default", "linear"),
        fixed=_TANH | {"attn_logit_softcapping": None},
        tied_only=False,
        alternates=6,
    ),
    "phi3": Architecture("phi3", ("default", "longrope"), _SILU, square=True, read_again=True),
    "olmoe": Architecture(
        "olmoe",
        ("default",),
        _SILU | _NO_BIAS | {"norm_topk_prob": False, "clip_qkv": None},
        square=True,
        ungrouped=True,
        own_head=True,
    ),
}
# Fields of a rotary scaling that are written, or that the others follow from.
_ROPE_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow"),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "longrope": ("factor", "original_max_position_embeddings", "short_factor", "long_factor"),
}


def head_dim(config: Any) -> int:
    """Size of an attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def is_square(config: Any) -> bool:
    """True where all heads together are as wide as the states."""
    return head_dim(config) * int(config.num_attention_heads) == config.hidden_size


def architecture_of(config: Any) -> Architecture:
    """The architecture for a config's family; raises Refused where it has none, or none that is written here.

    A Qwen2 whose heads are not as wide as its states is a Llama with biases there: its own loader wants them as wide.
    """
    found = ARCHITECTURES.get(config.model_type)
    if found is None:
        raise Refused(
            f"export=gguf does not write models of the type {config.model_type!r}; it writes "
            f"{', '.join(sorted(ARCHITECTURES))}. Give export=hf, and convert its folder with llama.cpp's "
            "convert_hf_to_gguf.py if that has the type"
        )
    return _LLAMA if config.model_type == "qwen2" and not is_square(config) else found


def rope_of(config: Any) -> dict[str, Any]:
    """Rotary positions of a config, those of the blocks that see all tokens."""
    rope = getattr(config, "rope_parameters", None) or {}
    found: dict[str, Any] = rope.get("full_attention", rope)
    return found


def _kind(rope: dict[str, Any]) -> str:
    return str(rope.get("rope_type", rope.get("type")) or "default")


def local_rope_of(config: Any) -> dict[str, Any] | None:
    """Rotary positions of the blocks that see a window, where they have their own."""
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    return rope.get("sliding_attention")


def check_config(config: Any, cuts: Collection[str] = ()) -> None:
    """Raises Refused where llama.cpp would not load a model of this config, or compute something else.

    cuts: kinds of units that will be removed from it (heads, query_heads, hidden, blocks), which change what else must
    fit.
    """
    architecture = architecture_of(config)
    family, widths = config.model_type, {"heads", QUERY_HEADS, "hidden"}
    for key, value in architecture.fixed.items():
        if (present := getattr(config, key, value)) != value and (present or value):
            raise _refused(family, key, present, value)
    if architecture.tied_only and not config.tie_word_embeddings:
        raise _refused(family, "tie_word_embeddings", False, True)
    if family == "gemma2":
        for key in ("attn_logit_softcapping", "final_logit_softcapping"):
            if getattr(config, key) is None:
                raise _refused(family, key, None, "a number")
    if (scalar := getattr(config, "query_pre_attn_scalar", None)) is not None:
        if scalar != (expected := _attention_scalar(config)):
            raise _refused(family, "query_pre_attn_scalar", scalar, expected)
        if _is_27b(config) and (widths | {"blocks"}) & {*cuts} and scalar != head_dim(config):
            raise Refused(
                f"export=gguf: llama.cpp knows this {family} model by its number of blocks, and computes "
                f"query_pre_attn_scalar={scalar} from its sizes, which method.units or method=depth would change; give "
                "method.units=[mlp], or export=hf"
            )
    if architecture.square and (not is_square(config) or (widths & {*cuts} and family != "qwen2")):
        raise Refused(
            f"export=gguf: llama.cpp loads models of the type {family} whose heads are as wide as the states (heads x "
            f"head_dim = hidden_size) alone, {'which these are not' if not is_square(config) else 'which would change'}"
            "; give method.units=[mlp], or export=hf"
        )
    if architecture.ungrouped and config.num_key_value_heads != config.num_attention_heads:
        raise _refused(family, "num_key_value_heads", config.num_key_value_heads, config.num_attention_heads)
    _check_rope(config, architecture)


def _refused(family: str, key: str, present: Any, allowed: Any) -> Refused:
    return Refused(
        f"export=gguf: the model has {key}={present}, and llama.cpp computes models of the type {family} with "
        f"{key}={allowed} alone; give export=hf"
    )


def _attention_scalar(config: Any) -> int:
    """Number whose root llama.cpp divides the scores of attention of Gemma 2 and 3 by: by the number of blocks."""
    return int(config.hidden_size // config.num_attention_heads) if _is_27b(config) else head_dim(config)


def _is_27b(config: Any) -> bool:
    return bool(config.num_hidden_layers == {"gemma2": 46, "gemma3_text": 62}.get(config.model_type))


def _check_rope(config: Any, architecture: Architecture) -> None:
    rope, family = rope_of(config), config.model_type
    if (kind := _kind(rope)) not in architecture.ropes:
        raise Refused(
            f"export=gguf: the model has rope_parameters.rope_type={kind!r}, and what is written of the type {family} "
            f"is one of {', '.join(architecture.ropes)}; give export=hf"
        )
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *_ROPE_FIELDS[kind]}
    for key, value in rope.items():
        if value is not None and key not in known and key != "attention_factor":
            raise _refused(family, f"rope_parameters.{key}", value, None)
    share = rope.get("partial_rotary_factor") or 1.0
    if share != 1.0 and architecture.name != "phi3":
        raise _refused(family, "rope_parameters.partial_rotary_factor", share, 1.0)
    stated, computed = rope.get("attention_factor"), attention_factor(config)
    if stated is not None and not math.isclose(stated, computed, rel_tol=1e-6):
        raise _refused(family, "rope_parameters.attention_factor", stated, round(computed, 6))
    local = local_rope_of(config)
    if local is not None and _kind(local) != "default":
        raise _refused(family, "rope_parameters.sliding_attention.rope_type", _kind(local), "default")


def original_context(config: Any) -> int:
    """Tokens that a model saw before its rotary positions were scaled."""
    rope = rope_of(config)
    stated = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    return int(stated or config.max_position_embeddings)


def attention_factor(config: Any) -> float:
    """Factor of the rotated queries and keys that llama.cpp computes (yarn) or reads (longrope)."""
    kind, rope = _kind(rope_of(config)), rope_of(config)
    if kind == "yarn":
        return 0.1 * math.log(rope["factor"]) + 1.0
    original = original_context(config)
    scale = config.max_position_embeddings / original
    return math.sqrt(1 + math.log(scale) / math.log(original)) if kind == "longrope" and scale > 1 else 1.0


def constants(config: Any) -> dict[str, list[float]]:
    """Tensors that no weight is behind, by name: factors that the rotary frequencies are divided by."""
    rope = rope_of(config)
    if _kind(rope) == "longrope":
        return {f"rope_factors_{which}.weight": list(rope[f"{which}_factor"]) for which in ("long", "short")}
    if _kind(rope) != "llama3":
        return {}
    low, high, factor = (rope[key] for key in ("low_freq_factor", "high_freq_factor", "factor"))
    found, size = list[float](), head_dim(config)
    for pair in range(0, size, 2):
        turns = original_context(config) / (2 * math.pi * rope["rope_theta"] ** (pair / size))
        share = min(max((turns - low) / (high - low), 0.0), 1.0)  # 0: as slow as scaled, 1: as fast as before
        found.append(1 / ((1 - share) / factor + share))
    return {"rope_freqs.weight": found}


def add_parameters(writer: GGUFWriter, config: Any) -> None:
    """Adds the metadata of a config to a file that is not written yet."""
    architecture, rope, size = architecture_of(config), rope_of(config), head_dim(config)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope["rope_theta"])
    if architecture.name != "phi3" and getattr(config, "head_dim", None) is not None:
        writer.add_key_length(size)
        writer.add_value_length(size)
    if architecture.name == "llama":
        writer.add_vocab_size(config.vocab_size)
        writer.add_rope_dimension_count(size)
    if architecture.name == "phi3":
        writer.add_rope_dimension_count(int(size * (rope.get("partial_rotary_factor") or 1.0)))
    _add_scaling(writer, config)
    _add_windows(writer, config, architecture)
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    if experts is not None:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if (width := getattr(config, "moe_intermediate_size", None)) is not None:
        writer.add_expert_feed_forward_length(width)
    if (cap := getattr(config, "attn_logit_softcapping", None)) is not None:
        writer.add_attn_logit_softcapping(cap)
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
        writer.add_final_logit_softcapping(cap)


def _add_scaling(writer: GGUFWriter, config: Any) -> None:
    from gguf import RopeScalingType

    rope = rope_of(config)
    kind = _kind(rope)
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(original_context(config))
        for key, add in (
            ("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
            ("beta_slow", writer.add_rope_scaling_yarn_beta_slow),
        ):
            if rope.get(key) is not None:
                add(rope[key])
    if config.model_type == "phi3":
        writer.add_rope_scaling_orig_ctx_len(original_context(config))
        if kind == "longrope":
            writer.add_rope_scaling_attn_factors(attention_factor(config))


def _add_windows(writer: GGUFWriter, config: Any, architecture: Architecture) -> None:
    """Window of the blocks that see one, and which those are where it is not every block but the last of so many."""
    if architecture.name == "phi3":
        writer.add_sliding_window(config.sliding_window or 0)  # its loader reads 0 as none
    if not architecture.alternates:
        return
    writer.add_sliding_window(config.sliding_window or config.max_position_embeddings)
    if (local := local_rope_of(config)) is not None:
        writer.add_rope_freq_base_swa(local["rope_theta"])
    in_window = [kind == "sliding_attention" for kind in config.layer_types]
    if in_window != [(block + 1) % architecture.alternates != 0 for block in range(len(in_window))]:
        writer.add_sliding_window_pattern(in_window)


def notes_of(config: Any) -> list[str]:
    """Notes of a run on what llama.cpp does not compute, or not under the same name."""
    architecture, notes = architecture_of(config), list[str]()
    if config.model_type == "qwen2" and architecture.name == "llama":
        notes.append(
            "export=gguf: the model is stored as a llama with biases, which computes the same: llama.cpp loads a qwen2 "
            "whose heads are as wide as the states alone"
        )
    window = None if architecture.alternates else getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if window is not None and window < config.max_position_embeddings and (not types or "sliding_attention" in types):
        notes.append(
            f"export=gguf: llama.cpp has no sliding window for the type {config.model_type}; the model has one of "
            f"{window:,} tokens, and computes something else there on texts that are longer"
        )
    return notes
