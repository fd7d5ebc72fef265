"""Small models of every type of causal language model that stock transformers builds, with random weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from conftest import story
from torch import nn

from prune_lab.models.auto_class import auto_class
from prune_lab.text.train_tokenizer import train_tokenizer

VOCAB, HIDDEN, INTER, MOE, SHARED, HEADS, KV, HEAD_DIM = 320, 64, 96, 48, 40, 4, 2, 16

# Whole name of a config field -> small value; a field is set only where the type's default config has it as a number.
RULES: list[tuple[str, Any]] = [
    (r"(unpadded_|text_)?vocab_size(_per_layer_input)?|decoder_vocab_size|output_vocab_size", VOCAB),
    (
        r"hidden_size|hidden_size_global|d_model|n_embd|emb_dim|embedding_size|(input|output)_embedding_size|word_embed_proj_dim|model_dim|dim"
        r"|attention_hidden_size|lru_width|cross_attention_hidden_size|backbone_hidden_size",
        HIDDEN,
    ),
    (
        r"intermediate_size|(decoder_|encoder_)?ffn_dim|n_inner|d_inner|dff|dim_ff|ffn_hidden_size|feed_forward_size"
        r"|prefix_dense_intermediate_size|dense_intermediate_size|intermediate_size_mlp",
        INTER,
    ),
    (r"moe_intermediate_size|expert_ffn_hidden_size|moe_shared_expert_intermediate_size", MOE),
    (r"shared_expert_intermediate_size|shared_intermediate_size|shared_experts_intermediate_size", SHARED),
    (r"num_hidden_layers|n_layers?|num_layers|decoder_layers|encoder_layers|num_(de|en)coder_layers|num_blocks", 3),
    (
        r"num_attention_heads|n_heads?|num_heads|(decoder_|encoder_)?attention_heads|num_(de|en)coder_attention_heads"
        r"|swa_num_attention_heads",
        HEADS,
    ),
    (r"num_key_value_heads|num_kv_heads|swa_num_key_value_heads|num_query_groups", KV),
    (
        r"head_dim|swa_head_dim|swa_v_head_dim|dim_head|attention_head_size|attention_head_dim|kv_channels|d_kv|d_head",
        HEAD_DIM,
    ),
    (r"num_experts|n_routed_experts|num_local_experts|moe_num_experts", 4),
    (r"num_experts_per_tok|moe_topk|num_experts_per_token|moe_k|top_k_experts", 2),
    (r"n_group|topk_group|num_expert_group", 1),
    (r"n_shared_experts|num_shared_experts|moe_num_shared_experts", 1),
    (r"q_lora_rank", 32),
    (r"kv_lora_rank", 16),
    (r"o_lora_rank", 16),
    (r"qk_rope_head_dim|qk_nope_head_dim", 8),
    (r"v_head_dim|qk_head_dim", 16),
    (r"index_head_dim|indexer_head_dim", 16),
    (r"index_n_heads|indexer_n_heads", 2),
    (r"index_topk", 8),
    (r"mamba_d_state|state_size|ssm_state_size|d_state", 8),
    (r"mamba_n_heads|mamba_num_heads|n_mamba_heads", 8),
    (r"mamba_d_head|mamba_head_dim|mamba_headdim", 16),
    (r"mamba_d_ssm", 128),
    (r"mamba_dt_rank|time_step_rank", 4),
    (r"mamba_n_groups|n_groups|mamba_ngroups", 1),
    (r"mamba_chunk_size|chunk_size", 8),
    (r"linear_key_head_dim|linear_value_head_dim|linear_head_dim", 16),
    (r"linear_num_key_heads", 2),
    (r"linear_num_value_heads|linear_num_heads", 4),
    (
        r"max_position_embeddings|n_positions|max_target_positions|n_ctx|max_seq_len|context_length|max_length|model_max_length",
        128,
    ),
    (r"max_source_positions", 64),
    (
        r"(attention_|local_)?(sliding_window|window_size|attention_window_size|attention_chunk_size|local_attention|sliding_window_size)",
        8,
    ),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
    (r"num_nextn_predict_layers", 0),
    (r"bos_token_id", 1),
    (r"eos_token_id|sep_token_id", 2),
    (r"pad_token_id", 0),
    (r"decoder_start_token_id", 1),
    (r"(mask|cls|unk)_token_id", 3),
]


def _text(config_class: Any) -> dict[str, Any]:
    try:
        return dict(config_class().to_dict())
    except Exception:
        return {}


def small(defaults: dict[str, Any]) -> dict[str, Any]:
    """Small values of the fields that a default config has."""
    found: dict[str, Any] = {}
    for name, value in defaults.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        for pattern, small_value in RULES:
            if re.fullmatch(pattern, name):
                eos_list = isinstance(value, list) and name.endswith("token_id")
                if (
                    number
                    or eos_list
                    or (value is None and name in ("num_key_value_heads", "head_dim", "n_inner", "ffn_hidden_size"))
                ):
                    found[name] = small_value
                break
        else:
            if number and isinstance(value, int) and re.fullmatch(r".*_token_(id|index)", name) and value > 255:
                found[name] = 300 + len(found) % 19
    alternating(defaults, found)
    return found


# What the rules do not get right, by type. None drops a field that a rule set; "text_config" and the like are nested.
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_heads": 2,
    "depth": 1,
}
SAM = {
    "hidden_size": 32,
    "output_channels": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "mlp_dim": 48,
    "downsample_channels": [16, 32],
    "global_attn_indexes": [0],
}
ENCODER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 32,
}
KOSMOS = {"embed_dim": HIDDEN, "layers": 3, "attention_heads": HEADS, "ffn_dim": INTER}
BERT = {"is_decoder": True}
MLA = {"num_key_value_heads": 4, "head_dim": "drop", "qk_head_dim": "drop"}
GEMMA4 = {
    "num_key_value_heads": 2,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 8,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "per_layer_config": {1: {"head_dim": 32}, 3: {"head_dim": 32}},
}


def sections(*sizes: int, **more: Any) -> dict[str, Any]:
    """Positions in time, height and width, as a field of a config: how many pairs of a head's dimensions each has."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sizes), **more}}


