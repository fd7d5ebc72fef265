"""Tracking in stores that many jobs share: a real PostgreSQL, and an MLflow server over HTTP in front of it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import quote

import pytest
from processes import answers, free_port, wait_until
from test_tracking import Stored
from warm import run_module

from prune_lab.tracking.links import how_to_look, without_password

USER, PASSWORD = "lab", "not/so@secret"


def postgres_programs() -> Path | None:
    """The folder of initdb and postgres: Debian keeps it out of the path."""
    found = shutil.which("initdb")
    if found is not None:
        return Path(found).parent
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    return versions[-1].parent if versions else None


@contextmanager
def running(*command: str, user: str | None = None, cwd: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A server in a group of its own, which is ended as a whole; its log is a file of `cwd`."""
    env = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with (cwd / "server.log").open("ab") as log:
        process = subprocess.Popen(
            command, cwd=cwd, env=env, stdout=log, stderr=log, start_new_session=True, user=user
        )  # fmt: skip
    try:
        yield process
    finally:
        for number in (signal.SIGINT, signal.SIGKILL):  # SIGINT: PostgreSQL's fast shutdown
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                process.wait(20)


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """A new PostgreSQL with a password; its address. As root it runs as the user postgres, which it insists on."""
    programs = postgres_programs()
    if programs is None or find_spec("psycopg2") is None:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql, pip install 'prune-lab[postgres]'")
    user = "postgres" if os.getuid() == 0 else None
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="pg") as name:  # a short path, that user postgres may write
        place = Path(name)
        (place / "password").write_text(PASSWORD)
        if user is not None:
            for path in (place, place / "password"):
                shutil.chown(path, user)
        make = [str(programs / "initdb"), "-D", "data", "-U", USER, "-A", "scram-sha-256", "--pwfile=password"]
        made = subprocess.run([*make, "--no-sync"], cwd=place, user=user, capture_output=True, text=True, check=False)
        assert made.returncode == 0, made.stderr
        serve = [
            str(programs / "postgres"),
            "-D",
            "data",
            "-p",
            str(port),
            "-k",
            name,
            "-c",
            "listen_addresses=127.0.0.1",
        ]
        with running(*serve, "-c", "fsync=off", user=user, cwd=place) as process:
            wait_until(lambda: answers(port), process, place / "server.log")
            yield f"postgresql://{USER}:{quote(PASSWORD, safe='')}@127.0.0.1:{port}/postgres"


