"""config.json and tokenizer_config.json of an export: as transformers 5 writes them, and readable by version 4 too.

Version 5 writes some settings under new names alone, and version 4 then computes with its defaults, without a word: it
needs the older names beside them (seen with 4.57 and 5.24, tests/test_export.py). What names a file of code is left
out: an export holds none.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from prune_lab.models.families import FAMILIES

# Types beside FAMILIES that version 4 has as well, and whose exports give equal logits there (tests/test_export.py).
# Others are newer than version 4, have such fields of other kinds, or compute otherwise there.
_ALSO_IN_4 = (
    "arcee", "bamba", "bitnet", "bloom", "codegen", "cohere", "cohere2", "deepseek_v2", "deepseek_v3", "diffllama",
    "doge", "dots1", "ernie4_5", "ernie4_5_moe", "exaone4", "falcon", "falcon_h1", "falcon_mamba", "flex_olmo", "glm",
    "glm4", "glm4_moe", "gpt_bigcode", "gpt_neo", "gpt_oss", "gptj", "granite", "granitemoe", "granitemoeshared",
    "helium", "hunyuan_v1_dense", "hunyuan_v1_moe", "jamba", "jetmoe", "lfm2", "llama4_text", "mamba", "minimax",
    "ministral", "mixtral", "mpt", "nemotron", "olmo", "olmo2", "olmo3", "olmoe", "persimmon", "phi", "phimoe",
    "qwen2_moe", "qwen3_moe", "qwen3_next", "rwkv", "seed_oss", "smollm3", "stablelm", "starcoder2", "vaultgemma",
    "xglm",
)  # fmt: skip
READ_BY_4 = (*FAMILIES, *_ALSO_IN_4)
_OLDER_NAMES = {"qwen3_moe": {"num_local_experts": "num_experts"}}
_CODE = ("auto_map", "custom_pipelines")  # they name classes in Python files beside the weights
# Classes that version 4 does not have: tokenizer.json is all that they read, as its class for any such file does.
_ONLY_IN_5 = ("TokenizersBackend", "PythonBackend", "SentencePieceBackend", "MistralCommonBackend")
_FOR_ANY_FILE = "PreTrainedTokenizerFast"
# What version 4 takes from tokenizer_config.json and version 5 does not write again.
_KEPT = ("add_bos_token", "add_eos_token", "legacy", "use_default_system_prompt", "spaces_between_special_tokens")


def rewrite_configs(folder: Path, tokenizer_config: dict[str, Any], processor: Iterable[str] = ()) -> None:
    """Rewrites the files of an export; `tokenizer_config` is the one that the model came with, or empty.

    processor: names of the files of its processor, which stay as they are where they name no code.
    """
    _rewrite(folder / "config.json", with_older_fields)
    _rewrite(folder / "tokenizer_config.json", lambda written: older_tokenizer_config(written, tokenizer_config))
    for name in processor:
        _rewrite(folder / name, without_code)


def with_older_fields(config: dict[str, Any]) -> dict[str, Any]:
    """A config as version 5 writes it, with the names that version 4 has for the same settings.

    Of the types of READ_BY_4 alone.
    """
    config = without_code(config)
    if config.get("model_type") not in READ_BY_4:
        return config
    for name, older in _OLDER_NAMES.get(config["model_type"], {}).items():
        config[older] = config[name]
    if "dtype" in config:
        config["torch_dtype"] = config["dtype"]
    if isinstance(rope := config.get("rope_parameters"), dict) and rope:
        config |= _older_rope(config, rope)
    return config


def _older_rope(config: dict[str, Any], rope: dict[str, Any]) -> dict[str, Any]:
    """rope_parameters, of all blocks or of each type of block, as the fields of version 4."""
    local = rope.get("sliding_attention") if "full_attention" in rope else None
    of_all = dict(rope.get("full_attention", rope))
    theta, share = of_all.pop("rope_theta", None), of_all.pop("partial_rotary_factor", None)
    is_scaled = of_all.get("rope_type", of_all.get("type", "default")) != "default"
    fields: dict[str, Any] = {"rope_theta": theta, "rope_scaling": of_all if is_scaled else None}
    if config["model_type"] == "gpt_neox":
        fields |= {"rotary_emb_base": theta, "rotary_pct": share}
    elif share is not None:
        fields["partial_rotary_factor"] = share
    if config["model_type"] == "phi3" and is_scaled:  # it takes these three fields and no others
        fields["rope_scaling"] = {
            "type": of_all["rope_type"], "short_factor": of_all["short_factor"], "long_factor": of_all["long_factor"]
        }  # fmt: skip
    original, context = of_all.get("original_max_position_embeddings"), config.get("max_position_embeddings")
    if of_all.get("rope_type") == "longrope" and original not in (None, context):
        fields["original_max_position_embeddings"] = original  # which version 4 reads there for this type alone
    if local is not None:
        fields["rope_local_base_freq"] = local["rope_theta"]
    return fields


def older_tokenizer_config(written: dict[str, Any], original: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer_config as version 5 writes it, with the class and settings of `original`, as version 4 reads them."""
    config = without_code(written) | {key: original[key] for key in _KEPT if key in original}
    name = original.get("tokenizer_class") or config.get("tokenizer_class")
    config["tokenizer_class"] = _FOR_ANY_FILE if name in _ONLY_IN_5 else name
    if isinstance(extra := config.pop("extra_special_tokens", None), list):  # version 4 has names and tokens there
        config["additional_special_tokens"] = extra
    if isinstance(named := original.get("extra_special_tokens"), dict):
        config["extra_special_tokens"] = named
    return config


def without_code(config: dict[str, Any]) -> dict[str, Any]:
    """Config without the entries that name code, at any depth."""
    return {
        key: without_code(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in _CODE
    }


def _rewrite(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    if not path.is_file():
        return
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:  # a file of the model's own that nothing reads: it stays
        return
    if isinstance(written, dict) and (config := change(written)) != written:
        path.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
