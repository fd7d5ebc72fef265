"""Definitions of lm-eval's tasks: found by name in its YAML files.

lm-eval's own index parses all of its 14,000 files (8 s on one core); here they are only searched (under one), and by
file name first, since most tasks are called as their file.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
from functools import cache
from pathlib import Path

from prune_lab.errors import Refused

_DECLARED = re.compile(rb"""^["']?(task|group|class)["']?:[ \t]*["']?([^"'\s#\[]+)""", re.MULTILINE)


def find_definitions(names: tuple[str, ...]) -> dict[str, Path]:
    """The YAML file of each task; raises Refused where lm-eval is missing or has no such task."""
    files = _yaml_files()
    found = {name: path for name in names for path in files if path.stem == name and _task_of(path) == name}
    missing = [name for name in names if name not in found]
    if missing:
        known = _all_tasks()
        found |= {name: known[name] for name in missing if name in known}
    for name in missing:
        if name not in found:
            close = ", ".join(difflib.get_close_matches(name, known, 5)) or "none"
            raise Refused(
                f"measure.tasks: lm-eval has no task {name!r}; close ones: {close} (of a group or tag name the tasks "
                "in it)"
            )
    return found


@cache
def _yaml_files() -> tuple[Path, ...]:
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or spec.origin is None:
        raise Refused('measure.tasks needs lm-eval, which is not installed: pip install "prune-lab[tasks]"')
    if importlib.util.find_spec("accelerate") is None:  # lm-eval's own class for models imports it
        raise Refused('measure.tasks needs accelerate, which is not installed: pip install "prune-lab[tasks]"')
    root = str(Path(spec.origin).parent / "tasks")
    found = [(folder, name) for folder, _, names in os.walk(root) for name in names if name.endswith(".yaml")]
    return tuple(Path(folder, name) for folder, name in sorted(found))


@cache
def _all_tasks() -> dict[str, Path]:
    """Every task's file; of two with one name the first, as lm-eval takes it."""
    found: dict[str, Path] = {}
    for path in _yaml_files():
        if (name := _task_of(path)) is not None:
            found.setdefault(name, path)
    return found


def _task_of(path: Path) -> str | None:
    """The task that a file defines; None for a group and for what only others include."""
    declared = dict(_DECLARED.findall(path.read_bytes()))
    is_group = b"group" in declared and b"class" not in declared
    return declared[b"task"].decode() if b"task" in declared and not is_group else None
