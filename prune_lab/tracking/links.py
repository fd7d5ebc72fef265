"""Where the store is, and how to look at a sweep in the MLflow UI, which does not open on the runs by itself."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from urllib.parse import quote

LOCAL = "http://127.0.0.1:5000"


def store_uri() -> str:
    """The address of the store. `postgresql:` means the driver that is installed: SQLAlchemy's default has changed."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    if uri.startswith("postgresql://") and find_spec("psycopg") is None:
        return uri.replace("postgresql:", "postgresql+psycopg2:", 1)
    return uri


def how_to_look(uri: str, experiment: str, runs: list[str]) -> list[str]:
    """The command that starts the UI (none for a server), the list of runs, and their comparison as plots."""
    server = uri.rstrip("/") if uri.startswith(("http://", "https://")) else LOCAL
    lines = [] if server != LOCAL else [f"Open the MLflow UI:  mlflow ui --backend-store-uri {without_password(uri)}"]
    lines.append(f"  all runs:     {server}/#/experiments/{experiment}/runs?workflowType=machine_learning")
    if len(runs) > 1:
        chosen, of = quote(json.dumps(runs, separators=(",", ":"))), quote(json.dumps([experiment]))
        lines.append(f"  this sweep:   {server}/#/compare-runs?runs={chosen}&experiments={of}")
    return lines


def without_password(uri: str) -> str:
    """The address of a store, fit to be shown."""
    head, at, tail = uri.rpartition("@")
    if not at or ":" not in head.split("://", 1)[-1]:
        return uri
    return f"{head.rpartition(':')[0]}:***@{tail}"
