"""Foreign checkpoints: kinds that are no dense model of transformers, recognised by their tensors' names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

_ANEW = "save it again with save_pretrained"
_GIVE_DENSE = "give the dense model that it was made from"


@dataclass(frozen=True)
class Sign:
    """Names of tensors that say what a checkpoint is, and what to do with it."""

    pattern: str
    what: str  # goes on after "holds NAME"
    do: str


def _few_bits(pattern: str, how: str) -> Sign:
    return Sign(pattern, f": its weights are quantized ({how})", _GIVE_DENSE)


# The first that is found in any name explains a checkpoint: what says more stands before what says less.
SIGNS = (
    Sign(
        r"\.(base_layer|lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|ia3_l|hada_w[12]_[ab]|lokr_w[12](_[ab])?"
        r"|oft_[rR]|vera_lambda_[bd]|modules_to_save|original_module)(\.|$)",
        ": an adapter (PEFT, such as LoRA) that is not merged",
        "merge it with merge_and_unload() and save the model again",
    ),
    Sign(
        r"(^|\.)(_fsdp_wrapped_module\.|_?flat_param)",
        ": a model saved from inside FSDP",
        f"gather its full state dict (accelerate: get_state_dict) and {_ANEW}",
    ),
    Sign(
        r"(^|\.)_checkpoint_wrapped_module\.",
        ": a model saved with its wrappers of activation checkpointing",
        f"take '_checkpoint_wrapped_module.' out of the tensors' names, or unwrap the model and {_ANEW}",
    ),
    Sign(
        r"(^|\.)_orig_mod\.",
        ": a model compiled by torch.compile",
        "save the model inside it (model._orig_mod.save_pretrained), or take '_orig_mod.' out of the tensors' names",
    ),
    Sign(
        r"^module\.",
        ": a model saved from inside DistributedDataParallel or DeepSpeed",
        "save the model inside it (model.module.save_pretrained), or take 'module.' off the tensors' names",
    ),
    Sign(
        r"^base_model\.model\.",
        ": a model saved from inside PEFT's wrapper",
        "save what merge_and_unload() returns, or take 'base_model.model.' off the tensors' names",
    ),
    _few_bits(
        r"\.(absmax|quant_map|nested_absmax|nested_quant_map|SCB|weight_format)$|\.quant_state\.", "bitsandbytes"
    ),
    _few_bits(r"\.g_idx$", "GPTQ"),
    _few_bits(r"\.(qweight|qzeros)$", "GPTQ or AWQ"),
    _few_bits(r"\.(q_weight|q_scale|q_scale_max|q_invperm|q_groups)$", "EXL2"),
    _few_bits(r"\.W_q$", "HQQ"),
    _few_bits(r"\.weight\._(data|scale|shift)$", "Quanto"),
    _few_bits(r"\.(codes|codebooks)$", "AQLM"),
    _few_bits(r"\.biases$", "MLX"),
    _few_bits(r"_blocks$", "MXFP4"),
    _few_bits(r"(\.|:)_?(weight_)?qdata$", "torchao"),
    Sign(
        r"\.(bitmask|compressed)$",
        ": its weights are compressed (compressed-tensors, sparse)",
        "decompress it with that library, or give the dense model that it was made from",
    ),
    _few_bits(r"\.(weight_packed|weight_zero_point|weight_g_idx|weight_shape)$", "compressed-tensors"),
    Sign(
        r"[._](scales?|scale_inv|scale_2)$",
        ", but its config.json has no quantization_config: quantized weights (such as 8-bit floats) cannot be read "
        "without it",
        _GIVE_DENSE,
    ),
    Sign(
        r"\.weight_(orig|mask)$",
        ": a model whose masks of torch.nn.utils.prune are not applied",
        f"call prune.remove on each pruned module and {_ANEW}",
    ),
    Sign(
        r"\.parametrizations\.|\.weight_[gv]$",
        ": a model whose weights are parametrized (torch.nn.utils)",
        f"take the parametrizations off (remove_parametrizations) and {_ANEW}",
    ),
    Sign(
        r"^(blk\.\d+|token_embd|output_norm)\.",
        ": the tensors have the names of GGUF",
        "take the checkpoint in the Hugging Face layout that it was made from",
    ),
    Sign(
        r"(^|\.)(layers\.\d+\.(attention\.w[qkvo]|feed_forward\.w[123])|tok_embeddings)\.",
        ": the tensors have the names of the original release (Meta, Mistral)",
        "take the checkpoint in the Hugging Face layout, or convert it with the script in transformers",
    ),
    Sign(
        r"\.(linear_qkv|linear_proj|linear_fc[12])\.",
        ": the tensors have the names of Megatron",
        "convert it to the Hugging Face layout with the tools that it was trained with",
    ),
)


def explained(names: Collection[str]) -> str | None:
    """Kind of a checkpoint with these tensor names, and what to do with it; None where it is not known."""
    for sign in SIGNS:
        found = min((name for name in names if re.search(sign.pattern, name)), default=None)
        if found is not None:
            return f"holds {found}{sign.what}; {sign.do}"
    return None


def common_prefix(names: Collection[str], wanted: Collection[str]) -> str | None:
    """Common prefix of most of the wanted names in `names`, if there is one."""
    wanted = set(wanted)
    found: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")
        for start in range(1, len(parts)):
            if ".".join(parts[start:]) in wanted:
                found[".".join(parts[:start]) + "."] += 1
    (prefix, count), *_ = [*found.most_common(1), ("", 0)]
    return prefix if count > len(wanted) / 2 else None
