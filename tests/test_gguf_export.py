"""export=gguf: what llama.cpp's own converter writes, as hand-written values, stock transformers and itself have it.

The converter is looked for in the folder PRUNE_LAB_LLAMA_CPP, a checkout of llama.cpp: the source package of
llama-cpp-python on the package index has one, vendor/llama.cpp.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CPU, ROOT, Cli, make_folder, story
from gguf import GGMLQuantizationType, GGUFReader, quants
from gguf_files import TEMPLATE, make_gguf
from model_types import tiny_folder
from tokenizers import Regex, Tokenizer, pre_tokenizers, processors
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from prune_lab.errors import Refused
from prune_lab.export.gguf import FILE, TYPES, Gguf
from prune_lab.methods.depth import Depth
from prune_lab.methods.structured import Structured
from prune_lab.models.anatomy import Anatomy
from prune_lab.models.export import save_model
from prune_lab.models.gguf.families import ARCHITECTURES, check_config, constants
from prune_lab.models.gguf.file import read_by_transformers
from prune_lab.models.gguf.vocabulary import ORIGIN, vocabulary_of
from prune_lab.models.load import HubModel, Loaded
from prune_lab.pruning.calibration import Calibrator

LLAMA_CPP = os.environ.get("PRUNE_LAB_LLAMA_CPP", "")
TOKENS = torch.randint(300, (1, 24), generator=torch.Generator().manual_seed(2))
TEXTS = [
    "def f(x):\n\treturn x  # 12345 thing A1.\n\n", "Zażółć gęślą jaźń", "Привет, мир!", "你好，世界 日本語",
    "مرحبا بالعالم", "नमस्ते दुनिया", "🚀 then", " leading   spaces ", "don't I'LL",
]  # fmt: skip
MIXTURES = {"mixtral": {}, "qwen3_moe": {"norm_topk_prob": True}, "olmoe": {}}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64, "rope_theta": 5e5}  # fmt: skip
FACTORS = {"rope_type": "longrope", "rope_theta": 500.0, "short_factor": [1.0, 1.5, 2.0, 3.0],
           "long_factor": [2.0, 3.0, 4.0, 5.0]}  # fmt: skip
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 5e3,
    "beta_fast": 16.0,
}
TURNS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6}


def loaded_of(place: Path, family: str, **changes: Any) -> Loaded:
    """A small model of a family, by name of the folder that it is made in."""
    if family in MIXTURES:
        shape = {"num_key_value_heads": 4} if family == "olmoe" else {}  # as many as heads, as its norms there want it
        folder = tiny_folder(place / "made", family, **{**MIXTURES[family], **shape, **changes})
    else:
        folder = make_folder(place / "made", family, **{"intermediate_size": 64, **changes})
    return HubModel(name=str(folder)).load(CPU, seed=0)


def written(loaded: Loaded, folder: Path, kind: str = "f32") -> GGUFReader:
    """What is in the file of a model that passed all checks."""
    export = Gguf(type=kind)
    export.check_config(loaded.model.config, ())
    export.check_model(loaded)
    folder.mkdir(parents=True)
    export.write(loaded, folder)
    export.check(loaded.model, folder, TOKENS)
    return GGUFReader(folder / FILE)


def metadata(reader: GGUFReader) -> dict[str, Any]:
    return {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}


def tensors(reader: GGUFReader) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Types, and shapes as PyTorch has them."""
    return {one.name: (one.tensor_type.name, tuple(reversed(one.shape.tolist()))) for one in reader.tensors}


def values(reader: GGUFReader, name: str) -> torch.Tensor:
    found = next(one for one in reader.tensors if one.name == name)
    return torch.from_numpy(quants.dequantize(found.data, found.tensor_type).copy())


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=TOKENS, use_cache=False).logits
    return found


def test_a_llama_by_hand(tmp_path: Path) -> None:
    """All metadata, and rows of queries and keys in the order of rotary pairs; values stay where they are."""
    loaded = loaded_of(tmp_path, "llama", attention_bias=True)
    reader = written(loaded, tmp_path / "export")
    found = metadata(reader)
    said = {key: value for key, value in found.items() if not key.startswith("tokenizer.ggml.t")}
    del said["tokenizer.ggml.merges"]
    assert said == {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "made",
        "general.size_label": "28K",
        "general.file_type": 0,
        "general.quantization_version": 2,
        "llama.block_count": 2,
        "llama.context_length": 128,
        "llama.embedding_length": 32,
        "llama.feed_forward_length": 64,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 8,
        "llama.attention.value_length": 8,
        "llama.attention.layer_norm_rms_epsilon": float(np.float32(1e-6)),
        "llama.rope.freq_base": 10000.0,
        "llama.rope.dimension_count": 8,
        "llama.vocab_size": 300,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
    }
    assert found["tokenizer.ggml.tokens"][:2] == ["<|endoftext|>", "!"]
    assert found["tokenizer.ggml.token_type"] == [3] + [1] * 299
    weights, pairs = loaded.model.state_dict(), torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
    for part, heads in (("q", 4), ("k", 2)):
        rows = torch.cat([pairs + 8 * head for head in range(heads)])
        for kind in ("weight", "bias"):
            expected = weights[f"model.layers.1.self_attn.{part}_proj.{kind}"][rows]
            assert torch.equal(values(reader, f"blk.1.attn_{part}.{kind}"), expected)
    for name, key in {
        "blk.1.attn_v.weight": "layers.1.self_attn.v_proj.weight",
        "blk.1.attn_output.bias": "layers.1.self_attn.o_proj.bias",
        "blk.0.attn_norm.weight": "layers.0.input_layernorm.weight",
        "blk.0.ffn_norm.weight": "layers.0.post_attention_layernorm.weight",
        "blk.0.ffn_gate.weight": "layers.0.mlp.gate_proj.weight",
        "blk.0.ffn_up.weight": "layers.0.mlp.up_proj.weight",
        "blk.0.ffn_down.weight": "layers.0.mlp.down_proj.weight",
        "output_norm.weight": "norm.weight",
        "token_embd.weight": "embed_tokens.weight",
    }.items():
        assert torch.equal(values(reader, name), weights[f"model.{key}"])
    assert "output.weight" not in tensors(reader)