OVERRIDES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        (
            "bert",
            "bert-generation",
            "big_bird",
            "camembert",
            "data2vec-text",
            "electra",
            "ernie",
            "megatron-bert",
            "rembert",
            "roberta",
            "roberta-prelayernorm",
            "roformer",
            "xlm-roberta",
            "xlm-roberta-xl",
            "prophetnet",
            "git",
        ),
        BERT,
    ),
    **dict.fromkeys(
        (
            "axk1",
            "axk2",
            "deepseek_v3",
            "deepseek_v32",
            "glm_moe_dsa",
            "youtu",
            "sarvam_mla",
            "glm4_moe_lite",
            "minicpm3",
            "bailing_hybrid",
            "kimi_linear",
            "hy_v4",
        ),
        MLA,
    ),
    "blt": {"encoder_hash_byte_group_vocab": 20, "encoder_hash_byte_group_size": [3, 4]},
    "bamba": {"num_hidden_layers": 4, "attn_layer_indices": [1, 3]},
    "dory": {
        "n_input_layers": 1,
        "n_recurrent_layers": 2,
        "n_output_layers": 1,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "codegen": {"rotary_dim": 8},
    "gptj": {"rotary_dim": 8},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_hidden_layers": 4,
        "rope_parameters": {
            k: {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
            for k in ("sliding_attention", "full_attention")
        },
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        "ffn_config": {
            "hidden_size": 64,
            "ffn_hidden_size": 96,
            "moe_num_experts": 4,
            "moe_top_k": 2,
            "ffn_act_fn": {"name": "silu"},
        },
        "num_key_value_heads": "drop",
    },
    "deepseek_v2": {**MLA, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "deepseek_v4": {
        "num_key_value_heads": 1,
        "o_groups": 2,
        "num_hidden_layers": 4,
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        "layer_types": [
            "sliding_attention",
            "compressed_sparse_attention",
            "heavily_compressed_attention",
            "compressed_sparse_attention",
        ],
        "mlp_layer_types": ["hash_moe", "moe", "moe", "moe"],
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": {
        **MLA,
        "head_dim": 16,
        "per_layer_config": None,
        "num_hidden_layers": 4,
        "layer_types": ["indexed_attention", "sliding_attention"] * 2,
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    },
    "dots3_note": {
        "text_config": {
            **MLA,
            "head_dim": 16,
            "per_layer_config": {},
            "num_hidden_layers": 4,
            "layer_types": ["indexed_attention", "sliding_attention"] * 2,
            "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        }
    },
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "intermediate_size": 96,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 16,
        "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0],
        "layer_types_": "drop",
    },
    "gemma4_text": GEMMA4,
    "gemma4_unified_text": {k: v for k, v in GEMMA4.items() if "per_layer_input" not in k},
    "gemma4": {"text_config": GEMMA4},
    "gemma4_unified": {"text_config": {k: v for k, v in GEMMA4.items() if "per_layer_input" not in k}},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "num_layers": 4, "intermediate_size": INTER},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2, "num_hidden_layers": 4},
    "hrm_text": {"num_layers_per_stack": 2, "num_hidden_layers": "drop"},
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "use_mamba_kernels": False,
    },
    "laguna": {
        "layer_types": ["full_attention", "sliding_attention", "full_attention", "sliding_attention"],
        "num_hidden_layers": 4,
        "num_attention_heads_per_layer": [4, 4, 4, 4],
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    },
    "lfm2_moe": {
        "layer_types": ["conv", "full_attention", "conv", "full_attention"],
        "num_hidden_layers": 4,
        "num_dense_layers": 1,
    },
    "lfm2": {
        "layer_types": ["conv", "full_attention", "conv", "full_attention"],
        "num_hidden_layers": 4,
        "block_auto_adjust_ff_dim": False,
    },
    "llama4_text": {
        "num_hidden_layers": 4,
        "interleave_moe_layer_step": 2,
        "intermediate_size": MOE,
        "num_experts_per_tok": 1,
    },
    "llama4": {
        "text_config": {
            "num_hidden_layers": 4,
            "interleave_moe_layer_step": 2,
            "intermediate_size": MOE,
            "num_experts_per_tok": 1,
            "moe_layers": "drop",
            "no_rope_layers": "drop",
        }
    },
    "longcat_flash": {
        **MLA,
        "qk_head_dim": 16,
        "head_dim": 8,
        "zero_expert_num": 2,
        "n_routed_experts": 4,
        "ffn_hidden_size": INTER,
    },
    "mamba2": {"num_heads": 8, "head_dim": 16, "expand": 2, "n_groups": 1},
    "mllama": {"text_config": {"num_hidden_layers": 4, "cross_attention_layers": [1]}},
    "mpt": {"expansion_ratio": 2},
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"] * 2},
    "minimax_m3_vl_text": {"num_hidden_layers": 4},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
        "ngram_vocab_size_base": 200,
        "ple_embed_dim": 64,
        "hc_lowrank": 8,
    },
    "qwen4_exp": {
        "text_config": {
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 16,
            "indexer_budget": 8,
            "indexer_compress_ratio": 4,
            "ngram_vocab_size_base": 200,
            "ple_embed_dim": 64,
            "hc_lowrank": 8,
            "num_hidden_layers": 4,
            "layer_types": ["linear_attention", "indexed_attention"] * 2,
        }
    },
    "reformer": {
        "is_decoder": True,
        "hash_seed": 0,
        "axial_pos_shape": [16, 8],
        "axial_pos_embds_dim": [32, 32],
        "attn_layers": ["local", "lsh", "local"],
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "num_hidden_layers": "drop",
        "num_buckets": 4,
    },
    "roc_bert": {
        **BERT,
        "shape_vocab_size": 32,
        "pronunciation_vocab_size": 32,
        "shape_embed_dim": 16,
        "pronunciation_embed_dim": 16,
    },
    "xmod": {**BERT, "languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 6,
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "num_key_value_heads": 4,
        "n_mamba_heads": 2,
        "use_mamba_kernels": False,
    },
    "zamba2": {
        "num_hidden_layers": 6,
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid"] * 2,
        "num_key_value_heads": 4,
        "attention_hidden_size": "drop",
        "attention_head_dim": "drop",
        "num_query_groups": "drop",
        "kv_channels": "drop",
        "adapter_rank": 8,
        "mamba_headdim": "drop",
        "hybrid_layer_ids": "drop",
    },
    # image-text models: their text part, and what the sizes of the others must agree with
    **{
        model_type: {"text_config": sections(4, 2, 2)}
        for model_type in (
            "qwen2_vl",
            "qwen2_5_vl",
            "qwen2_5_omni_thinker",
            "glm46v",
            "glm4v",
            "glmga",
            "glm_ocr",
            "paddleocr_vl",
            "hunyuan_vl",
            "cosmos3_edge",
        )
    },
    "ernie4_5_vl_moe": {"text_config": {**sections(2, 2, 4), "moe_intermediate_size": [MOE, MOE]}},
    "apertus1p5": {
        "audio_config": {
            "codebook_dim": "drop",
            "hidden_size": "drop",
            "codebook_size": 4,
            "decoder_hidden_size": 32,
            "decoder_intermediate_size": 48,
            "decoder_num_layers": 1,
        },
        "vision_config": {"codebook_size": 4, "embed_dim": 16, "latent_channels": 16, "base_channels": 32},
        "image_token_offset": 304,
        "audio_token_offset": 308,
    },
    "chameleon": {"vocabulary_map": {"<image>": 319, "IMGIMGAZ": 318}},
    "deepseek_ocr2": {
        "vision_config": {"sam_config": SAM, "encoder_config": ENCODER},
        "text_config": {
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "n_group": 1,
            "topk_group": 1,
            "num_experts_per_tok": 2,
        },
    },
    "unlimited_ocr": {"vision_config": {"sam_config": SAM, "encoder_config": ENCODER}},
    "inkling_mm_model": {
        "vision_config": {"n_layers": 2, "text_hidden_size": HIDDEN},
        "audio_config": {"text_hidden_size": HIDDEN},
    },
    "kosmos-2": {"text_config": KOSMOS},
    "kosmos-2.5": {"text_config": KOSMOS, "vision_config": {"patch_embed_hidden_size": 32, "head_dim": 16}},
    "janus": {
        "vision_config": {"projection_dim": HIDDEN},
        "vq_config": {"num_embeddings": 32, "projection_dim": 32, "image_token_embed_dim": 32, "base_channels": 32},
    },
    "diffusion_gemma": {"text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": MOE}},
    "exaone4_5": {"text_config": {"model_type": "exaone4"}},
    "granite4_vision": {
        "deepstack_layer_map": [[0, 0]],
        "spatial_target_layers": [0, 1, 2],
        "downsample_rate": "1/2",
        "qformer_config": {"hidden_size": 64, "num_attention_heads": 2, "encoder_hidden_size": 64},
        "vision_config": {"image_size": 28, "patch_size": 7, "hidden_size": 64},
    },
    "molmo2": {"adapter_config": {"vision_feature_layer": [0]}},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "glm4v_moe": {"text_config": sections(2, 1, 1, partial_rotary_factor=0.5)},
    "hy_v4_vl": {"text_config": {**MLA, **sections(2, 1, 1)}},
    "kimi_k25": {"text_config": MLA},
    "mistral_large4": {"text_config": MLA},
    "glm5_next": {
        "text_config": {
            "num_key_value_heads": HEADS,
            "index_topk": 16,
            "qk_rope_head_dim": 0,
            "head_dim": 0,
            "qk_nope_head_dim": 16,
            "linear_num_heads": HEADS,
        },
        "vision_config": {"out_hidden_size": HIDDEN},
    },
    "muse_spark": {
        "audio_config": {
            "num_hidden_layers": 4,
            "hidden_sizes": [16, 16, 16, 16],
            "depths": [1, 1, 1, 1],
            "out_hidden_size": HIDDEN,
        },
        "vision_config": {"layer_types": ["window_attention"]},
        "text_config": {"layer_rope_theta": [500000.0, 0, 500000.0, 0], "moe_hidden_size": 32},
        "out_hidden_size": 32,
        "projector_hidden_size": 32,
    },
    "granite_docling": {"vision_config": {"out_hidden_size": HIDDEN}},
    "inkling2": {"vision_config": {"text_hidden_size": HIDDEN}},
    "inkling2_loop": {"vision_config": {"text_hidden_size": HIDDEN}},
    "step3p7": {"text_config": {"sliding_window": 8}},
    "cohere_compass": {
        "text_config": {
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_hidden_layers": 4,
            "rope_parameters": {
                k: {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
                for k in ("sliding_attention", "full_attention")
            },
        }
    },
    # variants of a type, not counted as types
    "gemma4_text:moe": {
        **GEMMA4,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": MOE,
    },
    "gemma4_text:shared_kv": {**GEMMA4, "num_kv_shared_layers": 2},
    "falcon:multi_query": {"num_kv_heads": 1, "multi_query": True, "new_decoder_architecture": False},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}


