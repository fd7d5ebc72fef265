"""python -m prune_lab sync [FOLDER ...]: logs finished runs that the MLflow store does not have. Idempotent."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from prune_lab import explain
from prune_lab.errors import FAILED, OK, REFUSED, Refused
from prune_lab.job_context import JobContext
from prune_lab.results.summary import FILE, RESULTS, Summary, read_summary
from prune_lab.sweeps.comparison import read_job, write
from prune_lab.tracking.mlflow_sync import AT_WORK, HELD, Syncing

FOLDERS = ("outputs", "multirun")


def main(arguments: list[str]) -> int:
    """Runs a command line and returns its exit code: 0 all is in the store, 1 something is not, 2 refused."""
    parser = explain.Parser(
        prog="python -m prune_lab sync",
        description="Logs finished runs (summary.json) to the MLflow store, if it does not have them yet.",
        epilog="The store is sqlite:///mlflow.db here, or MLFLOW_TRACKING_URI; the experiment is each run's own.",
    )
    where = "a run's folder, a sweep's, or one above them (outputs and multirun)"
    parser.add_argument("folders", nargs="*", metavar="FOLDER", type=Path, help=where)
    try:
        folders = parser.parse_args(arguments).folders or [Path(name) for name in FOLDERS if Path(name).is_dir()]
        return _sync(folders)
    except Refused as error:
        explain.to_stderr(str(error))
        return REFUSED


def _sync(folders: list[Path]) -> int:
    for folder in folders:
        if not folder.is_dir():
            raise Refused(f"{folder}: no such folder; name one that runs wrote to, such as outputs or multirun")
    places, failed, counts = _find(folders), False, {"logged": 0, HELD: 0, AT_WORK: 0}
    for sweep in dict.fromkeys(context.sweep for context, _ in places):
        jobs = [(context, summary) for context, summary in places if context.sweep == sweep]
        try:
            for said, outcome in _log(sweep, jobs):
                if outcome in counts:
                    counts[outcome] += 1
                if said:
                    print(said)  # noqa: T201
        except Refused:
            raise
        except Exception as error:  # each kind of store has its own errors
            failed = True
            explain.to_stderr(f"{sweep or jobs[0][0].folder}: {type(error).__name__}: {explain.one_line(error)[:200]}")
    print("sync: " + ", ".join(f"{count} {outcome}" for outcome, count in counts.items()))  # noqa: T201
    return FAILED if failed else OK


def _find(folders: list[Path]) -> list[tuple[JobContext, Summary]]:
    """The finished runs below folders, oldest first, each once; each by its context."""
    files = {Path(os.path.abspath(path)) for folder in folders for path in folder.rglob(FILE)}  # noqa: PTH100 (no links followed)
    found = []
    for path in sorted(files, key=lambda path: (path.stat().st_mtime, path)):
        summary = read_summary(path.parent)
        if summary is not None and summary.status == "FINISHED" and summary.fingerprint and summary.config:
            sweep = path.parent.parent
            is_job = path.parent.name.isdigit() and any((sweep / name).is_file() for name in ("multirun.yaml", RESULTS))
            found.append(
                (JobContext(path.parent, sweep if is_job else None, path.parent.name if is_job else ""), summary)
            )
    return found


def _log(sweep: Path | None, jobs: list[tuple[JobContext, Summary]]) -> Iterable[tuple[str, str]]:
    """Logs the runs of a sweep, or single ones, and completes the sweep's record; what was done, and its outcome."""
    syncing = {name: Syncing(name) for name in dict.fromkeys(_experiment(summary) for _, summary in jobs)}
    for context, summary in jobs:
        outcome = syncing[_experiment(summary)].ensure(context, summary, _files(context.folder))
        yield (f"{context.folder}: {outcome}" if outcome != HELD else ""), outcome
    if sweep is not None and len(syncing) == 1 and (sweep / RESULTS).is_file():
        (store,) = syncing.values()
        rows = [read_job(path) for path in sorted(sweep.iterdir()) if path.name.isdigit()]
        if store.lacks_comparison(sweep):
            write(sweep, sorted(rows, key=lambda row: int(row.job)))
            store.close_sweep(sweep, [row.summary for row in rows])
            yield f"{sweep}: its comparison is logged", "sweep"


def _experiment(summary: Summary) -> str:
    return str(summary.config.get("name", "prune_lab"))


def _files(folder: Path) -> list[Path]:
    """What a run leaves beside its summary, without its log and its export."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_file() and not path.name.startswith(".") and path.suffix != ".log" and path.name != FILE
    )