def test_a_mixture_by_hand(tmp_path: Path) -> None:
    """Experts are three tensors, of a matrix for each; the router is in float32 whatever is asked for."""
    loaded = loaded_of(tmp_path, "mixtral")
    reader = written(loaded, tmp_path / "export", "f16")
    assert {name: found for name, found in tensors(reader).items() if name.startswith("blk.0.ffn_")} == {
        "blk.0.ffn_norm.weight": ("F32", (64,)),
        "blk.0.ffn_gate_inp.weight": ("F32", (4, 64)),
        "blk.0.ffn_gate_exps.weight": ("F16", (4, 96, 64)),
        "blk.0.ffn_up_exps.weight": ("F16", (4, 96, 64)),
        "blk.0.ffn_down_exps.weight": ("F16", (4, 64, 96)),
    }
    found = metadata(reader)
    assert (found["general.architecture"], found["llama.expert_count"], found["llama.expert_used_count"]) == (
        "llama",
        4,
        2,
    )
    fused = loaded.model.state_dict()["model.layers.0.mlp.experts.gate_up_proj"]
    for name, expected in (("gate", fused[:, :96]), ("up", fused[:, 96:])):
        assert torch.equal(values(reader, f"blk.0.ffn_{name}_exps.weight"), expected.half().float())


@pytest.mark.parametrize("family", sorted(ARCHITECTURES))
def test_the_logits_are_the_models(family: str, tmp_path: Path) -> None:
    """As our reader has them; and stock transformers, where it has the type: with its own names and layouts."""
    loaded = loaded_of(
        tmp_path, family, **({} if family in MIXTURES or "gemma" in family else {"tie_word_embeddings": False})
    )
    written(loaded, tmp_path / "export")
    again = Gguf(type="f32").read(tmp_path / "export")
    torch.testing.assert_close(logits(again), logits(loaded.model), rtol=0, atol=1e-5)
    if ARCHITECTURES[family].read_again:
        stock = read_by_transformers(tmp_path / "export" / FILE, loaded.model)
        torch.testing.assert_close(logits(stock), logits(loaded.model), rtol=0, atol=1e-5)
    else:
        assert family in ("gemma", "mixtral", "olmoe")


@pytest.mark.parametrize("kind", TYPES)
def test_types_are_as_llama_cpp_has_them(kind: str, tmp_path: Path) -> None:
    """Vectors in float32; rows that are no whole blocks in float16, which a note says; q4_0 with a finer vocabulary."""
    loaded = loaded_of(tmp_path, "llama", intermediate_size=48, tie_word_embeddings=False)
    reader = written(loaded, tmp_path / "export", kind)
    found = {name: stored for name, (stored, _) in tensors(reader).items()}
    blocks = kind.startswith("q")
    expected = kind.upper()
    assert found["blk.0.attn_q.weight"] == found["blk.1.ffn_up.weight"] == expected
    assert found["blk.0.ffn_down.weight"] == ("F16" if blocks else expected)
    assert found["output.weight"] == found["token_embd.weight"] == ("Q8_0" if blocks else expected)
    assert found["output_norm.weight"] == found["blk.0.ffn_norm.weight"] == "F32"
    assert metadata(reader)["general.file_type"] == {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7, "bf16": 32}[kind]
    weight = loaded.model.state_dict()["model.layers.0.mlp.up_proj.weight"].numpy()
    number = GGMLQuantizationType[expected]
    again = torch.from_numpy(quants.dequantize(quants.quantize(weight, number), number))
    assert torch.equal(values(reader, "blk.0.ffn_up.weight"), again)
    notes = " ".join(Gguf(type=kind).notes(loaded))
    assert ("stored in f16 are 2 ffn_down" in notes) == blocks
    assert ("the figures are of the model in float32" in notes) == (kind != "f32")


def test_a_weight_that_half_precision_does_not_hold_is_refused(tmp_path: Path) -> None:
    loaded = loaded_of(tmp_path, "llama")
    with torch.no_grad():
        loaded.model.model.layers[1].mlp.up_proj.weight[0, 0] = 7e4
    with pytest.raises(Refused, match=r"export.type=f16: blk.1.ffn_up.weight has a weight of 70000.*bf16 or f32"):
        written(loaded, tmp_path / "export", "f16")
    written(loaded, tmp_path / "other", "bf16")


