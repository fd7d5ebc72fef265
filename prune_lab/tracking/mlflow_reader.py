"""Runs of an MLflow experiment, read back: what a report compares. Nothing is written, and no store is made."""

from __future__ import annotations

import difflib
import logging
from dataclasses import dataclass
from typing import Any

from prune_lab.errors import Refused
from prune_lab.explain import one_line
from prune_lab.results.summary import Summary
from prune_lab.tracking import links
from prune_lab.tracking.connection import client_class
from prune_lab.tracking.mlflow_store import FINGERPRINT, REUSED, SWEEP, stored_summary

_ENDED = ("FINISHED", "FAILED", "KILLED")


@dataclass(frozen=True)
class Tracked:
    """A run of a store by its name there, which is not unique, and a part of its id."""

    name: str
    summary: Summary


def read_experiment(name: str) -> list[Tracked]:
    """The ended runs of an experiment, oldest first, without the parents of sweeps; imports MLflow.

    A run's summary.json says most; where its files are gone, its metrics, parameters and tags have to do.
    Raises Refused where there is no such store or experiment.
    """
    uri = links.store_uri()
    shown = links.without_password(uri)
    _check_file(uri, name)
    client_of = client_class()
    for chatty in ("mlflow", "alembic"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        client = client_of(tracking_uri=uri)
        experiment = client.get_experiment_by_name(name)
        others = [] if experiment else [str(each.name) for each in client.search_experiments()]
        runs = _all_runs(client, experiment.experiment_id) if experiment else []
    except Exception as error:  # each kind of store has its own errors
        raise Refused(f"{name}: the MLflow store {shown} cannot be read: {one_line(error)[:200]}") from error
    if experiment is None:
        close = difflib.get_close_matches(name, others, n=3)
        hint = f"; did you mean {', '.join(close)}?" if close else ""
        raise Refused(f"{name}: neither a folder nor an experiment of the MLflow store {shown}{hint}")
    if experiment.lifecycle_stage == "deleted":
        raise Refused(f"{name}: that experiment was deleted; restore it in MLflow")
    known = {run.info.run_id for run in runs}
    return [
        Tracked(f"{run.info.run_name} ({run.info.run_id[:8]})", _summary(client, run))
        for run in runs
        if run.info.status in _ENDED and SWEEP not in run.data.tags and run.data.tags.get(REUSED) not in known
    ]


def _check_file(uri: str, name: str) -> None:
    """MLflow makes the file of an SQLite store that is not there; whoever reads wants none."""
    if (path := links.sqlite_file(uri)) is not None and not path.is_file():
        raise Refused(f"{name}: neither a folder nor an experiment, for there is no MLflow store {uri}")


def _all_runs(client: Any, experiment: str) -> list[Any]:
    found: list[Any] = []
    token = None
    while True:
        page = client.search_runs([experiment], order_by=["attributes.start_time ASC"], page_token=token)
        found += page
        token = page.token
        if not token:
            return found


def _summary(client: Any, run: Any) -> Summary:
    """The run as a summary, with the metrics that the store has."""
    tags, params = run.data.tags, run.data.params
    summary = stored_summary(client, run.info.run_id) if run.info.status == "FINISHED" else None
    if summary is None:
        summary = Summary(
            run.info.status,
            fingerprint=tags.get(FINGERPRINT, ""),
            choices={"method": params.get("method", "")},
            overrides=[f"{key}={value}" for key, value in params.items() if value not in ("n/a", "None")],
            protocol=_protocol(run),
            diverged=[metric for metric in tags.get("diverged", "").split(", ") if metric],
            reason=tags.get("status_reason"),
        )
    summary.metrics = dict(run.data.metrics)
    return summary


def _protocol(run: Any) -> dict[str, str]:
    """Protocol stamp as far as MLflow has it: the text and its hash from the run's input, and two parameters."""
    stamp = {key: run.data.params[key] for key in ("dtype", "device") if key in run.data.params}
    for found in run.inputs.dataset_inputs if run.inputs else []:
        stamp |= {"dataset": found.dataset.name, "test_tokens_sha256": found.dataset.digest}
    return stamp
