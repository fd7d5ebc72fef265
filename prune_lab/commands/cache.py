"""`prune-lab cache`: what is kept in the cache folder, and throwing it out."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from prune_lab import cache as store
from prune_lab import explain
from prune_lab.cache import cache_folder
from prune_lab.errors import OK, REFUSED, Refused
from prune_lab.system.console import Console

USAGE = """usage: prune-lab cache                what is kept, how much, and when it was last used
       prune-lab cache clear          throws out all that can be computed anew
       prune-lab cache clear KIND     throws out one kind; training and finished only by name
"""
# Not thrown out but by name: they cannot be computed anew, or only by computing the runs again.
LASTING = {
    "training": "checkpoints of unfinished trainings",
    "finished": "index of finished runs without tracking, by experiment",
}


def main(arguments: list[str]) -> int:
    """Runs the command and returns its exit code."""
    try:
        match arguments:
            case []:
                _show()
            case ["clear"]:
                _clear(list(store.KINDS))
            case ["clear", kind] if kind in (*store.KINDS, *LASTING):
                _clear([kind])
            case ["-h" | "--help", *_]:
                sys.stdout.write(USAGE)
            case ["clear", kind]:
                raise Refused(f"cache clear {kind}: the kinds are {', '.join((*store.KINDS, *LASTING))}")
            case _:
                raise Refused(f"cache {' '.join(arguments)}: give nothing, clear, or clear KIND")
    except Refused as error:
        explain.to_stderr(str(error))
        return REFUSED
    return OK


def _show() -> None:
    bound = store.limit_bytes()
    table = Table(title=str(cache_folder()), title_justify="left", box=SIMPLE_HEAD)
    for name in ("kind", "entries", "MB", "last used", ""):
        table.add_column(name, justify="right" if name in ("entries", "MB") else "left")
    total = 0
    for kind, what in (store.KINDS | LASTING).items():
        found = store.entries(kind)
        size = sum(map(store.size_of, found))
        total += size if kind in store.KINDS else 0
        if found:
            table.add_row(kind, str(len(found)), f"{size / 1e6:.2f}", _age(max(map(_last_used, found))), what)
    console = Console()
    console.result(table)
    apart = "" if not any(map(store.entries, LASTING)) else f"; {' and '.join(LASTING)} are apart"
    console.result(f"{total / 1e6:.2f} MB of at most {bound / 1e6:,.0f} MB (PRUNE_LAB_CACHE_GB){apart}")


def _clear(kinds: list[str]) -> None:
    removed = busy = size = 0
    for folder in (folder for kind in kinds for folder in store.entries(kind)):
        of_this = store.size_of(folder)
        if store.remove(folder):
            removed, size = removed + 1, size + of_this
        else:
            busy += 1
    in_use = f"; {busy} in use stay" if busy else ""
    Console().result(f"{removed} entries thrown out, {size / 1e6:.2f} MB{in_use}")


def _last_used(folder: Path) -> float:
    return store.last_used(folder) or folder.stat().st_mtime


def _age(when: float) -> str:
    seconds = max(0.0, time.time() - when)
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return "just now"