def test_norms_of_a_gemma_have_their_one(tmp_path: Path) -> None:
    loaded = loaded_of(tmp_path, "gemma2")
    reader = written(loaded, tmp_path / "export")
    weights = loaded.model.state_dict()
    for name, key in {
        "blk.1.attn_norm": "layers.1.input_layernorm",
        "blk.1.post_attention_norm": "layers.1.post_attention_layernorm",
        "blk.1.ffn_norm": "layers.1.pre_feedforward_layernorm",
        "blk.1.post_ffw_norm": "layers.1.post_feedforward_layernorm",
        "output_norm": "norm",
    }.items():
        assert torch.equal(values(reader, f"{name}.weight"), weights[f"model.{key}.weight"] + 1)


def test_windows_that_do_not_alternate_are_said(tmp_path: Path) -> None:
    """Of a Gemma that has lost blocks; llama.cpp would take every second, or sixth, for one that sees all."""
    plain = loaded_of(tmp_path / "a", "gemma2", **TURNS)
    assert "gemma2.attention.sliding_window_pattern" not in metadata(written(plain, tmp_path / "plain"))
    four = {"num_hidden_layers": 4, "layer_types": TURNS["layer_types"] * 2, "sliding_window": 6}
    for family in ("gemma2", "gemma3_text"):
        loaded = loaded_of(tmp_path / family, family, **four)
        anatomy = Anatomy(loaded.model)
        windows = torch.randint(300, (4, 16), generator=torch.Generator().manual_seed(3))
        Depth(amount=0.25).prune(anatomy, 0.25, 0, Calibrator(windows, "dense", 4, False, 0))
        found = metadata(written(loaded, tmp_path / f"{family}-export"))
        architecture = found["general.architecture"]
        assert found[f"{architecture}.block_count"] == 3
        kept = [kind == "sliding_attention" for kind in loaded.model.config.layer_types]
        alternating = architecture == "gemma2" and kept == [True, False, True]
        assert found.get(f"{architecture}.attention.sliding_window_pattern") == (None if alternating else kept)


def test_factors_of_llama_3_are_those_of_stock_transformers(tmp_path: Path) -> None:
    loaded = loaded_of(tmp_path, "llama", rope_parameters=LLAMA3)
    reader = written(loaded, tmp_path / "export")
    plain = 1 / (5e5 ** (torch.arange(0, 8, 2) / 8))
    torch.testing.assert_close(values(reader, "rope_freqs.weight"), plain / loaded.model.model.rotary_emb.inv_freq)
    assert "llama.rope.scaling.type" not in metadata(reader)


def test_scaled_positions_are_said(tmp_path: Path) -> None:
    found = metadata(written(loaded_of(tmp_path / "a", "qwen3", rope_parameters=YARN), tmp_path / "yarn"))
    assert {key.removeprefix("qwen3.rope."): value for key, value in found.items() if ".rope." in key} == {
        "freq_base": 5e3, "scaling.type": "yarn", "scaling.factor": 4.0, "scaling.original_context_length": 32,
        "scaling.yarn_beta_fast": 16.0,
    }  # fmt: skip
    loaded = loaded_of(tmp_path / "b", "phi3", rope_parameters=FACTORS, original_max_position_embeddings=16)
    reader = written(loaded, tmp_path / "longrope")
    assert values(reader, "rope_factors_long.weight").tolist() == FACTORS["long_factor"]
    assert values(reader, "rope_factors_short.weight").tolist() == FACTORS["short_factor"]
    factor = metadata(reader)["phi3.rope.scaling.attn_factor"]
    assert factor == pytest.approx(loaded.model.model.rotary_emb.attention_scaling)
    assert factor == pytest.approx((1 + np.log(8) / np.log(16)) ** 0.5)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_it_follows_structural_pruning(family: str, tmp_path: Path) -> None:
    """Fewer channels and KV groups, in tensors and counts; a Qwen2 is a Llama then, which has no such wish."""
    loaded = loaded_of(tmp_path, family)
    method = Structured(amount=0.5, units=("mlp", "heads"))
    method.prune(Anatomy(loaded.model), 0.5, 0)
    reader = written(loaded, tmp_path / "export")
    found, name = metadata(reader), "llama" if family == "qwen2" else family
    assert found["general.architecture"] == name
    counts = ("head_count", "head_count_kv", "key_length")
    assert [found[f"{name}.attention.{key}"] for key in counts] == [2, 1, 8]
    assert found[f"{name}.feed_forward_length"] == 32
    shapes = {key: shape for key, (_, shape) in tensors(reader).items()}
    assert shapes["blk.0.attn_q.weight"] == (16, 32)
    assert shapes["blk.0.attn_k.weight"] == (8, 32)
    assert shapes["blk.0.attn_output.weight"] == (32, 16)
    assert shapes["blk.0.ffn_down.weight"] == (32, 32)
    notes = " ".join(Gguf(type="f32").notes(loaded))
    assert ("stored as a llama with biases" in notes) == (family == "qwen2")


def damaged(folder: Path, place: int) -> None:
    content = bytearray((folder / FILE).read_bytes())
    content[place] ^= 0x40
    (folder / FILE).write_bytes(content)


