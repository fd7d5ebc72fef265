"""Runs that finished without the MLflow store, entered into it afterwards."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from prune_lab.job_context import JobContext
from prune_lab.results.summary import FILE, Summary
from prune_lab.tracking.connection import connect
from prune_lab.tracking.mlflow_log import MlflowLog
from prune_lab.tracking.mlflow_store import (
    FINGERPRINT,
    NOTE,
    PARENT,
    REUSED,
    Mlflow,
    create_run,
    find_parent,
    reconcile,
)
from prune_lab.tracking.ownership import is_alive

LOGGED, HELD, AT_WORK = "logged", "held already", "at work"
SYNCED = "prune_lab.synced"


class Syncing:
    """An experiment of the store. Raises Refused where there is no store."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._client, self._experiment = connect(name)
        reconcile(self._client, self._experiment)

    def ensure(self, context: JobContext, summary: Summary, files: list[Path]) -> str:
        """Logs a finished run that the store does not have; LOGGED, HELD or AT_WORK. Its file then says no more."""
        if summary.reused_from and context.sweep is None:
            return HELD
        tags = {REUSED: summary.reused_from} if summary.reused_from else {FINGERPRINT: summary.fingerprint}
        runs = self._runs(tags, context)
        if any(run.info.status == "FINISHED" for run in runs):
            outcome = HELD
        elif any(run.info.status == "RUNNING" and is_alive(run.data.tags) for run in runs):
            return AT_WORK
        else:
            self._log(context, summary, files, tags)
            outcome = LOGGED
        if summary.unlogged is not None:
            _as_logged(summary).write(context.folder)
        return outcome

    def lacks_comparison(self, sweep: Path) -> bool:
        """Whether the sweep's parent was never closed, though its process is gone or it never was there."""
        parent = find_parent(self._client, self._experiment, sweep)
        if parent is None:
            return True
        run = self._client.get_run(parent)
        return NOTE not in run.data.tags and (run.info.status != "RUNNING" or not is_alive(run.data.tags))

    def close_sweep(self, sweep: Path, summaries: list[Summary]) -> None:
        """Gives the sweep's parent its comparison and its status."""
        tracker = Mlflow()
        if find_parent(self._client, self._experiment, sweep) is None:
            tracker.open_sweep(self._name, sweep)
        finished = all(summary.status == "FINISHED" for summary in summaries)
        tracker.close_sweep(self._name, sweep, "FINISHED" if finished else "FAILED", summaries)

    def _runs(self, tags: dict[str, str], context: JobContext) -> list[Any]:
        """The runs with these tags; those of a result that was reused, among the children of its sweep alone."""
        key, value = next(iter(tags.items()))
        if key == REUSED:  # it may name a folder, which a search would have to quote
            assert context.sweep is not None
            parent = find_parent(self._client, self._experiment, context.sweep) or "none"
            children = self._client.search_runs([self._experiment], f"tags.`{PARENT}` = '{parent}'")
            return [run for run in children if run.data.tags.get(REUSED) == value]
        found: list[Any] = list(self._client.search_runs([self._experiment], f"tags.`{key}` = '{value}'"))
        return found

    def _log(self, context: JobContext, summary: Summary, files: list[Path], tags: dict[str, str]) -> None:
        if context.sweep is not None and find_parent(self._client, self._experiment, context.sweep) is None:
            Mlflow().open_sweep(self._name, context.sweep)
        log, logged = MlflowLog(), _as_logged(summary)
        log.begin(self._client, create_run(self._client, self._experiment, logged, context, {**tags, SYNCED: "true"}))
        if summary.unlogged is not None:
            logged.write(context.folder)
        log.result(logged, [context.folder / FILE, *files])
        log.end("FINISHED")
        if log.lost is not None:
            summary.write(context.folder)
            raise RuntimeError(f"the store did not take it: {log.lost}")


def _as_logged(summary: Summary) -> Summary:
    """The summary without what says that it is not in the store."""
    warnings = [warning for warning in summary.warnings if warning != summary.unlogged]
    return replace(summary, warnings=warnings, unlogged=None)
