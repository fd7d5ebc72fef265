"""One job of the command line: its parts are built, it runs, and whatever ends it is put on record."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Any

from prune_lab import explain, interrupt, launch
from prune_lab.config import Parts
from prune_lab.console import Console
from prune_lab.errors import Refused
from prune_lab.place import Place
from prune_lab.summary import Summary
from prune_lab.turns import machine

log = logging.getLogger(__name__)
FAILED, REFUSED = 1, 2


def run(build: Callable[[], Parts], config: dict[str, Any], place: Place) -> float | tuple[float, ...] | None:
    """Runs a job and returns its `objectives`, for sweepers that search: one figure, or a tuple of several.

    In a sweep a job that is refused or fails leaves its summary and returns None, so that the others go on; a
    single run ends the program with exit code 2 or 1.
    """
    interrupt.end_on_signals()
    try:
        parts = build()  # what is refused here need not wait for what a run imports
        from prune_lab import outcome, runner

        console = Console(parts.settings.quiet)
        if place.sweep is not None:
            console.note(f"\njob {place.job}: {' '.join(place.overrides)}")
        # Processes that train one model together wait for each other: one of them must not pause alone.
        with machine.sharing() if launch.size() == 1 else nullcontext():
            summary = runner.run(parts, config, place, console)
    except Refused as error:
        _put_on_record(place, config, str(error), REFUSED)
        return None
    except Exception as error:
        log.exception("the run failed")
        reason = f"{type(error).__name__}: {explain.one_line(error)}"
        _put_on_record(place, config, f"{reason} (traceback in the run's log)", FAILED)
        return None
    except BaseException as error:  # Ctrl-C, or a signal
        _write(place, config, "KILLED", type(error).__name__)
        raise
    if launch.rank() == 0:
        outcome.show(summary, console)
    return _objectives(parts.settings.objectives, summary)


def _objectives(names: tuple[str, ...], summary: Summary) -> float | tuple[float, ...] | None:
    if missing := [name for name in names if name not in summary.metrics]:  # not measured, or it diverged
        log.warning("objectives: this run has no %s", ", ".join(missing))
        return None
    found = tuple(summary.metrics[name] for name in names)
    return found[0] if len(found) == 1 else found


def _put_on_record(place: Place, config: dict[str, Any], reason: str, exit_code: int) -> None:
    log.error("%s", reason)
    job = f"job {place.job} ({' '.join(place.overrides)}): " if place.sweep is not None else ""
    explain.to_stderr(f"{job}{reason}")
    _write(place, config, "FAILED", reason)
    if place.sweep is None:
        raise SystemExit(exit_code)


def _write(place: Place, config: dict[str, Any], status: str, reason: str) -> None:
    summary = Summary(status, choices=place.choices, overrides=place.overrides, config=config, reason=reason)
    with suppress(OSError):  # a full or read-only disk must not hide the reason itself
        summary.write(place.folder)
