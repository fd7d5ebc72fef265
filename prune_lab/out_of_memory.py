"""Out of memory: what was going on, and which keys to lower. Told by the part of the package that asked for it."""

from __future__ import annotations

import gc
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prune_lab.results.summary import flatten

_PACKAGE = Path(__file__).parent
_SAYS = ("can't allocate memory", "not enough memory", "out of memory", "Cannot allocate memory", "std::bad_alloc")
_CALIBRATING = "calibrating", ("dataset.calibration.batch_size", "dataset.calibration.seq_len")
_TIMING = "timing", ("measure.prompt_tokens", "measure.batch_sizes", "measure.lengths")
# The first part of a path in the package, or all of it, -> what it does, and the keys that its memory depends on.
_WORK = {
    "recovery": ("training", ("recovery.batch_size", "recovery.rank", "dataset.seq_len")),
    "pruning/gradients.py": ("taking gradients", ("dataset.calibration.seq_len",)),
    **dict.fromkeys((f"pruning/{name}.py" for name in ("block_importance", "calibration", "statistics")), _CALIBRATING),
    "pruning": ("pruning", ()),
    "methods": ("pruning", ()),
    **dict.fromkeys((f"measure/{name}.py" for name in ("inference", "memory", "speed", "replayed")), _TIMING),
    "measure": ("measuring", ("measure.batch_size", "dataset.seq_len")),
    "models/load.py": ("loading the model", ()),
    "evaluator.py": ("copying the model", ()),
    "post": ("post-compressing", ()),
}
_TRAINING = "raise recovery.accumulate, set recovery.gradient_checkpointing=true, or "
_SMALLER = "take a smaller model or number type (dtype=bfloat16), or a device with more memory"


class OutOfMemory(RuntimeError):  # noqa: N818  (as Refused: it reads as what happened)
    """Memory could not be had. The message says what for, and which keys to lower."""


@contextmanager
def explained(config: dict[str, Any]) -> Iterator[None]:
    """Turns an error inside that is about memory into OutOfMemory."""
    try:
        yield
    except OutOfMemory:
        raise
    except Exception as error:
        if not _is_about_memory(error):
            raise
        said = " ".join(str(error).split())[:150]
        raise OutOfMemory(_hint(error, config) + (f" ({said})" if said else "")) from error


def _is_about_memory(error: BaseException) -> bool:
    """Whether an error, or what caused it, is that memory could not be had, on a CPU or a GPU."""
    torch = sys.modules.get("torch")  # a refusal may come before it is imported, which takes seconds
    kinds = (MemoryError,) if torch is None else (MemoryError, torch.OutOfMemoryError)
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, kinds):
            return True
        if isinstance(cause, RuntimeError | OSError) and any(words in str(cause) for words in _SAYS):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def _hint(error: BaseException, config: dict[str, Any]) -> str:
    """What it was doing and what to do, with the values that the keys have now."""
    what, keys = _work(error)
    now = flatten(config)
    lower = " or ".join(f"{key} (now {now[key]})" for key in keys if now.get(key) is not None)
    training = _TRAINING if what == "training" and "recovery.accumulate" in now else ""
    return f"out of memory while {what}: " + (f"lower {lower}, " if lower else "") + training + f"{_SMALLER}"


def give_back(error: BaseException) -> None:
    """Frees what the failed work held, so that the next job of the sweep has it."""
    cause: BaseException | None = error
    while cause is not None:
        traceback.clear_frames(cause.__traceback__)
        cause = cause.__cause__ or cause.__context__
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _work(error: BaseException) -> tuple[str, tuple[str, ...]]:
    """What the innermost part of the package was at that has an entry."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if path.is_relative_to(_PACKAGE):
            inside = path.relative_to(_PACKAGE)
            for part in (inside.as_posix(), inside.parts[0]):
                if part in _WORK:
                    return _WORK[part]
    return "working", ("measure.batch_size",)