def test_a_file_that_was_tampered_with_does_not_pass(tmp_path: Path) -> None:
    """A number of the metadata, a weight, a token: each is looked at."""
    loaded = loaded_of(tmp_path, "llama")
    written(loaded, tmp_path / "whole", "q8_0")
    content = (tmp_path / "whole" / FILE).read_bytes()
    reader = GGUFReader(tmp_path / "whole" / FILE)
    weight = next(one for one in reader.tensors if one.name == "blk.0.ffn_up.weight")
    for name, place, says in (
        ("count", content.index(b"head_count_kv") + len("head_count_kv") + 4, "llama.attention.head_count_kv"),
        ("base", content.index(b"freq_base") + len("freq_base") + 6, "llama.rope.freq_base"),
        ("token", content.index(b"<|endoftext|>") + 3, "tokenizer.ggml.tokens"),
        ("scale", weight.data_offset + 1, "blk.0.ffn_up.weight, by"),
        ("value", weight.data_offset + 40, "blk.0.ffn_up.weight, by"),
    ):
        shutil.copytree(tmp_path / "whole", tmp_path / name)
        damaged(tmp_path / name, place)
        with pytest.raises(
            RuntimeError, match=rf"export in .* does not reload: its {FILE} differs in {re.escape(says)}"
        ):
            Gguf(type="q8_0").check(loaded.model, tmp_path / name, TOKENS)


@pytest.mark.parametrize(
    ("family", "changes", "cuts", "says"),
    [
        ("gpt2", {}, (), r"does not write models of the type 'gpt2'; it writes gemma, gemma2, .*qwen3_moe.*export=hf"),
        ("llama", {"hidden_act": "relu"}, (), "hidden_act=relu.*hidden_act=silu alone"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, (),
         "rope_type='dynamic'.*default, linear, yarn, llama3"),
        ("qwen3", {"rope_parameters": LLAMA3}, (), "rope_type='llama3'.*default, linear, yarn;"),
        ("qwen3", {"rope_parameters": YARN | {"mscale": 0.7}}, (), "rope_parameters.mscale=0.7"),
        ("qwen3", {"rope_parameters": YARN | {"attention_factor": 2.0}}, (), "attention_factor=2.0.*1.138"),
        ("qwen3", {"attention_bias": True}, (), "attention_bias=True.*attention_bias=False alone"),
        ("qwen3_moe", {"norm_topk_prob": False}, (), "norm_topk_prob=False.*norm_topk_prob=True alone"),
        ("qwen3_moe", {"norm_topk_prob": True, "mlp_only_layers": [0]}, (), r"mlp_only_layers=\[0\]"),
        ("olmoe", {"norm_topk_prob": True}, (), "norm_topk_prob=True"),
        ("olmoe", {"clip_qkv": 5.0}, (), "clip_qkv=5.0"),
        ("olmoe", {"num_key_value_heads": 2}, (), "num_key_value_heads=2.*num_key_value_heads=16 alone"),
        ("olmoe", {}, ("heads",), "heads x head_dim = hidden_size.*which would change; give method.units="),
        ("phi3", {}, ("hidden",), "heads x head_dim = hidden_size.*which would change"),
        ("gemma2", {"tie_word_embeddings": False}, (), "tie_word_embeddings=False"),
        ("gemma2", {"attn_logit_softcapping": None}, (), "attn_logit_softcapping=None"),
        ("gemma2", {"query_pre_attn_scalar": 144}, (), "query_pre_attn_scalar=144.*query_pre_attn_scalar=256 alone"),
        ("gemma3_text", {"use_bidirectional_attention": True}, (), "use_bidirectional_attention=True"),
    ],
)  # fmt: skip
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    family: str, changes: dict[str, Any], cuts: tuple[str, ...], says: str
) -> None:
    """By its config alone: it loads such a model and computes something else, without a word, or not at all."""
    with pytest.raises(Refused, match=says):
        check_config(AutoConfig.for_model(family, **changes), cuts)


@pytest.mark.parametrize("family", sorted(ARCHITECTURES))
def test_defaults_of_every_family_are_taken(family: str) -> None:
    check_config(AutoConfig.for_model(family, **MIXTURES.get(family, {})), ("mlp",))
    assert constants(AutoConfig.for_model(family)) == {}


def test_a_window_that_llama_cpp_lacks_is_said(tmp_path: Path) -> None:
    loaded = loaded_of(tmp_path, "mistral", sliding_window=6)
    written(loaded, tmp_path / "export")
    assert "no sliding window for the type mistral; the model has one of 6 tokens" in " ".join(Gguf().notes(loaded))
    assert "window" not in " ".join(Gguf().notes(loaded_of(tmp_path / "b", "mistral")))


# --- Tokenizers ---

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
OF_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False)


def cutting(folder: Path, pre: Any, ignore_merges: bool = False, **keywords: Any) -> PreTrainedTokenizerFast:
    """The small tokenizer, with another way to cut text into words."""
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.pre_tokenizer = pre
    described = json.loads(backend.to_str())
    described["model"]["ignore_merges"] = ignore_merges
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(described)), **keywords)


def sequence(*steps: Any) -> Any:
    return pre_tokenizers.Sequence([*steps])


