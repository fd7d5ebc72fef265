"""tracking=mlflow: runs, sweeps and their files in an MLflow store.

Everything goes through MlflowClient with explicit run ids: no active run, nothing global, so that jobs in other
processes and a sweep's parent never get in each other's way.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prune_lab.errors import Refused
from prune_lab.explain import one_line
from prune_lab.interrupt import whole
from prune_lab.place import Place
from prune_lab.summary import Summary, from_dict
from prune_lab.tracking import links
from prune_lab.tracking.base import Tracker
from prune_lab.tracking.ownership import is_alive, owner_tags
from prune_lab.tracking.params import params_of, run_name, tags_of

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # the console shows progress, once

PARENT, SWEEP = "mlflow.parentRunId", "prune_lab.sweep"
FINGERPRINT, REUSED = "prune_lab.fingerprint", "prune_lab.reused_from"


@dataclass(frozen=True)
class Mlflow(Tracker):
    """Tracks in the store that MLFLOW_TRACKING_URI names, or in mlflow.db in the working folder."""

    @contextmanager
    def start_run(self, name: str, summary: Summary, place: Place) -> Iterator[_MlflowLog]:
        """A run under its sweep's parent, if it has one; what ends it decides its status."""
        client, experiment = _connect(name)
        _reconcile(client, experiment)
        run_id = ""
        try:
            with whole():
                run_id = _create_run(client, experiment, summary, place, {FINGERPRINT: summary.fingerprint})
            yield _MlflowLog(client, run_id)
        except Exception as error:
            _end(client, run_id, "FAILED", f"{type(error).__name__}: {error}")
            raise
        except BaseException as error:  # Ctrl-C, or a signal
            _end(client, run_id, "KILLED", type(error).__name__)
            raise
        _end(client, run_id, "FINISHED", None)

    def find_finished(self, name: str, fingerprint: str) -> Summary | None:
        """Reads summary.json back from the finished run with this fingerprint."""
        client, experiment = _connect(name)
        query = f"attributes.status = 'FINISHED' and tags.`{FINGERPRINT}` = '{fingerprint}'"
        for run in client.search_runs([experiment], query, max_results=1):
            return stored_summary(client, run.info.run_id)
        return None

    def enter_again(self, name: str, summary: Summary, place: Place) -> None:
        """In a sweep: a child with the earlier run's figures, tagged with its id instead of a fingerprint."""
        if place.sweep is None:
            return
        client, experiment = _connect(name)
        run_id = _create_run(client, experiment, summary, place, {REUSED: summary.reused_from or ""})
        _MlflowLog(client, run_id).metrics(summary.metrics)
        _end(client, run_id, "FINISHED", None)

    def open_sweep(self, name: str, folder: Path) -> None:
        """Opens the parent run; its jobs find it by the tag that names the sweep's folder."""
        client, experiment = _connect(name)
        _reconcile(client, experiment)
        tags = {SWEEP: str(folder), **owner_tags()}
        client.create_run(experiment, run_name=f"sweep {folder.parent.name} {folder.name}", tags=tags)

    def close_sweep(self, name: str, folder: Path, status: str, summaries: list[Summary]) -> list[str]:
        """Ends the parent with its comparison (files, and the leaderboard as its note) and the dense figures."""
        client, experiment = _connect(name)
        parent = _parent(client, experiment, folder)
        assert parent is not None, "open_sweep comes first"
        for file in ("results.json", "results.md", "pareto.png", "report.html", "optimization_results.yaml"):
            if (folder / file).exists():
                client.log_artifact(parent, str(folder / file))
        if (folder / "results.md").exists():
            client.set_tag(parent, "mlflow.note.content", (folder / "results.md").read_text(encoding="utf-8"))
        _MlflowLog(client, parent).metrics(_shared_dense_figures(summaries))
        children = client.search_runs([experiment], f"tags.`{PARENT}` = '{parent}'")
        for child in children:
            if child.info.status == "RUNNING" and not is_alive(child.data.tags):
                _end(client, child.info.run_id, "KILLED", "its process ended without saying so")
        _end(client, parent, status, None)
        return links.how_to_look(links.store_uri(), experiment, [child.info.run_id for child in children])

    def discard_sweep(self, name: str, folder: Path) -> None:
        """Deletes the parent run."""
        client, experiment = _connect(name)
        if parent := _parent(client, experiment, folder):
            _end(client, parent, "FAILED", "refused before its first job")
            client.delete_run(parent)