@pytest.fixture(scope="module")
def server(postgres: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An MLflow server over HTTP that keeps runs in PostgreSQL and files in a folder of its own."""
    place, port = tmp_path_factory.mktemp("server"), free_port()
    backend = postgres.replace("postgresql:", "postgresql+psycopg2:")
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", backend, "--port", str(port)]
    with running(*command, "--artifacts-destination", str(place / "files"), "--workers", "1", cwd=place) as process:
        wait_until(lambda: answers(port), process, place / "server.log")
        yield f"http://127.0.0.1:{port}"


def read_postgres(address: str) -> list[Stored]:
    """All runs, oldest first, read without MLflow."""
    import psycopg2

    with psycopg2.connect(address) as connection, connection.cursor() as cursor:
        cursor.execute("select run_uuid, status from runs order by start_time, run_uuid")
        found = []
        for run_id, status in cursor.fetchall():
            cursor.execute("select key, value from tags where run_uuid = %s", (run_id,))
            tags = dict(cursor.fetchall())
            cursor.execute("select key, value from latest_metrics where run_uuid = %s", (run_id,))
            found.append(Stored(run_id, status, tags, dict(cursor.fetchall())))
    connection.close()
    return found


Done = subprocess.CompletedProcess[str]


def sweep(place: Path, folder: Path, corpus: Path, store: str, *overrides: str) -> Done:
    """A sweep that tracks in `store`."""
    small = [
        "model=hf", f"model.name={folder}", "dataset=text", f"dataset.path={corpus}", "dataset.seq_len=32",
        "measure=quality_only", "measure.max_windows=8", "device=cpu",
    ]  # fmt: skip
    own = {"PRUNE_LAB_CACHE": str(place / "cache"), "MLFLOW_TRACKING_URI": store}
    return run_module("prune_lab", [*small, *overrides, "-m"], place, **own)


def check_shape(runs: list[Stored], jobs: int) -> None:
    """One parent, its finished children."""
    (parent,) = [run for run in runs if run.parent is None]
    children = [run for run in runs if run is not parent]
    assert [run.parent for run in children] == [parent.run_id] * jobs
    assert {run.status for run in children} == {"FINISHED"}
    assert parent.status == "FAILED"  # one job was refused
    assert "| dense |" in parent.tags["mlflow.note.content"]


@pytest.fixture(scope="module")
def direct(postgres: str, tmp_path_factory: pytest.TempPathFactory, folder: Path, corpus: Path) -> tuple[Path, Done]:
    """Two jobs at a time, where joblib is installed, on the new store; one of three is refused."""
    place = tmp_path_factory.mktemp("direct")
    several = [] if find_spec("hydra_plugins.hydra_joblib_launcher") is None else ["hydra/launcher=joblib"]
    return place, sweep(place, folder, corpus, postgres, "amount=0.2,1.5,0.4", "hydra.sweep.dir=here", *several)


def test_a_sweep_tracks_in_postgresql(direct: tuple[Path, Done], postgres: str) -> None:
    place, done = direct
    assert done.returncode == 1, done.stderr
    assert not (place / "mlflow.db").exists()
    check_shape(read_postgres(postgres)[:3], jobs=2)


def test_the_store_s_password_is_not_told(direct: tuple[Path, Done]) -> None:
    place, done = direct
    assert f"mlflow ui --backend-store-uri postgresql+psycopg2://{USER}:***@127.0.0.1" in done.stdout
    secret = quote(PASSWORD, safe="").encode()
    files = [path for path in (place / "here").rglob("*") if path.is_file()]
    assert len(files) > 10
    assert [path for path in files if secret in path.read_bytes()] == []
    assert secret.decode() not in done.stdout + done.stderr


def test_a_sweep_tracks_on_a_server_and_finds_there_what_is_finished(
    direct: tuple[Path, Done], server: str, postgres: str, folder: Path, corpus: Path, tmp_path: Path
) -> None:
    """The server stands before the same database: 0.2 is in it. Its files are not the server's, so it is found again
    only where the folder is at hand; 0.3 is new, and its files go to the server."""
    done = sweep(tmp_path, folder, corpus, server, "name=served", "amount=0.2,1.5,0.3", "hydra.sweep.dir=one")
    assert done.returncode == 1, done.stderr
    check_shape(read_postgres(postgres)[3:], jobs=2)
    assert f"{server}/#/compare-runs?runs=" in done.stdout
    assert "mlflow ui" not in done.stdout
    assert list(tmp_path.glob("mlruns")) == []
    again = sweep(tmp_path, folder, corpus, server, "name=served", "amount=0.3,1.5", "hydra.sweep.dir=two")
    assert again.stdout.count("finished before, not computed again") == 1
    runs = read_postgres(postgres)[6:]
    check_shape(runs, jobs=1)
    assert [run.tags.get("prune_lab.reused_from") is not None for run in runs if run.parent] == [True]
    with urllib.request.urlopen(f"{server}/health", timeout=20) as answer:
        assert answer.read() == b"OK"


@pytest.mark.slow  # MLflow tries for half a minute
def test_a_store_that_is_not_there_is_refused_before_the_first_job(tmp_path: Path, folder: Path, corpus: Path) -> None:
    if find_spec("psycopg2") is None:
        pytest.skip("psycopg2 is not installed")
    address = f"postgresql://{USER}:secret@127.0.0.1:{free_port()}/postgres"
    done = sweep(tmp_path, folder, corpus, f"{address}?connect_timeout=1", "amount=0.2,0.4", "hydra.sweep.dir=here")
    assert done.returncode == 2
    assert "tracking: the MLflow store" in done.stderr
    assert "secret" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("prune_lab: tracking: the MLflow store")
    assert not (tmp_path / "here").exists()


def test_links_of_a_server_and_of_a_database() -> None:
    assert how_to_look("http://host:5000/", "7", ["a"])[0].endswith(
        "http://host:5000/#/experiments/7/runs?workflowType=machine_learning"
    )
    assert without_password("postgresql://u:p%40ss@h/db") == "postgresql://u:***@h/db"
