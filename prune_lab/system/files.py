"""Files that appear whole or not at all, and what a killed process left in their place: the next start removes it."""

from __future__ import annotations

import glob
import hashlib
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

_MARK = re.compile(r"\.([0-9a-f]{8})-(\d+)\.tmp$")
_FORGOTTEN = 7 * 24 * 3600  # seconds after which a temporary of another machine is nobody's


def owner_suffix() -> str:
    """The end of a temporary file's or folder's name: it says whose it is."""
    return f".{_host()}-{os.getpid()}.tmp"


def temporary_name(path: Path) -> Path:
    """A name beside `path` for what is to take its place when it is whole."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{owner_suffix()}")


def as_path(name: str) -> Path:
    """The path that a person writes: ~ is the home folder, but not where only the name as it stands is there."""
    try:
        expanded = Path(name).expanduser()
    except RuntimeError:  # ~ of nobody
        return Path(name)
    return Path(name) if not expanded.exists() and Path(name).exists() else expanded


def matching(pattern: Path) -> list[Path]:
    """The paths that a glob names; folders that are there are no patterns, whatever their names hold."""
    there, rest = Path(pattern.anchor), list(pattern.parts[1 if pattern.anchor else 0 :])
    while rest and (there / rest[0]).exists():
        there /= rest.pop(0)
    if not rest:
        return [there]
    return [there / found for found in glob.glob(str(Path(*rest)), root_dir=there, recursive=True)]  # noqa: PTH207


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Where to write: it takes the place of `path` at the end, and is gone where the writing failed."""
    half = temporary_name(path)
    try:
        yield half
        half.replace(path)
    finally:
        half.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> Path:
    """Writes a text file whole or not at all and returns its path."""
    with atomic_write(path) as half:
        half.write_text(text, encoding="utf-8")
    return path


FileState = tuple[str, int, int]  # its name, bytes and time of its last change, in nanoseconds


def state_of(files: Iterable[Path]) -> tuple[FileState, ...]:
    """Name, bytes and time of the last change of each file that is there: equal where nothing was edited."""
    found = []
    for path in sorted(files):
        with suppress(OSError):
            status = path.stat()
            found.append((str(path), status.st_size, status.st_mtime_ns))
    return tuple(found)


def remove_stale_files(folder: Path, deep: bool = True) -> list[Path]:
    """Removes what ended processes left half-written in `folder` and, if deep, below it; returns what went."""
    removed: list[Path] = []
    for place, folders, names in os.walk(folder):
        found = [name for name in (*folders, *names) if _is_leftover(Path(place, name))]
        folders[:] = [name for name in folders if deep and not name.endswith(".tmp")]
        for path in (Path(place, name) for name in found):
            with suppress(OSError):  # not ours to remove, or another start was faster
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
                removed.append(path)
    return removed


def _is_leftover(path: Path) -> bool:
    found = _MARK.search(path.name)
    if found is None:
        return False
    if found[1] == _host():
        return not psutil.pid_exists(int(found[2]))
    try:
        return time.time() - path.lstat().st_mtime > _FORGOTTEN
    except OSError:
        return False


def _host() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
