"""Tokenised text on disk, kept by what it is made of and read without being loaded: memory does not grow with it."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from prune_lab.files import half_of

log = logging.getLogger(__name__)
TOKENS, STARTS, FACTS = "tokens.i32", "starts.i64", "facts.json"
Run = tuple[Iterable[int], int]  # the tokens of a document (or a piece of text), and its bytes of UTF-8


@dataclass(frozen=True)
class Stored:
    """Tokens of a text: ids (int32, from disk as they are read), where each run starts (and the end), UTF-8 bytes."""

    ids: Tensor
    starts: Tensor
    n_bytes: int
    largest: int  # id; -1 where there is no token


def stored_tokens(folder: Path, key: str, make: Callable[[], Iterator[Run]]) -> Stored:
    """The tokens kept under `key` in `folder`; made, and kept from then on, where there are none or they are damaged.

    Entries appear whole or not at all, so that processes side by side may ask for the same one.
    """
    entry = folder / key
    found = _read(entry)
    if found is None:
        _write(entry, make())
        found = _read(entry)
        if found is None:
            raise RuntimeError(f"{entry} was written and cannot be read")
    return found


def _write(entry: Path, runs: Iterator[Run]) -> None:
    half = half_of(entry)
    half.mkdir(parents=True)
    try:
        digest, starts, n_bytes, largest = hashlib.sha256(), array("q", [0]), 0, -1
        with (half / TOKENS).open("wb") as file:
            for ids, size in runs:
                block = array("i", ids)
                digest.update(block.tobytes())
                file.write(block.tobytes())
                starts.append(starts[-1] + len(block))
                n_bytes, largest = n_bytes + size, max(largest, max(block, default=-1))
        (half / STARTS).write_bytes(starts.tobytes())
        digest.update(starts.tobytes())
        facts = {
            "tokens": starts[-1], "runs": len(starts) - 1, "bytes": n_bytes, "largest": largest,
            "sha256": digest.hexdigest(),
        }  # fmt: skip
        (half / FACTS).write_text(json.dumps(facts), encoding="utf-8")
        with suppress(OSError):  # another process was faster: its entry is the same
            half.rename(entry)
    finally:
        shutil.rmtree(half, ignore_errors=True)


def _read(entry: Path) -> Stored | None:
    """The entry, or None where there is none; one that is damaged is removed."""
    if not entry.is_dir():
        return None
    try:
        facts = json.loads((entry / FACTS).read_text(encoding="utf-8"))
        if _sha256(entry) != facts["sha256"]:
            raise ValueError("its checksum is another one")
        ids = _from_disk(entry / TOKENS, facts["tokens"], torch.int32)
        starts = _from_disk(entry / STARTS, facts["runs"] + 1, torch.int64)
        return Stored(ids, starts, int(facts["bytes"]), int(facts["largest"]))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        log.warning("the cached tokens in %s are damaged (%s): they are made again", entry, error)
        shutil.rmtree(entry, ignore_errors=True)
        return None


def _sha256(entry: Path) -> str:
    digest = hashlib.sha256()
    for name in (TOKENS, STARTS):
        with (entry / name).open("rb") as file:
            while block := file.read(2**22):
                digest.update(block)
    return digest.hexdigest()


def _from_disk(path: Path, size: int, dtype: torch.dtype) -> Tensor:
    return torch.from_file(str(path), shared=False, size=size, dtype=dtype) if size else torch.empty(0, dtype=dtype)
