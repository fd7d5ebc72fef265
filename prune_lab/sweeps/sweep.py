"""A sweep as a whole: its record is opened before the first job, and closed whatever happens to the jobs.

Hydra calls SweepCallback in the process that was started; the jobs may run elsewhere. Hydra does not tell a
callback that a sweep was interrupted, so the command line closes what is still open. Imports here are light:
Hydra loads this module for --help too.
"""

from __future__ import annotations

import atexit
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from prune_lab import explain
from prune_lab.config.parts import build
from prune_lab.errors import REFUSED, Refused
from prune_lab.job_context import JobContext
from prune_lab.results.summary import FILE
from prune_lab.sweeps import remote
from prune_lab.system import interrupt, launch
from prune_lab.system.files import FileState, state_of


@dataclass
class _Sweep:
    """The sweep of this process."""

    folder: Path
    name: str
    tracker: Any
    quiet: bool
    earlier: frozenset[FileState]  # summaries of an earlier sweep in this folder: those that change are of this one
    closed: bool = False
    failed: bool = False


_current: _Sweep | None = None


class SweepCallback(Callback):
    """Opens and closes the sweep's record; a single run has none."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Opens it. Tracking must work before any work is done, so what fails here ends the program."""
        global _current
        interrupt.end_on_signals()  # the jobs may be other processes, which must not outlive this one
        try:
            tracker = build(config.tracking, "tracking")
            folder = Path(config.hydra.sweep.dir).absolute()
            tracker.open_sweep(str(config.name), folder)
        except Exception as error:  # Hydra makes warnings of a callback's errors
            explain.to_stderr(str(error) if isinstance(error, Refused) else explain.one_line(error))
            raise SystemExit(REFUSED) from error
        _current = _Sweep(
            folder, str(config.name), tracker, bool(config.quiet), frozenset(_summaries(_job_folders(folder)))
        )
        remote.pack(config, folder)
        atexit.register(close_open_sweep)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Closes it: all jobs have had their turn."""
        _close()


def place_of_job(hydra_config: Any) -> JobContext:
    """The place of the job that Hydra is running."""
    in_sweep = hydra_config.mode == RunMode.MULTIRUN
    overrides: Any = OmegaConf.to_container(hydra_config.overrides.task, resolve=False)  # as typed, ${...} and all
    runtime = hydra_config.runtime
    recipes = [source.path for source in runtime.config_sources if source.provider == "command-line"]
    return JobContext(
        folder=Path(runtime.output_dir),
        sweep=Path(hydra_config.sweep.dir).absolute() if in_sweep else None,
        job=str(hydra_config.job.num) if in_sweep else "",
        choices={key: str(value) for key, value in runtime.choices.items() if "hydra" not in key},
        overrides=[str(override) for override in overrides],
        recipe=str(hydra_config.job.config_name),
        recipes=os.path.relpath(recipes[0], runtime.cwd) if recipes else None,
        not_applicable={group: list(keys) for group, keys in hydra_config.job.get("not_applicable", {}).items()},
        removed=list(hydra_config.job.get("removed", [])),
    )


def close_open_sweep() -> None:
    """Closes a sweep that Hydra left open: interrupted, or refused before its first job. Does nothing twice."""
    _close("KILLED")


def close_broken_sweep() -> bool:
    """Closes a sweep whose launcher gave up, such as when a worker died; False where no job had begun."""
    _close("FAILED")
    return any_job_failed()


def any_job_failed() -> bool:
    """Whether a job of the sweep did not finish."""
    return _current is not None and _current.failed


def _close(ended: str | None = None) -> None:
    """Closes the open sweep; `ended` is its status where it did not come to its end."""
    sweep = _current
    if sweep is None or sweep.closed:
        return
    sweep.closed = True
    with interrupt.signals_deferred():
        remote.clear()
        _complete(sweep, ended)


def _complete(sweep: _Sweep, ended: str | None) -> None:
    """Writes the comparison and ends the record; a full disk or a lost store keeps nothing else from being done."""
    jobs = [job for job in _job_folders(sweep.folder) if sweep.earlier.isdisjoint(_summaries([job]))]
    if not jobs:
        with _told(sweep, "it could not be taken back"):
            sweep.tracker.discard_sweep(sweep.name, sweep.folder)
        return
    from prune_lab.sweeps import comparison
    from prune_lab.system.console import Console

    rows = [comparison.read_job(folder) for folder in jobs]
    unlogged = any(row.summary.unlogged is not None for row in rows)
    sweep.failed = unlogged or ended == "FAILED" or any(row.summary.status != "FINISHED" for row in rows)
    if launch.rank() > 0:  # it only helped to train: the first process has the figures
        return
    status = ended or ("FAILED" if sweep.failed else "FINISHED")
    hints: list[str] = []
    with _told(sweep, "its comparison could not be written"):
        comparison.write(sweep.folder, rows)
    with _told(sweep, f"its record could not be closed; prune-lab sync {shlex.quote(str(sweep.folder))} does it"):
        hints = sweep.tracker.close_sweep(sweep.name, sweep.folder, status, [row.summary for row in rows])
    console = Console(sweep.quiet)
    comparison.show(sweep.folder, rows, console)
    for hint in hints:
        console.result(hint)


@contextmanager
def _told(sweep: _Sweep, what: str) -> Iterator[None]:
    """An error inside is said, and makes the sweep a failed one, as far as the exit code goes."""
    try:
        yield
    except Exception as error:
        sweep.failed = True
        explain.to_stderr(f"sweep {sweep.folder}: {what} ({type(error).__name__}: {explain.one_line(error)[:200]})")


def _job_folders(folder: Path) -> list[Path]:
    """The folders that jobs made in the sweep's folder, in the order of the jobs."""
    jobs = [path for path in folder.glob("*") if path.is_dir() and path.name.isdigit()]
    return sorted(jobs, key=lambda path: int(path.name))


def _summaries(jobs: list[Path]) -> tuple[FileState, ...]:
    return state_of(job / FILE for job in jobs)