@pytest.mark.parametrize(
    ("pre", "ignores", "name"),
    [
        (WORDS, False, "gpt-2"),
        (sequence(pre_tokenizers.Digits(individual_digits=True), WORDS), False, "smollm"),
        (sequence(pre_tokenizers.Split(Regex(OF_LLAMA3), "isolated"), BYTES), True, "llama-bpe"),
        (sequence(pre_tokenizers.Split(Regex(OF_LLAMA3), "removed", invert=True), BYTES), False, "dbrx"),
        (sequence(pre_tokenizers.Split(Regex(OF_LLAMA3.replace("{1,3}", "")), "isolated"), BYTES), False, "qwen2"),
        (sequence(pre_tokenizers.Split(Regex(GPT2), "isolated"), BYTES), False, "gpt-2"),
        (sequence(pre_tokenizers.Split(Regex(r"\p{L}+|\s"), "isolated"), BYTES), False, None),
        (pre_tokenizers.ByteLevel(add_prefix_space=True), False, None),
        (sequence(pre_tokenizers.Digits(individual_digits=False), WORDS), False, None),
        (sequence(pre_tokenizers.Whitespace(), WORDS), False, None),
    ],
)
def test_the_pattern_has_a_name_or_is_refused(pre: Any, ignores: bool, name: str | None, folder: Path) -> None:
    """The one by which llama.cpp cuts text in the same way."""
    config = AutoConfig.from_pretrained(folder)
    if name is None:
        with pytest.raises(Refused, match=r"cuts text into words in a way that llama.cpp has no name for"):
            vocabulary_of(cutting(folder, pre, ignores), config)
    else:
        assert vocabulary_of(cutting(folder, pre, ignores), config).pre == name


def test_other_kinds_of_tokenizers_are_refused(folder: Path) -> None:
    config = AutoConfig.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    scores = [(token, 0.0) for token in tokenizer.get_vocab()]
    from tokenizers import models

    unigram = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram(scores, 0)))
    with pytest.raises(Refused, match=r"writes BPE tokenizers.*the model's is Unigram; give export=hf"):
        vocabulary_of(unigram, config)
    plain = cutting(folder, pre_tokenizers.Whitespace())
    with pytest.raises(Refused, match=r"the model's is BPE of neither kind"):
        vocabulary_of(plain, config)
    config.vocab_size = 299
    with pytest.raises(Refused, match=r"a token of number 299, and the model has embeddings of 299 \(vocab_size\)"):
        vocabulary_of(tokenizer, config)


def test_tokens_are_of_their_types(folder: Path) -> None:
    """Rows without a token are unused; added tokens are control ones if they are special or look like it."""
    config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<tool>", "<|end|>"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["[X]"]})
    tokenizer.chat_template = {"default": TEMPLATE, "tool": "x"}
    config.vocab_size = 305
    found = vocabulary_of(tokenizer, config)
    assert found.tokens[298:] == [
        *tokenizer.convert_ids_to_tokens([298, 299]),
        "<tool>",
        "<|end|>",
        "[X]",
        "[PAD303]",
        "[PAD304]",
    ]
    assert found.types[299:] == [1, 4, 3, 3, 5, 5]
    assert found.template == [{"name": "default", "template": TEMPLATE}, {"name": "tool", "template": "x"}]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])
def test_stock_transformers_has_the_same_tokens_from_the_file(family: str, tmp_path: Path) -> None:
    loaded = loaded_of(tmp_path, family)
    loaded.tokenizer.chat_template = TEMPLATE
    written(loaded, tmp_path / "export")
    (tmp_path / "alone").mkdir()
    shutil.move(tmp_path / "export" / FILE, tmp_path / "alone")  # without the tokenizer's own files
    again = AutoTokenizer.from_pretrained(tmp_path / "alone", gguf_file=FILE)
    for text in TEXTS:
        assert again(text).input_ids == loaded.tokenizer(text).input_ids, text
    assert again.chat_template == TEMPLATE


def with_sentencepiece(folder: Path, is_gemma: bool) -> Path:
    """A folder whose tokenizer is a tokenizer.model alone, BPE with a token for each byte."""
    import sentencepiece

    text, made = folder / "text.txt", folder / "tokenizer"
    text.write_text("\n".join([*(story(seed) for seed in range(20)), *(TEXTS * 20)]), encoding="utf-8")
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    keywords: dict[str, Any] = {"pad_id": -1}
    if is_gemma:
        special = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"}
        keywords = {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, "add_dummy_prefix": False}
        keywords |= {f"{name}_piece": f"<{name}>" for name in ("pad", "eos", "bos")}
        keywords["user_defined_symbols"] = ["<mask>", "<start_of_turn>", "<end_of_turn>"]
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(made), vocab_size=600, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2, **keywords,
    )  # fmt: skip
    for name in ("tokenizer.json", "text.txt", "tokenizer.vocab"):
        (folder / name).unlink()
    cls = "GemmaTokenizer" if is_gemma else "LlamaTokenizer"
    config = special | {"tokenizer_class": cls, "add_bos_token": True, "add_eos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def sentencepiece_of(place: Path, family: str) -> Loaded:
    """A small model whose tokenizer came as a tokenizer.model."""
    numbers = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2} if "gemma" in family else {
        "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2
    }  # fmt: skip
    if family in MIXTURES:
        made = tiny_folder(place / "made", family, vocab_size=600)
    else:
        made = make_folder(place / "made", family, vocab_size=600, intermediate_size=64, **numbers)
    return HubModel(name=str(with_sentencepiece(made, "gemma" in family))).load(CPU, seed=0)


