"""Texts as token ids: all of a text, whatever its length."""

from __future__ import annotations

import json
from typing import Any

from prune_lab.fingerprint import digest_of

_NOT_IDS = ("truncation", "padding", "version")
_PLACES = ("name_or_path", "is_local", "local_files_only", "cache_dir", "tokenizer_object")


def encode(tokenizer: Any, texts: list[str], special: bool) -> list[list[int]]:
    """The token ids of each text, with the tokenizer's special tokens around each or without; nothing is cut off.

    Goes to the tokenizer's backend where it has one: transformers' own way makes masks that nobody reads, takes twice
    as long and, with texts of a megabyte, grows by 50 MB a call (transformers 5.23).
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        # verbose=False: texts are longer than the model's context on purpose; they are cut into windows.
        found: list[list[int]] = tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]
        return found
    backend.no_truncation()
    backend.no_padding()
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=special)]


def tokenizer_sha256(tokenizer: Any) -> str:
    """sha256 over all by which a tokenizer turns text into ids; `encode` neither cuts nor pads, whatever it says."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # written in Python: its class, its settings and its vocabulary
        model = getattr(tokenizer, "sp_model", None)
        pieces = model.serialized_model_proto().hex() if model is not None else None
        parts = [type(tokenizer).__name__, tokenizer.get_vocab(), tokenizer_settings(tokenizer), pieces]
    else:
        parts = [{key: value for key, value in json.loads(backend.to_str()).items() if key not in _NOT_IDS}]
    return digest_of([*parts, tokenizer.bos_token_id])  # with dataset.add_bos a window begins with it


def tokenizer_settings(tokenizer: Any) -> dict[str, Any]:
    """Settings as in tokenizer_config.json, without the paths of files."""
    settings = {**tokenizer.init_kwargs, "chat_template": tokenizer.chat_template, "class": type(tokenizer).__name__}
    return {key: value for key, value in settings.items() if key not in _PLACES and not key.endswith("_file")}
