"""tracking=mlflow: runs, sweeps and their files in an MLflow store.

Everything goes through MlflowClient with explicit run ids: no active run, nothing global, so that jobs in other
processes and a sweep's parent never get in each other's way.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prune_lab.explain import one_line
from prune_lab.job_context import JobContext
from prune_lab.results.summary import EXPORT, Summary, from_dict
from prune_lab.system.files import owner_suffix
from prune_lab.system.interrupt import signals_deferred
from prune_lab.tracking import links
from prune_lab.tracking.base import Tracker
from prune_lab.tracking.connection import connect, reaching
from prune_lab.tracking.mlflow_log import MlflowLog, end, log_metrics, register
from prune_lab.tracking.ownership import is_alive, owner_tags
from prune_lab.tracking.params import params_of, run_name

PARENT, SWEEP = "mlflow.parentRunId", "prune_lab.sweep"
PLACE = "prune_lab.sweep_sha256"  # of the sweep's folder: a search by the folder itself would have to quote its name
FINGERPRINT, REUSED = "prune_lab.fingerprint", "prune_lab.reused_from"
NOTE = "mlflow.note.content"  # what the UI shows of a run as its description


@dataclass(frozen=True)
class Mlflow(Tracker):
    """Tracks in the store that MLFLOW_TRACKING_URI names, or in mlflow.db in the working folder.

    register: name of a registered model, of which the export becomes a version.
    """

    register: str | None = None

    def __post_init__(self) -> None:
        name = self.register
        if name is not None and (not name.strip() or name in (".", "..") or {*name} & {*"/:'\\"}):
            raise ValueError(f"register={name!r} is no name of a registered model: give one without / : ' and \\")

    @contextmanager
    def start_run(self, name: str, summary: Summary, context: JobContext) -> Iterator[MlflowLog]:
        """A run under its sweep's parent, if it has one; what ends it decides its status.

        A job of a sweep, whose store was there when the sweep began, goes on where it is not there any more.
        """
        log = MlflowLog()
        try:
            try:
                client, experiment = connect(name)
                reconcile(client, experiment)
                with signals_deferred():
                    tags = {FINGERPRINT: summary.fingerprint}
                    log.begin(client, create_run(client, experiment, summary, context, tags))
            except Exception as error:
                if context.sweep is None:
                    raise
                log.lost = one_line(error)[:200]
            yield log
        except Exception as error:
            log.end("FAILED", f"{type(error).__name__}: {error}")
            raise
        except BaseException as error:  # Ctrl-C, or a signal
            log.end("KILLED", type(error).__name__)
            raise
        log.end("FINISHED")
        if log.lost is not None:
            summary.unlogged = _unlogged(log.lost, context)

    def find_finished(self, name: str, fingerprint: str) -> Summary | None:
        """Reads summary.json back from the finished run with this fingerprint. Raises Unreachable."""
        client, experiment = connect(name)
        query = f"attributes.status = 'FINISHED' and tags.`{FINGERPRINT}` = '{fingerprint}'"
        with reaching():
            for run in client.search_runs([experiment], query, max_results=1):
                return stored_summary(client, run.info.run_id)
        return None

    def enter_again(self, name: str, summary: Summary, context: JobContext) -> None:
        """Child of a sweep with the earlier run's figures, tagged with its id instead of a fingerprint.

        Its export is registered where that is asked for now.
        """
        if self.register is not None and (Path(summary.folder) / EXPORT).is_dir() and summary.reused_from:
            try:
                client, _ = connect(name)
                note = register(client, summary.reused_from, self.register, Path(summary.folder) / EXPORT)
                summary.warnings.append(note)
            except Exception as error:
                summary.unlogged = _unlogged(one_line(error)[:200], context)
        if context.sweep is None:
            return
        try:
            client, experiment = connect(name)
            with signals_deferred():
                run_id = create_run(client, experiment, summary, context, {REUSED: summary.reused_from or ""})
                log_metrics(client, run_id, summary.metrics)
                end(client, run_id, "FINISHED", None)
        except Exception as error:  # the result itself stands in the store already
            summary.unlogged = _unlogged(one_line(error)[:200], context)

    def open_sweep(self, name: str, folder: Path) -> None:
        """Opens the parent run; its jobs find it by the tag that names the sweep's folder."""
        client, experiment = connect(name)
        tags = {SWEEP: str(folder), PLACE: _place(folder), **owner_tags()}
        with reaching():
            reconcile(client, experiment)
            client.create_run(experiment, run_name=f"sweep {folder.parent.name} {folder.name}", tags=tags)

    def close_sweep(self, name: str, folder: Path, status: str, summaries: list[Summary]) -> list[str]:
        """Ends the parent with its comparison (files, and the leaderboard as its note) and the dense figures."""
        client, experiment = connect(name)
        parent = find_parent(client, experiment, folder)
        assert parent is not None, "open_sweep comes first"
        for file in _OF_SWEEPS:
            if (folder / file).exists():
                client.log_artifact(parent, str(folder / file))
        if (folder / "results.md").exists():
            client.set_tag(parent, NOTE, (folder / "results.md").read_text(encoding="utf-8"))
        log_metrics(client, parent, _shared_dense_figures(summaries))
        children = client.search_runs([experiment], f"tags.`{PARENT}` = '{parent}'")
        for child in children:
            if child.info.status == "RUNNING" and not is_alive(child.data.tags):
                end(client, child.info.run_id, "KILLED", "its process ended without saying so")
        end(client, parent, status, None)
        return links.how_to_look(links.store_uri(), experiment, [child.info.run_id for child in children])

    def discard_sweep(self, name: str, folder: Path) -> None:
        """Deletes the parent run."""
        client, experiment = connect(name)
        if parent := find_parent(client, experiment, folder):
            end(client, parent, "FAILED", "refused before its first job")
            client.delete_run(parent)