def ids_by_scores(found: dict[str, Any], text: str) -> list[int]:
    """Tokens of a text as llama.cpp's SentencePiece has them: of all pairs that make a token, the best score first."""
    tokens, scores, types = (found[f"tokenizer.ggml.{key}"] for key in ("tokens", "scores", "token_type"))
    numbers = {token: number for number, token in enumerate(tokens)}
    whole = [token for token, kind in zip(tokens, types, strict=True) if kind in (3, 4)]
    ids, begins = list[int](), found["tokenizer.ggml.add_space_prefix"]
    for part in re.split(
        "(" + "|".join(re.escape(token) for token in sorted(whole, key=len, reverse=True)) + ")", text
    ):
        if part in whole:
            ids.append(numbers[part])
            continue
        symbols = list((" " * (begins and bool(part)) + part).replace(" ", "\u2581"))
        while pairs := [
            (-scores[numbers[a + b]], place) for place, (a, b) in enumerate(pairwise(symbols)) if a + b in numbers
        ]:
            place = min(pairs)[1]
            symbols[place : place + 2] = ["".join(symbols[place : place + 2])]
        for symbol in symbols:
            byte = [numbers[f"<0x{byte:02X}>"] for byte in symbol.encode()]
            ids += [numbers[symbol]] if symbol in numbers else byte
    return ids


@pytest.mark.parametrize("family", ["llama", "gemma", "gemma2"])
def test_scores_give_the_models_tokens(family: str, tmp_path: Path) -> None:
    """By another implementation of what llama.cpp does; bytes, unknown and control tokens are of their types."""
    loaded = sentencepiece_of(tmp_path, family)
    found = metadata(written(loaded, tmp_path / "export"))
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"]) == ("llama", "default")
    assert found["tokenizer.ggml.add_bos_token"] is True
    assert found["tokenizer.ggml.add_space_prefix"] is (family == "llama")
    types = found["tokenizer.ggml.token_type"]
    assert types[:4] == ([2, 3, 3, 6] if family == "llama" else [3, 3, 3, 2])
    assert types.count(6) == 256
    for text in TEXTS:
        if text[0] == " " and family == "llama":  # transformers puts no space before one, sentencepiece does
            continue
        assert ids_by_scores(found, text) == loaded.tokenizer(text, add_special_tokens=False).input_ids, text
    assert not any("cut otherwise" in note for note in Gguf().notes(loaded))


def test_scores_that_are_no_substitute_for_merges_are_said(tmp_path: Path) -> None:
    """Without the merges of a token from some of its pairs, which llama.cpp would still join."""
    loaded = sentencepiece_of(tmp_path, "llama")
    described = json.loads(loaded.tokenizer.backend_tokenizer.to_str())
    described["model"]["merges"] = described["model"]["merges"][::2]
    backend = Tokenizer.from_str(json.dumps(described))
    loaded.tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    assert "some texts are cut otherwise there" in " ".join(Gguf().notes(loaded))


def test_the_name_of_the_file_that_a_model_came_from_stays(tmp_path: Path) -> None:
    """Transformers loses the split into digits, and folders that it writes have none; the name is kept in both."""
    loaded = HubModel(name=str(make_gguf(tmp_path / "m.gguf", tokenizer__ggml__pre="smollm"))).load(CPU, seed=0)
    save_model(loaded, tmp_path / "hf")
    for model in (loaded, HubModel(name=str(tmp_path / "hf")).load(CPU, seed=0)):
        assert vocabulary_of(model.tokenizer, model.model.config).pre == "smollm"
        assert "tokenizer.ggml.pre=smollm, as in the GGUF file that the model came from" in " ".join(
            Gguf().notes(model)
        )
    assert metadata(written(loaded, tmp_path / "export"))["tokenizer.ggml.pre"] == "smollm"
    config = tmp_path / "hf" / "tokenizer_config.json"
    config.write_text(
        json.dumps({key: value for key, value in json.loads(config.read_text()).items() if key != ORIGIN})
    )
    folder = HubModel(name=str(tmp_path / "hf")).load(CPU, seed=0)
    assert vocabulary_of(folder.tokenizer, folder.model.config).pre == "gpt-2"
    strange = HubModel(name=str(make_gguf(tmp_path / "n.gguf", tokenizer__ggml__pre="strange"))).load(CPU, seed=0)
    with pytest.raises(Refused, match=r"tokenizer.ggml.pre='strange', which llama.cpp does not have; give export=hf"):
        vocabulary_of(strange.tokenizer, strange.model.config)


# --- Runs ---


def test_a_run_keeps_it_and_finds_it_again(folder: Path, small: list[str], cli: Cli, tmp_path: Path) -> None:
    """Pruned, with a card that says how to use it; not written twice; and a model again for the next run."""
    words = [*small, "method=structured", "amount=0.5", "measure=quality_only", "measure.max_windows=4"]
    words += ["export=gguf", "export.type=q8_0"]
    first = cli(*words, "hydra.run.dir=first")
    assert first.returncode == 0, first.stderr
    export = tmp_path / "first" / "export"
    assert {path.name for path in export.iterdir()} >= {FILE, "README.md", "config.json", "tokenizer.json"}
    assert not list(export.glob("*.safetensors"))
    card = (export / "README.md").read_text()
    assert f"`llama-cli -m {FILE}`" in card
    assert "library_name: gguf" in card
    assert "the matrices in q8_0" in card
    assert "stored in f16 are 2 ffn_down" in card  # 24 channels
    summary = json.loads((tmp_path / "first" / "summary.json").read_text())
    assert summary["metrics"]["size/disk_mb"] == pytest.approx((export / FILE).stat().st_size / 1e6)
    before = (export / FILE).stat().st_mtime_ns
    assert cli(*words, "hydra.run.dir=second").returncode == 0
    assert (export / FILE).stat().st_mtime_ns == before
    assert not (tmp_path / "second" / "export").exists()


