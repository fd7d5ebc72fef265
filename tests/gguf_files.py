"""Small GGUF files of folders in the Hub's layout, written by the package gguf as llama.cpp's converter has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import make_folder
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter, get_tensor_name_map, quants
from safetensors.torch import load_file

TEMPLATE = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
SHAPE = {"intermediate_size": 64}  # blocks of 32 numbers
KEYS: dict[str, Any] = {
    "general.name": "a small one",
    "general.license": "apache-2.0",
    "llama.context_length": 128,
    "llama.embedding_length": 32,
    "llama.block_count": 2,
    "llama.feed_forward_length": 64,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-6,
    "llama.rope.freq_base": 10000.0,
    "llama.rope.dimension_count": 8,
    "llama.vocab_size": 300,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.bos_token_id": 0,
    "tokenizer.ggml.eos_token_id": 0,
    "tokenizer.ggml.add_bos_token": True,
    "tokenizer.chat_template": TEMPLATE,
}


def make_gguf(path: Path, kind: str = "Q8_0", seed: int = 0, architecture: str = "llama", **changes: Any) -> Path:
    """A file of a small Llama whose matrices are of a kind; the folder that it is made of lies beside, path.hub.

    changes: keys with other values, their points as two underscores, or None for no such key; `tensors`: more tensors.
    """
    more = changes.pop("tensors", {})
    folder = make_folder(path.with_suffix(".hub"), "llama", seed, **SHAPE)
    writer = GGUFWriter(path, architecture)
    for key, value in (KEYS | {key.replace("__", "."): value for key, value in changes.items()}).items():
        key = key.replace("llama.", f"{architecture}.", 1) if key.startswith("llama.") else key
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        if value is not None:
            add[type(value)](key, value)
    backend = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = backend["model"]["vocab"] | {token["content"]: token["id"] for token in backend["added_tokens"]}
    special = {token["id"] for token in backend["added_tokens"]}
    writer.add_token_list(sorted(vocabulary, key=vocabulary.__getitem__))
    writer.add_token_types([3 if number in special else 1 for number in range(len(vocabulary))])
    writer.add_token_merges([" ".join(pair) for pair in backend["model"]["merges"]])
    for name, tensor in (stored(folder) | {key: torch.ones(shape) for key, shape in more.items()}).items():
        number = GGMLQuantizationType.F32 if tensor.ndim == 1 else GGMLQuantizationType[kind]
        writer.add_tensor(name, quants.quantize(tensor.numpy(), number), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """A Llama's tensors by their names in GGUF, the rows of queries and keys in the order of llama.cpp."""
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, 2)
    found = {}
    for key, tensor in load_file(folder / "model.safetensors").items():
        name = names.get_name(key, (".weight", ".bias"))
        assert name is not None
        heads = {"q": 4, "k": 2}.get(name.partition("attn_")[2][:1]) if ".attn_" in name else None
        is_turned = heads is not None and name.endswith(("attn_q.weight", "attn_k.weight"))
        found[name] = turned(tensor, heads) if is_turned and heads else tensor
    return found


def turned(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows in pairs, as llama.cpp turns them: the two halves of a head interleaved."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape).contiguous()


def dequantised(folder: Path, kind: str) -> dict[str, np.ndarray[Any, Any]]:
    """What the package gguf makes of each matrix of a folder, quantized row by row and back; vectors as they are."""
    number = GGMLQuantizationType[kind]
    found = {}
    for key, tensor in load_file(folder / "model.safetensors").items():
        values = tensor.numpy()
        found[key] = values if values.ndim == 1 else quants.dequantize(quants.quantize(values, number), number)
    return found
