"""Texts as token ids: all of a text, whatever its length."""

from __future__ import annotations

import hashlib
import json
from typing import Any


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
    """sha256 over all that a tokenizer is made of."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
