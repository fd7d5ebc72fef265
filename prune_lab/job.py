"""One job of the command line: its parts are built, it runs, and whatever ends it is put on record."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Any

from prune_lab import cleanup, compatibility, explain, out_of_memory
from prune_lab.cache import why_not_kept
from prune_lab.config.parts import Parts
from prune_lab.errors import FAILED, REFUSED, Refused
from prune_lab.job_context import JobContext
from prune_lab.out_of_memory import OutOfMemory
from prune_lab.results.summary import Summary, read_summary
from prune_lab.system import interrupt, launch
from prune_lab.system.console import Console
from prune_lab.system.timing_lock import timing_lock

log = logging.getLogger(__name__)
_ASKED = 160  # characters of a job's overrides in a message
_EXTRAS = {
    "accelerate": "distributed", "compressed_tensors": "low-bits", "gguf": "gguf", "lm_eval": "tasks", "onnx": "onnx",
    "onnxruntime": "onnx", "onnxscript": "onnx", "pynvml": "energy",
}  # fmt: skip


def run(build: Callable[[], Parts], config: dict[str, Any], context: JobContext) -> float | tuple[float, ...] | None:
    """Runs a job and returns its `objectives`, for sweepers that search: one figure, or a tuple of several.

    In a sweep a job that is refused or fails leaves its summary and returns None, so that the others go on; a
    single run ends the program with exit code 2 or 1. So does one that finished and whose tracker does not have it, and
    of several processes a job that did not end so in all: the others may be waiting in the middle of it.
    """
    interrupt.end_on_signals()
    try:
        summary = perform(build, config, context)
    except Refused as error:
        _ended(context, str(error), REFUSED)
        return None
    except Exception as error:
        _ended(context, _reason(error), FAILED)
        return None
    if summary.unlogged is not None:
        _ended(context, f"finished, but {summary.unlogged}", FAILED)
    return _objectives(tuple(config["objectives"]), summary)


def perform(build: Callable[[], Parts], config: dict[str, Any], context: JobContext) -> Summary:
    """Runs a job, prints what came out, and returns its summary; what ends it otherwise is on record and raised.

    Raises Refused, also where a package is missing, or whatever made it fail.
    """
    cleanup.remove(context)
    record = _Record(context, config)
    _warn_once(why_not_kept())
    try:
        parts = build()  # what is refused here and in the next line need not wait for what a run imports
        compatibility.check_parts(parts, context.choices)
        from prune_lab import runner
        from prune_lab.results import outcome

        console = Console(parts.settings.quiet)
        if context.sweep is not None:
            console.note(f"\njob {context.job}: {' '.join(context.overrides)}")
        # Processes that train one model together wait for each other: one of them must not pause alone.
        with timing_lock.shared() if launch.size() == 1 else nullcontext(), out_of_memory.explained(config):
            summary = runner.run(parts, config, context, console)
    except Refused as error:
        record.failed(str(error))
        raise
    except ModuleNotFoundError as error:
        log.exception("a package is missing")
        record.failed(_not_installed(error))
        raise Refused(_not_installed(error)) from error
    except Exception as error:
        log.exception("the run failed")
        if isinstance(error, OutOfMemory):
            out_of_memory.give_back(error)
        record.failed(_reason(error))
        raise
    except BaseException as error:  # Ctrl-C, or a signal
        record.write("KILLED", type(error).__name__)
        raise
    if launch.rank() == 0:
        outcome.show(summary, console)
    return summary


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {explain.one_line(error)} (traceback in the run's log)"


def _ended(context: JobContext, message: str, exit_code: int) -> None:
    """Says what is wrong with a job, and ends a single run, or where a process among several is alone in it."""
    sweep = context.sweep is not None
    asked = " ".join(context.overrides)
    asked = asked if len(asked) <= _ASKED else f"{asked[:_ASKED]}..."  # the message itself must not be cut short
    explain.to_stderr((f"job {context.job} ({asked}): " if sweep else "") + message)
    if not sweep or (launch.size() > 1 and not _others_too(context)):
        raise SystemExit(exit_code)


def _others_too(context: JobContext) -> bool:
    from prune_lab.system.world import failed_alike  # imports PyTorch, for which a refused run does not wait

    return failed_alike(context.job)


def _not_installed(error: ModuleNotFoundError) -> str:
    package = str(error.name).partition(".")[0]
    what = f'"prune-lab[{_EXTRAS[package]}]"' if package in _EXTRAS else package.replace("_", "-")
    return f"this run needs {package}, which is not installed: pip install {what}"


def _objectives(names: tuple[str, ...], summary: Summary) -> float | tuple[float, ...] | None:
    if missing := [name for name in names if name not in summary.metrics]:  # not measured, or it diverged
        log.warning("objectives: this run has no %s", ", ".join(missing))
        return None
    found = tuple(summary.metrics[name] for name in names)
    return found[0] if len(found) == 1 else found


@functools.cache
def _warn_once(what: str | None) -> None:
    if what is not None:
        log.warning("%s", what)
        explain.to_stderr(f"warning: {what}")


class _Record:
    """Record of a job that does not finish."""

    def __init__(self, context: JobContext, config: dict[str, Any]) -> None:
        self._context, self._config = context, config
        self._earlier = read_summary(context.folder)  # of another run: the folder may have been used before

    def failed(self, reason: str) -> None:
        """Writes the reason."""
        log.error("%s", reason)
        self.write("FAILED", reason)

    def write(self, status: str, reason: str) -> None:
        """Writes the summary, unless the result was written already when something else went wrong."""
        found = read_summary(self._context.folder)
        if found is not None and found.status == "FINISHED" and found != self._earlier:
            return
        context = self._context
        summary = Summary(
            status, choices=context.choices, overrides=context.overrides, config=self._config, reason=reason
        )
        with suppress(OSError):  # a full or read-only disk must not hide the reason itself
            summary.write(context.folder)