def alternating(defaults: dict[str, Any], found: dict[str, Any]) -> None:
    """Where a default layout alternates: four layers (or one of each kind) that show all its kinds."""
    for name in ("layer_types", "layers_block_type"):
        kinds = list(dict.fromkeys(defaults.get(name) or ()))
        if len(kinds) > 1 and "num_hidden_layers" in found:
            found["num_hidden_layers"] = count = max(4, len(kinds))
            found[name] = [kinds[i % len(kinds)] for i in range(count)]
    kinds = list(dict.fromkeys(defaults.get("mlp_layer_types") or ()))
    if len(kinds) > 1 and "num_hidden_layers" in found:
        found["mlp_layer_types"] = [kinds[min(i, len(kinds) - 1)] for i in range(found["num_hidden_layers"])]


def tiny_config(model_type: str, **more: Any) -> Any:
    """The small config of a type; `more` overrides."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[model_type.split(":")[0]]
    defaults = _text(config_class)
    kwargs = small(defaults)
    for name, sub in defaults.items():
        if isinstance(sub, dict) and "model_type" in sub:
            kwargs[name] = small(sub)
            if "vision" in name:
                kwargs[name] = {k: v for k, v in VISION.items() if k in sub}
    for name, value in {**OVERRIDES.get(model_type, {}), **more}.items():
        if isinstance(value, dict) and isinstance(kwargs.get(name), dict):
            kwargs[name] = {k: v for k, v in {**kwargs[name], **value}.items() if v != "drop"}
        elif value == "drop":
            kwargs.pop(name, None)
        else:
            kwargs[name] = value
    return config_class(**kwargs)


@torch.no_grad()
def tiny_model(model_type: str, **more: Any) -> Any:
    """A model of that config in float32, with weights far enough from zero that every one of them matters."""
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    config = tiny_config(model_type, **more)
    model = auto_class(config).from_config(config, dtype=torch.float32).eval()
    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D):
            module.weight.normal_(std=0.12)
            if module.bias is not None:
                module.bias.normal_(std=0.05)
        elif isinstance(module, nn.Embedding):
            module.weight.normal_(std=0.3)
    for name, parameter in model.named_parameters():
        if (parameter.dim() == 3 and "conv" not in name) or ("experts" in name and parameter.dim() > 1):
            parameter.normal_(std=0.12)
    model.tie_weights()
    return model


def tiny_folder(folder: Path, model_type: str, **more: Any) -> Path:
    """Such a model with a tokenizer, as a folder in the Hub's layout."""
    tiny_model(model_type, **more).save_pretrained(folder)
    train_tokenizer(tuple(story(seed) for seed in range(20)), 300, folder, context=128)
    return folder