_OF_SWEEPS = (
    "results.json", "results.md", "pareto.png", "report.html", "optimization_results.yaml", "budget_front.png",
    "budget_axes.png",
)  # fmt: skip


def create_run(client: Any, experiment: str, summary: Summary, context: JobContext, tags: dict[str, str]) -> str:
    """Makes a run with its parameters and the text that it was measured on, and returns its id."""
    from mlflow.entities import Dataset, DatasetInput, InputTag, Param

    from prune_lab import __version__

    tags = {"prune_lab.version": __version__, "device": summary.protocol["device"], **tags, **owner_tags()}
    if context.sweep is not None and (parent := find_parent(client, experiment, context.sweep)):
        tags[PARENT] = parent
    run = client.create_run(experiment, run_name=run_name(summary), tags=tags)
    params = [Param(key, str(value)) for key, value in params_of(summary).items()]
    client.log_batch(run.info.run_id, params=params)
    protocol = summary.protocol
    dataset = Dataset(
        name=str(protocol["dataset"])[:500], digest=protocol["test_tokens_sha256"][:36], source_type="local",
        source=str(protocol["dataset_facts"]),
    )  # fmt: skip
    client.log_inputs(run.info.run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "test")])])
    return str(run.info.run_id)


def find_parent(client: Any, experiment: str, folder: Path) -> str | None:
    """The parent run of the sweep in `folder`, if there is one."""
    for run in client.search_runs([experiment], f"tags.`{PLACE}` = '{_place(folder)}'", max_results=1):
        return str(run.info.run_id)
    return None


def _place(folder: Path) -> str:
    return hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()


def reconcile(client: Any, experiment: str) -> None:
    """Marks runs KILLED whose process on this machine is gone: SIGKILL lets nobody say goodbye."""
    for run in client.search_runs([experiment], "attributes.status = 'RUNNING'"):
        if not is_alive(run.data.tags):
            end(client, run.info.run_id, "KILLED", "its process ended without saying so")


def stored_summary(client: Any, run_id: str) -> Summary | None:
    """The summary.json among a run's files, or None where they are gone."""
    import json

    from mlflow.exceptions import MlflowException

    with tempfile.TemporaryDirectory(suffix=owner_suffix()) as folder:
        try:
            path = client.download_artifacts(run_id, "summary.json", folder)
            summary = from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except (OSError, ValueError, MlflowException):
            return None  # its files are gone: it is computed again
    summary.reused_from = summary.reused_from or run_id
    return summary


def _unlogged(reason: str, context: JobContext) -> str:
    return f"not in the MLflow store ({reason}); prune-lab sync {shlex.quote(str(context.folder))} logs it"


def _shared_dense_figures(summaries: list[Summary]) -> dict[str, float]:
    """Dense figures for the parent: latencies are medians over the jobs, the rest is one measurement."""
    from statistics import median

    from prune_lab.results.metrics import dense_figures

    finished = [dense_figures(s.metrics) for s in summaries if s.status == "FINISHED"]
    names = {name for figures in finished for name in figures}
    return {name: median(f[name] for f in finished if name in f) for name in sorted(names)}
