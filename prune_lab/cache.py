"""Cache on disk: entries that could be computed anew, under a key of all that they are made of.

An entry is a folder of files with facts.json, which holds small facts and the checksums. It appears whole or not at
all; processes that want the same one wait for the first to make it; a damaged one is made again; and those that were
not used for longest go where all of them together would be larger than PRUNE_LAB_CACHE_GB (0: nothing is kept).
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prune_lab.errors import Refused
from prune_lab.fingerprint import digest_of
from prune_lab.system.files import as_path, owner_suffix, temporary_name
from prune_lab.system.lock import locked

log = logging.getLogger(__name__)
FACTS = "facts.json"
DEFAULT_GB = 10.0
KINDS = {
    "tokens": "tokenised text",
    "gguf": "models made of GGUF files",
    "layout": "blocks, matrices and units found in models, by config",
    "input_norm": "calibration: norms of the inputs of Linears",
    "gated_norm": "calibration: norms of the inputs of experts, times their gates",
    "variance": "calibration: means and variances of inputs",
    "gram": "calibration: gram matrices of inputs",
    "output_norm": "calibration: norms of the outputs of Linears",
    "saliency": "gradients of the dense model, first order",
    "saliency2": "gradients of the dense model, second order",
    "block_influence": "change of the states by each block",
    "block_distances": "angles of the states between blocks",
    "block_losses": "losses and divergences with blocks left out",
    "sensitivity": "loss increases of single blocks",
    "damage": "divergences of models cut along one axis",
    "hidden_scores": "scores of channels of the hidden size",
    "shape_costs": "sizes of models at the corners of their axes",
    "dense_export": "dense models as measure.engine loads them",
    "engine": "perplexity of dense models in measure.engine",
    "baseline": "quality, size and task scores of dense models",
    "continuations": "greedy continuations of prompts by dense models",
    "dense_states": "last states of dense models on the test text, for the divergence of others",
    "token_losses": "losses of dense models on the test text, for the interval of a ratio of perplexities",
}
_CANNOT_KEEP = (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM, errno.EDQUOT)


def cache_folder() -> Path:
    """The folder of PRUNE_LAB_CACHE, or prune_lab in the user's cache directory; without a home a temporary one."""
    named = os.environ.get("PRUNE_LAB_CACHE")
    try:
        if named:
            return as_path(named)
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "prune_lab"
    except RuntimeError:  # neither HOME nor an entry in the system's list of users, as in a container
        return _of_process()


@functools.cache
def _of_process() -> Path:
    return Path(tempfile.mkdtemp(prefix="prune_lab-", suffix=owner_suffix()))


def why_not_kept() -> str | None:
    """Reason that nothing can be kept in the cache folder; None where it can be written to."""
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            return None
        reason = os.strerror(errno.EACCES)
    except OSError as error:
        reason = error.strerror or str(error)
    return (
        f"the cache folder {folder} cannot be written ({reason}): nothing is kept for other runs, trainings leave no "
        "checkpoints; PRUNE_LAB_CACHE=FOLDER names another"
    )


Make = Callable[[Path], dict[str, Any]]  # writes files into a folder and returns the facts


@dataclass(frozen=True)
class Entry:
    """A whole entry: its folder and its metadata."""

    folder: Path
    metadata: dict[str, Any]


def limit_bytes() -> int:
    """Bytes that all entries together may take; raises Refused where PRUNE_LAB_CACHE_GB is no such number."""
    said = os.environ.get("PRUNE_LAB_CACHE_GB") or str(DEFAULT_GB)
    try:
        limit = float(said)
    except ValueError:
        limit = math.nan
    if not 0 <= limit < math.inf:
        raise Refused(f"PRUNE_LAB_CACHE_GB={said!r} must be a number of gigabytes, 0 or more; 0 keeps nothing")
    return int(limit * 1e9)


@contextmanager
def entry(kind: str, key: str, make: Make) -> Iterator[Entry]:
    """The entry of a kind under `key`, made by `make` where there is none that is whole; it stays while inside.

    What cannot be kept (no space, no permission, larger than the bound) is made in a temporary folder.
    """
    assert kind in KINDS, f"{kind}: what is no kind would be neither bounded nor shown nor cleared"
    folder = cache_folder() / kind / key
    for _ in range(3):  # it may be thrown out between being made and being read
        with locked(_lock(kind, key), "shared"):
            if (found := _read(folder)) is not None:
                with suppress(OSError):
                    os.utime(folder / FACTS)  # when it was last used
                yield found
                return
        with locked(_lock(kind, key), "exclusive") as held:
            alone = _make(folder, make, bool(held)) if _read(folder, and_remove=True) is None else None
        if alone is not None:
            try:
                yield alone
            finally:
                shutil.rmtree(alone.folder.parent, ignore_errors=True)
            return
        _bound(spare=folder)
    raise RuntimeError(f"{folder} was written and cannot be read")