def test_a_model_can_come_from_it(tmp_path: Path) -> None:
    """The next run's: with the same weights, tokens and template."""
    loaded = loaded_of(tmp_path, "llama")
    loaded.tokenizer.chat_template = TEMPLATE
    written(loaded, tmp_path / "export")
    again = HubModel(name=str(tmp_path / "export" / FILE)).load(CPU, seed=0)
    assert torch.equal(logits(again.model), logits(loaded.model))
    assert again.tokenizer.chat_template == TEMPLATE
    assert again.tokenizer(TEXTS[0]).input_ids == loaded.tokenizer(TEXTS[0]).input_ids
    assert [Gguf(type=kind).identity for kind in TYPES] == [
        {"class": "prune_lab.export.gguf.Gguf", "type": kind} for kind in TYPES
    ]  # whose figures differ, in the size on disk


def test_the_package_that_is_missing_is_named() -> None:
    code = """
import importlib.machinery
find = importlib.machinery.PathFinder.find_spec
importlib.machinery.PathFinder.find_spec = classmethod(
    lambda cls, name, *rest: None if name == "gguf" else find(name, *rest)
)
from prune_lab.export.gguf import Gguf
try:
    Gguf()
except ValueError as error:
    print(error)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "written by the package gguf" in done.stdout
    assert done.stdout.strip().endswith('pip install "prune-lab[gguf]"')


def test_a_run_is_refused_before_its_work(small: list[str], cli: Cli, tmp_path: Path) -> None:
    """Nothing is loaded, calibrated or written for a family that is not written."""
    other = make_folder(tmp_path / "other", "gpt2")
    words = [f"model.name={other}" if word.startswith("model.name=") else word for word in small]
    done = cli(*words, "method=wanda", "export=gguf", "tracking=none", "hydra.run.dir=run")
    assert done.returncode == 2
    assert "export=gguf does not write models of the type 'gpt2'" in done.stderr
    assert not (tmp_path / "run" / "export").exists()


# --- llama.cpp's converter ---

needs_converter = pytest.mark.skipif(
    not (Path(LLAMA_CPP) / "convert_hf_to_gguf.py").is_file(),
    reason="llama.cpp's converter is not here: PRUNE_LAB_LLAMA_CPP names a folder that holds convert_hf_to_gguf.py",
)
# Runs the converter; a tokenizer whose hash it does not know is said to cut text by a name.
CONVERT = """
import sys
root, folder, out, kind, pre = sys.argv[1:]
sys.path.insert(0, root)
import conversion.base
if pre:
    conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: pre
