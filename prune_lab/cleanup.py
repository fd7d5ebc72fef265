"""A start looks where killed runs may have left something half-written, and removes it."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

from prune_lab.cache import cache_folder
from prune_lab.job_context import JobContext
from prune_lab.system.files import remove_stale_files


def remove(context: JobContext) -> None:
    """Looks in the cache folder, where runs are kept, and where temporary files lie; each once in a process."""
    _once(cache_folder())
    _once(_root(context.sweep or context.folder))
    _once(Path.cwd(), deep=False)  # where a store may have been made
    _once(Path(tempfile.gettempdir()), deep=False)


@cache
def _once(folder: Path, deep: bool = True) -> None:
    remove_stale_files(folder, deep)


def _root(folder: Path) -> Path:
    """outputs or multirun, for a run's or sweep's folder in it (DATE/TIME); any other folder by itself."""
    here = Path.cwd()
    inside = folder.relative_to(here).parts if folder.is_relative_to(here) else ()
    return here / inside[0] if len(inside) == 3 and inside[0] in ("outputs", "multirun") else folder
