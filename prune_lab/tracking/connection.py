"""The way to an MLflow store: no call is cut in two, a locked database is waited for, a server that is gone is not."""

from __future__ import annotations

import errno
import logging
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from prune_lab.errors import Refused
from prune_lab.explain import one_line
from prune_lab.system.files import remove_stale_files, temporary_name
from prune_lab.system.interrupt import signals_deferred
from prune_lab.tracking import links
from prune_lab.tracking.base import Unreachable

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # the console shows progress, once
# A server that does not answer costs seconds, not the minutes that MLflow would give it: results are safe without it.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")  # seconds

PATIENCE = 60.0  # seconds to wait for a database that another process has locked
log = logging.getLogger(__name__)


class Uninterrupted:
    """An MlflowClient whose calls are not cut in two by a signal, and wait for a locked database."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Any:
        return _patient(signals_deferred()(getattr(self._client, name)))


def connect(name: str) -> tuple[Any, str]:
    """A client and the experiment's id, made if it is new; imports MLflow. Raises Refused where there is no store."""
    client_of = client_class()
    for chatty in ("mlflow", "alembic"):  # they announce every table they make, and print errors that we are told
        logging.getLogger(chatty).setLevel(logging.CRITICAL)
    with reaching():
        if unquote(str(Path.cwd())) != str(Path.cwd()):  # MLflow would take a%20b for the folder `a b`
            os.environ.setdefault("_MLFLOW_SERVER_ARTIFACT_ROOT", Path("mlruns").absolute().as_uri())
        _make_file(links.store_uri(), client_of)
        client = Uninterrupted(_patient(signals_deferred()(client_of))(tracking_uri=links.store_uri()))
        return client, _experiment(client, name)


def client_class() -> Any:
    """MLflow's client; raises Unreachable where MLflow is not installed."""
    try:
        from mlflow import MlflowClient
    except ModuleNotFoundError as error:
        raise Unreachable(
            f"tracking=mlflow needs {error.name}, which is not installed: pip install mlflow, or give tracking=none"
        ) from error
    return MlflowClient


@contextmanager
def reaching() -> Iterator[None]:
    """What fails inside is the store: raises Unreachable with its address. Each kind of store has its own errors."""
    try:
        yield
    except Refused:
        raise
    except Exception as error:
        uri = links.without_password(links.store_uri())
        hint = _missing_driver(error)
        raise Unreachable(f"tracking: the MLflow store {uri} cannot be used: {one_line(error)[:200]}{hint}") from error


def _missing_driver(error: BaseException | None) -> str:
    """Command that installs the package a kind of database needs, where it is missing."""
    while error is not None and not isinstance(error, ModuleNotFoundError):
        error = error.__cause__ or error.__context__
    if error is None:
        return ""
    package = '"prune-lab[postgres]"' if "psycopg" in str(error.name) else error.name
    return f": pip install {package}"


def _make_file(uri: str, client: Any) -> None:
    """Makes the file of a new SQLite store whole or not at all: a kill never leaves half its tables."""
    path = links.sqlite_file(uri)
    if path is None or path.exists():
        return
    from sqlalchemy.engine import make_url

    remove_stale_files(path.absolute().parent, deep=False)
    half = temporary_name(path)
    try:
        _touch(half)  # where no file can be made MLflow would try for minutes
        new = make_url(uri).set(database=str(half)).render_as_string(hide_password=False)
        client(tracking_uri=new).search_experiments(max_results=1)
        with suppress(FileExistsError):  # another process was faster
            os.link(half, path)
    finally:
        half.unlink(missing_ok=True)


def _touch(path: Path) -> None:
    try:
        path.touch()
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOENT, errno.ENOTDIR):
            raise
        raise Unreachable(
            f"tracking: no MLflow store can be made in {path.absolute().parent} ({error.strerror}): work in a folder "
            "that can be written, set MLFLOW_TRACKING_URI, or give tracking=none"
        ) from error


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


def _patient(call: Callable[..., Any]) -> Callable[..., Any]:
    """The call, again and again while the database is locked: SQLite itself gives up after five seconds."""

    def calling(*arguments: Any, **named: Any) -> Any:
        until, waiting = time.monotonic() + PATIENCE, False
        while True:
            try:
                return call(*arguments, **named)
            except Exception as error:
                if "database is locked" not in str(error) or time.monotonic() > until:
                    raise
                if not waiting:
                    log.warning("the store is locked by another process: waiting up to %g s", PATIENCE)
                waiting = True
            time.sleep(random.uniform(0.1, 0.5))

    return calling