import convert_hf_to_gguf
sys.argv = ["", folder, "--outfile", out, "--outtype", kind]
convert_hf_to_gguf.main()
"""
# Keys that it does not write: whether BOS and EOS are added, and a space put before, where it leaves them to the
# defaults of llama.cpp; and a base of rotary positions that is the default.
OURS_ALONE = r"tokenizer.ggml.add_(bos|eos)_token|tokenizer.ggml.add_space_prefix|gemma2?.rope.freq_base"
# Titles; and what it writes beside: numbers of CodeGemma's tokens for any Gemma, and that no SEP is added.
OTHERWISE = r"general.(name|tags)|tokenizer.ggml.(add_sep_token|(eot|prefix|suffix|middle|fim_\w+)_token_id)"
# Of added tokens the type and score: control or user-defined, where the converter reads tokenizer.model alone.
OF_ADDED = ("tokenizer.ggml.scores", "tokenizer.ggml.token_type")


def convert(folder: Path, out: Path, kind: str, pre: str) -> GGUFReader:
    done = subprocess.run(
        [sys.executable, "-c", CONVERT, LLAMA_CPP, str(folder), str(out), kind, pre],
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return GGUFReader(out)


def compare(
    ours: GGUFReader, theirs: GGUFReader, otherwise: str = OTHERWISE, added: frozenset[int] = frozenset()
) -> None:
    """Asserts the same metadata but for some keys, and the same bytes of all tensors."""
    a, b = metadata(ours), metadata(theirs)
    for key in OF_ADDED:
        for found in (a, b):
            if key in found:
                found[key] = [value for number, value in enumerate(found[key]) if number not in added]
    differing = {key for key in a.keys() | b.keys() if a.get(key) != b.get(key)}
    allowed = {key for key in differing if re.fullmatch(otherwise, key)}
    assert differing - allowed == {key for key in a.keys() - b.keys() if re.fullmatch(OURS_ALONE, key)}
    for key in a.keys() & b.keys():
        assert [str(kind) for kind in ours.fields[key].types] == [str(kind) for kind in theirs.fields[key].types]
    assert tensors(ours) == tensors(theirs)
    stored = {one.name: one.data for one in theirs.tensors}
    for one in ours.tensors:
        if one.name == "rope_freqs.weight":  # computed in another precision
            np.testing.assert_allclose(one.data, stored[one.name], rtol=1e-6)
        else:
            assert np.array_equal(one.data, stored[one.name]), one.name


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", *MIXTURES)},
    "bos": ("llama", {"vocab_size": 310}),
    "untied": ("qwen3", {"tie_word_embeddings": False}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3": ("llama", {"rope_parameters": LLAMA3}),
    "linear": ("mistral", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e3}}),
    "yarn": ("qwen3", {"rope_parameters": YARN}),
    "phi3": ("phi3", {"rope_parameters": FACTORS, "original_max_position_embeddings": 16}),
    "gemma 3, scaled": ("gemma3_text", {"sliding_window": 6, "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e3},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0}}}),
}  # fmt: skip


@needs_converter
@pytest.mark.parametrize("case", CASES)
def test_files_are_those_of_llama_cpps_converter(case: str, tmp_path: Path) -> None:
    """Of the same folder: every key and value but titles, tokens, merges, and tensors byte for byte."""
    family, changes = CASES[case]
    loaded = loaded_of(tmp_path, family, **changes)
    if case == "bos":  # put before a text as Llama 3 does it
        loaded.tokenizer.add_special_tokens({"bos_token": "<s>"})
        backend = loaded.tokenizer.backend_tokenizer
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 300)])
        loaded.tokenizer.chat_template = {"default": TEMPLATE, "tool_use": "x"}
    save_model(loaded, tmp_path / "hf")
    if family == "phi3":  # else it looks for a tokenizer.model
        config = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
        (tmp_path / "hf" / "tokenizer_config.json").write_text(
            json.dumps(config | {"tokenizer_class": "GPT2Tokenizer"})
        )
    for kind in ("f32", "q8_0") if case == "llama" else ("f16",):
        theirs = convert(tmp_path / "hf", tmp_path / f"{kind}.gguf", kind, "qwen2" if family == "qwen2" else "gpt-2")
        compare(written(loaded, tmp_path / kind, kind), theirs)


@needs_converter
@pytest.mark.parametrize("family", ["llama", "mistral", "mixtral", "gemma", "gemma2", "gemma3_text", "phi3"])
def test_vocabularies_are_those_of_llama_cpps_converter(family: str, tmp_path: Path) -> None:
    """Of a tokenizer.model, which it reads itself, and we as transformers has it: tokens, types and scores."""
    loaded = sentencepiece_of(tmp_path, family)
    save_model(loaded, tmp_path / "hf")
    shutil.copy(tmp_path / "made" / "tokenizer.model", tmp_path / "hf")
    theirs = convert(tmp_path / "hf", tmp_path / "f32.gguf", "f32", "")
    added = frozenset(range(8 if "gemma" in family else 3))  # control and user-defined
    compare(written(loaded, tmp_path / "ours"), theirs, added=added)


@needs_converter
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mixtral"])
def test_a_pruned_folder_is_converted_alike(family: str, small: list[str], cli: Cli, tmp_path: Path) -> None:
    """What a run exports as gguf, and what llama.cpp makes of its export=hf."""
    made = loaded_of(tmp_path, family).name
    words = [f"model.name={made}" if word.startswith("model.name=") else word for word in small]
    words += ["measure=quality_only", "tracking=none"]
    words += {
        "llama": ["method=structured", "method.units=[mlp,heads]", "amount=0.5"],
        "gemma3_text": ["method=depth", "amount=0.5"],
        "mixtral": ["method=experts", "amount=0.5"],
    }[family]
    for name in ("gguf", "hf"):
        done = cli(*words, f"export={name}", *["export.type=f32"] * (name == "gguf"), f"hydra.run.dir={name}")
        assert done.returncode == 0, done.stderr
    theirs = convert(tmp_path / "hf" / "export", tmp_path / "f32.gguf", "f32", "gpt-2")
    compare(
        GGUFReader(tmp_path / "gguf" / "export" / FILE), theirs, rf"{OTHERWISE}|gemma3.attention.sliding_window_pattern"
    )


@needs_converter
def test_names_of_patterns_are_llama_cpps() -> None:
    """The text, and every hash, are in its converter; every name is in its source."""
    known = json.loads((ROOT / "prune_lab" / "models" / "gguf" / "pre_tokenizers.json").read_text(encoding="utf-8"))
    source = (Path(LLAMA_CPP) / "conversion" / "base.py").read_text(encoding="utf-8")
    text = re.search(r"chktxt = ('.*')\n", source)
    assert text is not None
    assert ast.literal_eval(text.group(1)) == known["hashed_text"]
    table = dict(re.findall(r'chkhsh == "([0-9a-f]{64})":\s*# ref: \S+\s*res = "([^"]+)"', source))
    assert known["hashes"].items() <= table.items()
    vocabulary = Path(LLAMA_CPP) / "src" / "llama-vocab.cpp"
    if vocabulary.is_file():
        names = set(re.findall(r'tokenizer_pre == "([^"]+)"', vocabulary.read_text(encoding="utf-8")))
        assert {*known["names"], *known["hashes"].values()} <= names
        assert {pattern["name"] for pattern in known["patterns"]} <= names
