"""Tokenised text on disk, kept by what it is made of and read without being loaded: memory does not grow with it."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prune_lab import cache as store

TOKENS, STARTS = "tokens.i32", "starts.i64"
Run = tuple[Iterable[int], int]  # the tokens of a document (or a piece of text), and its bytes of UTF-8


@dataclass(frozen=True)
class Stored:
    """Tokens of a text: ids (int32, from disk as they are read), where each run starts (and the end), UTF-8 bytes."""

    ids: Tensor
    starts: Tensor
    n_bytes: int
    largest: int  # id; -1 where there is no token


def stored_tokens(key: str, make: Callable[[], Iterator[Run]]) -> Stored:
    """The tokens kept under `key`; made, and kept from then on, where there are none or they are damaged."""
    with store.entry("tokens", key, lambda folder: _write(folder, make())) as entry:
        facts = entry.metadata
        ids = _from_disk(entry.folder / TOKENS, facts["tokens"], torch.int32)
        starts = _from_disk(entry.folder / STARTS, facts["runs"] + 1, torch.int64)
        return Stored(ids, starts, int(facts["bytes"]), int(facts["largest"]))  # the files stay while they are mapped


def _write(folder: Path, runs: Iterator[Run]) -> dict[str, Any]:
    starts, n_bytes, largest = array("q", [0]), 0, -1
    with (folder / TOKENS).open("wb") as file:
        for ids, size in runs:
            block = array("i", ids)
            file.write(block.tobytes())
            starts.append(starts[-1] + len(block))
            n_bytes, largest = n_bytes + size, max(largest, max(block, default=-1))
    (folder / STARTS).write_bytes(starts.tobytes())
    return {"tokens": starts[-1], "runs": len(starts) - 1, "bytes": n_bytes, "largest": largest}


def _from_disk(path: Path, size: int, dtype: torch.dtype) -> Tensor:
    return torch.from_file(str(path), shared=False, size=size, dtype=dtype) if size else torch.empty(0, dtype=dtype)