@contextmanager
def found(kind: str, key: str) -> Iterator[Entry | None]:
    """The entry of a kind under `key`, which stays while inside; None where there is none that is whole."""
    folder = cache_folder() / kind / key
    with locked(_lock(kind, key), "shared"):
        entry = _read(folder)
        if entry is not None:
            with suppress(OSError):
                os.utime(folder / FACTS)  # when it was last used
        yield entry


def has(kind: str, key: str) -> bool:
    """True where there is such an entry, complete or damaged."""
    return (cache_folder() / kind / key / FACTS).exists()


def entries(kind: str) -> list[Path]:
    """The folders of a kind's entries, whole or damaged, the one unused for longest first."""
    folders = (cache_folder() / kind).glob("*")
    return sorted((folder for folder in folders if not folder.name.startswith(".")), key=last_used)


def last_used(folder: Path) -> float:
    """Time of an entry's last use, in seconds since the epoch; 0 where that is not known."""
    with suppress(OSError):  # damaged, or another process has thrown it out
        return (folder / FACTS).stat().st_mtime
    return 0.0


def size_of(folder: Path) -> int:
    """Bytes of all files under a folder."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def remove(folder: Path) -> bool:
    """Throws an entry out and says whether it is gone: one that a process is using stays."""
    lock = _lock(folder.parent.name, folder.name)
    with locked(lock, "now") as held:
        if held is not False:
            _throw_out(folder)
            with suppress(OSError):
                lock.unlink(missing_ok=True)
        return held is not False


def _bound(spare: Path) -> None:
    """Throws out what was not used for longest until all entries fit, but not the one to spare."""
    sizes = {folder: size_of(folder) for kind in KINDS for folder in entries(kind)}
    total, limit = sum(sizes.values()), limit_bytes()
    for folder in sorted(sizes, key=last_used):
        if total > limit and folder != spare and remove(folder):
            total -= sizes[folder]


def _make(folder: Path, make: Make, held: bool) -> Entry | None:
    """Makes an entry and returns it if it cannot be kept: then it lies in a temporary folder's folder."""
    half = temporary_name(folder)
    if held:  # whoever was writing there has died
        for left in folder.parent.glob(f".{folder.name}.*.tmp"):
            shutil.rmtree(left, ignore_errors=True)
    alone = None
    try:
        half.mkdir(parents=True)
        _write(half, make)
        if size_of(half) > limit_bytes():
            alone = _temporary()
            shutil.move(half, alone)
        else:
            with suppress(OSError):  # without locks another process may have been faster: its entry is the same
                half.rename(folder)
    except OSError as error:
        if half.is_dir() and error.errno not in _CANNOT_KEEP:
            raise
        log.warning("%s cannot be kept (%s): it is made for this run alone", folder, error)
        alone = _temporary()
        alone.mkdir()
        _write(alone, make)
    finally:
        shutil.rmtree(half, ignore_errors=True)
    return None if alone is None else _read(alone)


def _temporary() -> Path:
    return Path(tempfile.mkdtemp(prefix="prune_lab-", suffix=owner_suffix())) / "entry"


def _write(folder: Path, make: Make) -> None:
    facts = make(folder)
    files = {path.name: _sha256_of_file(path) for path in sorted(folder.iterdir())}
    whole = {"facts": facts, "files": files, "sha256": digest_of([facts, files])}
    (folder / FACTS).write_text(json.dumps(whole), encoding="utf-8")


def _read(folder: Path, and_remove: bool = False) -> Entry | None:
    """The entry in a folder if it is whole; otherwise, if asked for, it is removed with a warning."""
    if not folder.is_dir():
        return None
    try:
        whole = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        if whole["sha256"] != digest_of([whole["facts"], whole["files"]]):
            raise ValueError(f"{FACTS} has another checksum")
        for name, checksum in whole["files"].items():
            if _sha256_of_file(folder / name) != checksum:
                raise ValueError(f"{name} has another checksum")
        return Entry(folder, whole["facts"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if and_remove:
            log.warning("the cached files in %s are damaged (%s): they are made again", folder, error)
            _throw_out(folder)
        return None


def _throw_out(folder: Path) -> None:
    """Removes an entry: it is gone at once, also for who looks meanwhile."""
    gone = temporary_name(folder)
    with suppress(OSError):
        folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def _sha256_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _lock(kind: str, key: str) -> Path:
    return cache_folder() / "locks" / f"{kind}-{key}"
