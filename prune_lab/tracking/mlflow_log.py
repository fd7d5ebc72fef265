"""The record of one MLflow run. A store that goes away costs the record, never the work: `prune-lab sync` logs it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from prune_lab import explain
from prune_lab.results.card import CARD, description, is_card_of
from prune_lab.results.summary import EXPORT, Summary
from prune_lab.system.interrupt import signals_deferred
from prune_lab.tracking.params import tags_of

AGAIN = 60.0  # seconds after which figures of the training are sent once more to a store that was away
_AT_ONCE = 1000  # metrics that a server takes in one request


class MlflowLog:
    """Writes to one run. `lost` says why the run is not wholly in the store, once it is known that it is not."""

    def __init__(self) -> None:
        self.lost: str | None = None
        self._client: Any = None
        self._run_id = ""
        self._waiting: list[Any] = []  # metrics that are not sent yet
        self._not_before = 0.0  # when to try to send them

    def begin(self, client: Any, run_id: str) -> None:
        """The run is there: from now on it can be written to."""
        self._client, self._run_id = client, run_id

    def step_metrics(self, step: int, values: dict[str, float]) -> None:
        """Logs figures of a training step, or keeps them for later while the store is away."""
        if self.lost is not None:
            return
        self._waiting += _metrics(values, step)
        if time.monotonic() < self._not_before:
            return
        try:
            self._send()
        except Exception as error:  # each kind of store has its own errors
            if not self._not_before:
                reason = explain.one_line(error)[:200]
                explain.to_stderr(f"warning: the MLflow store is away, the run goes on without it: {reason}")
            self._not_before = time.monotonic() + AGAIN

    def result(self, summary: Summary, files: list[Path]) -> None:
        """Logs metrics, the run's files (summary.json the first), config.yaml, and marks what diverged."""
        import yaml

        if self.lost is not None:
            return
        try:
            self._waiting += _metrics(summary.metrics)
            self._send()
            for tag, value in tags_of(summary).items():
                self._client.set_tag(self._run_id, tag, value)
            for file in files:
                self._client.log_artifact(self._run_id, str(file))
            self._client.log_text(self._run_id, yaml.safe_dump(summary.config, sort_keys=False), "config.yaml")
            self._keep_export(summary, files[0].parent / EXPORT)
        except Exception as error:
            self.lost = explain.one_line(error)[:200]

    def _keep_export(self, summary: Summary, folder: Path) -> None:
        """Logs the card of an export, or all of the export where it is to be registered, and registers it."""
        if not is_card_of(folder / CARD, summary):
            return
        name = (summary.config.get("tracking") or {}).get("register")
        if name is None:
            self._client.log_artifact(self._run_id, str(folder / CARD), EXPORT)
        else:
            summary.warnings.append(register(self._client, self._run_id, str(name), folder))

    def end(self, status: str, reason: str | None = None) -> None:
        """Ends the run; one that is not wholly there does not end FINISHED."""
        if not self._run_id:  # it was never made
            return
        if self.lost is not None and status == "FINISHED":
            status, reason = "KILLED", f"the store was away: {self.lost}"
        try:
            end(self._client, self._run_id, status, reason)
        except Exception as error:
            self.lost = self.lost or explain.one_line(error)[:200]

    def _send(self) -> None:
        while self._waiting:
            self._client.log_batch(self._run_id, self._waiting[:_AT_ONCE])
            del self._waiting[:_AT_ONCE]


def register(client: Any, run_id: str, name: str, folder: Path) -> str:
    """Logs a folder with a run and makes it a version of a registered model, once; returns a note that says so.

    The store gets a copy of the weights: a version must be there for whoever reads the store.
    """
    for version in client.search_model_versions(f"run_id = '{run_id}'"):
        if version.name == name:
            return _registered(version)
    client.log_artifacts(run_id, str(folder), EXPORT)
    if not any(found.name == name for found in client.search_registered_models(f"name = '{name}'")):
        client.create_registered_model(name)
    source = f"{client.get_run(run_id).info.artifact_uri}/{EXPORT}"
    return _registered(client.create_model_version(name, source, run_id, description=description(folder / CARD)))


def _registered(version: Any) -> str:
    return f"registered in MLflow as models:/{version.name}/{version.version}"


def log_metrics(client: Any, run_id: str, values: dict[str, float]) -> None:
    """Logs metrics, all in one request."""
    client.log_batch(run_id, _metrics(values))


def end(client: Any, run_id: str, status: str, reason: str | None) -> None:
    """Ends a run with a status, and the reason where it is not FINISHED."""
    with signals_deferred():
        if reason is not None:
            client.set_tag(run_id, "status_reason", reason[:1000])
        client.set_terminated(run_id, status)


def _metrics(values: dict[str, float], step: int = 0) -> list[Any]:
    from mlflow.entities import Metric
    from mlflow.utils.time import get_current_time_millis

    now = get_current_time_millis()
    return [Metric(name, value, now, step) for name, value in values.items()]
