"""Address of the store, and links to a sweep in the MLflow UI, which does not open on the runs by itself."""

from __future__ import annotations

import json
import os
import shlex
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import quote

LOCAL = "http://127.0.0.1:5000"


def store_uri() -> str:
    """The address of the store. `postgresql:` means the driver that is installed: SQLAlchemy's default has changed."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    if uri.startswith("postgresql://") and find_spec("psycopg") is None:
        return uri.replace("postgresql:", "postgresql+psycopg2:", 1)
    return _as_meant(uri) if uri.startswith("sqlite") and {"%", "?"} & set(uri) else uri


def sqlite_file(uri: str) -> Path | None:
    """The file of an SQLite store; None for any other store, and for one in memory. Imports SQLAlchemy."""
    from sqlalchemy.engine import make_url

    name = make_url(uri).database if uri.startswith("sqlite") else None
    return Path(name) if name and not name.startswith((":", "file:")) else None


def _as_meant(uri: str) -> str:
    """The address of an SQLite store in which % and ? stand for themselves where only such a folder is there."""
    head, _, path = uri.partition(":///")
    read = sqlite_file(uri)
    folder = Path(path).parent
    if read is None or not folder.is_dir() or (read.parent.is_dir() and "?" not in str(folder)):
        return uri
    encoded = f"{head}:///{path.replace('%', '%25').replace('?', '%3F')}"
    return encoded if sqlite_file(encoded) == Path(path) else uri


def how_to_look(uri: str, experiment: str, runs: list[str]) -> list[str]:
    """The command that starts the UI (none for a server), the list of runs, and their comparison as plots."""
    server = uri.rstrip("/") if uri.startswith(("http://", "https://")) else LOCAL
    shown = without_password(uri)
    shown = shown if shlex.quote(uri) == uri else shlex.quote(shown)
    lines = [] if server != LOCAL else [f"Open the MLflow UI:  mlflow ui --backend-store-uri {shown}"]
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