class _Whole:
    """An MlflowClient whose calls are not cut in two by a signal."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Any:
        return whole()(getattr(self._client, name))


class _MlflowLog:
    """Writes to one run."""

    def __init__(self, client: Any, run_id: str) -> None:
        self._client, self._run_id = client, run_id

    def figures(self, step: int, values: dict[str, float]) -> None:
        """Logs figures of a training step."""
        self.metrics(values, step)

    def metrics(self, values: dict[str, float], step: int = 0) -> None:
        """Logs metrics, all in one request."""
        from mlflow.entities import Metric
        from mlflow.utils.time import get_current_time_millis

        now = get_current_time_millis()
        self._client.log_batch(self._run_id, [Metric(name, value, now, step) for name, value in values.items()])

    def result(self, summary: Summary, files: list[Path], diverged: list[str]) -> None:
        """Logs metrics, the run's files (summary.json the first), config.yaml, and marks what diverged."""
        import yaml

        self.metrics(summary.metrics)
        for tag, value in tags_of(summary, diverged).items():
            self._client.set_tag(self._run_id, tag, value)
        for file in files:
            self._client.log_artifact(self._run_id, str(file))
        self._client.log_text(self._run_id, yaml.safe_dump(summary.config, sort_keys=False), "config.yaml")


def _connect(name: str) -> tuple[Any, str]:
    """A client and the experiment's id, made if it is new; imports MLflow. Raises Refused where there is no store."""
    from mlflow import MlflowClient

    for chatty in ("mlflow", "alembic"):  # they announce every table they make
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        with whole():
            client = _Whole(MlflowClient(tracking_uri=links.store_uri()))
        return client, _experiment(client, name)
    except Exception as error:  # each kind of store has its own errors
        uri = links.without_password(links.store_uri())
        raise Refused(f"tracking: the MLflow store {uri} cannot be used: {one_line(error)[:200]}") from error


def _experiment(client: Any, name: str) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name))
        except MlflowException:  # another process made it in between
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        raise Refused(f"name={name!r}: that experiment was deleted; restore it in MLflow or give another name")
    return str(found.experiment_id)


def _create_run(client: Any, experiment: str, summary: Summary, place: Place, tags: dict[str, str]) -> str:
    from mlflow.entities import Dataset, DatasetInput, InputTag, Param

    from prune_lab import __version__

    tags = {"prune_lab.version": __version__, "device": summary.protocol["device"], **tags, **owner_tags()}
    if place.sweep is not None and (parent := _parent(client, experiment, place.sweep)):
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


def _end(client: Any, run_id: str, status: str, reason: str | None) -> None:
    if not run_id:  # it was never made
        return
    with whole():
        if reason is not None:
            client.set_tag(run_id, "status_reason", reason[:1000])
        client.set_terminated(run_id, status)


def _parent(client: Any, experiment: str, folder: Path) -> str | None:
    quoted = str(folder).replace("'", "\\'")
    for run in client.search_runs([experiment], f"tags.`{SWEEP}` = '{quoted}'", max_results=1):
        return str(run.info.run_id)
    return None


def _reconcile(client: Any, experiment: str) -> None:
    """Marks runs KILLED whose process on this machine is gone: SIGKILL lets nobody say goodbye."""
    for run in client.search_runs([experiment], "attributes.status = 'RUNNING'"):
        if not is_alive(run.data.tags):
            _end(client, run.info.run_id, "KILLED", "its process ended without saying so")


def stored_summary(client: Any, run_id: str) -> Summary | None:
    """The summary.json among a run's files, or None where they are gone."""
    import json

    from mlflow.exceptions import MlflowException

    with tempfile.TemporaryDirectory() as place:
        try:
            path = client.download_artifacts(run_id, "summary.json", place)
            summary = from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except (OSError, ValueError, MlflowException):
            return None  # its files are gone: it is computed again
    summary.reused_from = summary.reused_from or run_id
    return summary


def _shared_dense_figures(summaries: list[Summary]) -> dict[str, float]:
    """Dense figures for the parent: latencies are medians over the jobs, the rest is one measurement."""
    from statistics import median

    from prune_lab.figures import dense_figures

    finished = [dense_figures(s.metrics) for s in summaries if s.status == "FINISHED"]
    names = {name for figures in finished for name in figures}
    return {name: median(f[name] for f in finished if name in f) for name in sorted(names)}
