"""What goes wrong around a run: full disks, read-only folders, locked stores, lost servers, too little memory."""

from __future__ import annotations

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, make_folder
from processes import PATIENCE, answers, free_port, wait_until
from sqlalchemy import Engine, event
from test_resume import Ended
from test_tracking import read_store
from warm import give_store, start_module

from prune_lab import __main__ as program
from prune_lab.commands import sync
from prune_lab.out_of_memory import OutOfMemory, explained
from prune_lab.sweeps import sweep as sweeps
from prune_lab.system.files import owner_suffix, remove_stale_files, temporary_name, write_text
from prune_lab.tracking import connection

# MLflow 3's own models use a deprecated part of SQLAlchemy, which says so when a store is first opened.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")

Here = Callable[..., Ended]


@pytest.fixture
def here(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Here]:
    """Runs a command line in this process, on the small model, untracked; folder: where its files go."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    monkeypatch.setattr(sweeps, "_current", None)
    # MLflow keeps its connection to an address for the life of the process: each test has an address of its own.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    give_store(tmp_path)

    def run(*overrides: str, folder: Path = tmp_path / "here") -> Ended:
        places = [f"hydra.run.dir={folder}", f"hydra.sweep.dir={folder}"]
        arguments = [*small, "measure=quality_only", "tracking=none", *places, *overrides]
        monkeypatch.setattr(sys, "argv", ["prune_lab", *arguments])
        capsys.readouterr()
        code = program._run(arguments)
        said = capsys.readouterr()
        return Ended(code, said.out, folder, said.err)

    yield run
    for number, handler in before.items():
        signal.signal(number, handler)


# Too little memory.


def test_a_job_without_memory_fails_with_a_hint_and_the_sweep_goes_on(here: Here, tmp_path: Path) -> None:
    """The first job asks for adapters that no machine holds. The store, the leaderboard and the exit code say so."""
    rank = 10**14
    done = here("tracking=mlflow", "recovery=lora", "recovery.steps=1", f"recovery.rank={rank},2", "-m")
    assert done.code == 1
    assert [done.summary(job)["status"] for job in "01"] == ["FAILED", "FINISHED"]
    for place in (done.summary("0")["reason"], done.stderr, done.stdout[done.stdout.index("Leaderboard") :]):
        assert "out of memory while training" in place
        assert f"recovery.rank (now {rank})" in place
        assert "lower recovery.batch_size (now 16)" in place
        assert "recovery.accumulate" in place
    assert done.stderr.count("\n") == 1
    parent, failed, finished = read_store(tmp_path / "mlflow.db")
    assert (parent.status, failed.status, finished.status) == ("FAILED", "FAILED", "FINISHED")
    assert f"recovery.rank (now {rank})" in failed.tags["status_reason"]


def test_a_model_that_does_not_fit_is_named_as_such(here: Here, tmp_path: Path) -> None:
    model = make_folder(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    beyond = {"intermediate_size": 2**24, "hidden_size": 2**16, "head_dim": 8}  # 4.4 TB for one matrix
    (model / "config.json").write_text(json.dumps({**config, **beyond}))
    done = here(f"model.name={model}", "model.weights=random")
    assert done.code == 1
    assert done.stderr.count("\n") == 1
    assert "out of memory while loading the model" in done.stderr
    assert "dtype=bfloat16" in done.stderr
    assert done.summary()["status"] == "FAILED"


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (MemoryError(), True), (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("shapes do not fit"), False), (ValueError("can't allocate memory"), False),
    ],
)  # fmt: skip
def test_what_is_not_about_memory_stays_what_it_is(error: Exception, is_memory: bool) -> None:
    expected = OutOfMemory if is_memory else type(error)
    with pytest.raises(expected) as found, explained({"measure": {"batch_size": 8}}):
        raise error
    assert ("measure.batch_size (now 8)" in str(found.value)) == is_memory


# Disks.


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)]
    try:
        done = subprocess.run(mounting, capture_output=True, text=True, check=False)
    except OSError as error:
        pytest.skip(f"no mount: {error}")
    if done.returncode:
        pytest.skip(f"a disk cannot be mounted: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(disk: Path, left: int) -> Path:
    """Fills a disk up to `left` bytes and returns the file that does it."""
    room = os.statvfs(disk)
    filler = disk / "filler"
    filler.write_bytes(b"x" * (room.f_bavail * room.f_frsize - left))
    return filler


def halves(folder: Path) -> list[Path]:
    """What is half-written below a folder."""
    return [path for path in folder.rglob("*") if path.name.endswith(".tmp")]


def test_a_full_disk_ends_a_run_in_a_message_and_the_same_command_completes_it(
    here: Here, disk: Path, tmp_path: Path
) -> None:
    """Room for its small files, not for its export. Then there is room."""
    command = ["export=hf", "amount=0.3", "recovery=finetune", "recovery.steps=2", "recovery.checkpoint_every=1"]
    filler = fill(disk, 60_000)
    full = here(*command, folder=disk / "run")
    assert full.code == 1
    assert full.stderr.count("\n") == 1
    assert "No space left on device" in full.stderr
    assert not (disk / "run" / "export").exists()
    assert full.summary()["status"] == "FAILED"
    assert halves(tmp_path) == []
    filler.unlink()
    again = here(*command, folder=disk / "run")
    assert (again.code, again.stderr) == (0, "")
    assert again.summary()["status"] == "FINISHED"
    assert (disk / "run" / "export" / "model.safetensors").exists()
    assert halves(tmp_path) == []


def test_a_training_goes_on_without_checkpoints_where_the_disk_is_full(
    here: Here, disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second run finds its tokens in the cache, and no room beside them; the result is safe in the run's folder."""
    monkeypatch.setenv("PRUNE_LAB_CACHE", str(disk / "cache"))
    training = ["recovery=finetune", "recovery.steps=4", "recovery.checkpoint_every=2"]
    assert here(*training, "amount=0.2").code == 0
    fill(disk, 0)
    done = here(*training, "amount=0.4", folder=tmp_path / "full")
    assert done.code == 1  # it is not in the index of finished runs, for that is in the cache too
    assert "finished, but not kept for the next time" in done.stderr
    summary = done.summary()
    assert summary["status"] == "FINISHED"
    assert "quality/perplexity" in summary["metrics"]
    assert any("no checkpoint at step 2" in warning and "No space" in warning for warning in summary["warnings"])
    assert halves(tmp_path) == []


def test_a_read_only_folder_is_named(
    here: Here, disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the place for a run, for the store, and for the cache."""
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    try:
        for done in (
            here(folder=disk / "run"),
            here("amount=0.2,0.4", "-m", folder=disk / "sweep"),
        ):
            assert done.code in (1, 2)
            assert done.stderr.count("\n") == 1, done.stderr
            assert re.search(r"[Rr]ead-only file system", done.stderr)
            assert str(disk) in done.stderr
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{disk}/mlflow.db")
        done = here("tracking=mlflow")
        assert done.code == 2
        assert done.stderr.count("\n") == 1, done.stderr
        assert f"{disk}/mlflow.db" in done.stderr
        monkeypatch.setenv("PRUNE_LAB_CACHE", str(disk / "cache"))
        done = here(folder=tmp_path / "uncached")
        assert done.code == 0  # the result stands in the run's folder
        assert "warning: the cache folder" in done.stderr
        assert done.stderr.count("\n") == 1, done.stderr
        assert f"{disk}/cache" in done.stderr
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)


def test_what_a_killed_process_left_half_written_is_removed_and_nothing_else(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    mine, host = temporary_name(tmp_path / "a.json"), owner_suffix().split("-")[0]
    dead = tmp_path / "deep" / f".model.0011aabb{host}-{gone.pid}.tmp"
    elsewhere, other = tmp_path / f".b.json.0011aabb.00000000-{gone.pid}.tmp", tmp_path / "notes.tmp"
    old = tmp_path / f".c.json.0011aabb.00000000-{gone.pid}.tmp"
    dead.mkdir(parents=True)
    write_text(dead / "weights", "half")
    for path in (mine, elsewhere, other, old):
        path.write_text("half")
    os.utime(old, (0, 0))
    assert sorted(remove_stale_files(tmp_path)) == sorted([dead, old])
    assert all(path.exists() for path in (mine, elsewhere, other))
    assert not dead.exists()


# The store.


@contextmanager
def locked(store: Path, seconds: float = PATIENCE) -> Iterator[None]:
    """Another writer's transaction, in a thread; it ends after so many seconds, or when the work inside is done."""
    begun, free = threading.Event(), threading.Event()

    def write() -> None:
        with closing(sqlite3.connect(store, timeout=30, isolation_level=None)) as writer:
            writer.execute("begin exclusive")
            begun.set()
            free.wait(seconds)
            writer.execute("commit")

    thread = threading.Thread(target=write)
    thread.start()
    try:
        assert begun.wait(30)
        yield
    finally:
        free.set()
        thread.join()


@pytest.fixture
def impatient() -> Iterator[None]:
    """SQLite gives up on a lock after 0.1 s, where MLflow has it wait for 20 s."""

    def shorter(connection: Any, cursor: Any, statement: str, values: Any, context: Any, many: bool) -> tuple[str, Any]:
        return statement.replace("busy_timeout = 20000", "busy_timeout = 100"), values

    event.listen(Engine, "before_cursor_execute", shorter, retval=True)
    yield
    event.remove(Engine, "before_cursor_execute", shorter)


@pytest.mark.process  # a real store, in this process
@pytest.mark.usefixtures("impatient")
def test_a_locked_store_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """SQLite's own patience is shorter than the lock here."""
    give_store(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db?timeout=0.1")
    client, experiment = connection.connect("prune_lab")
    with locked(tmp_path / "mlflow.db", 1):
        run = client.create_run(experiment)
    assert client.get_run(run.info.run_id).info.status == "RUNNING"
    assert "the store is locked by another process: waiting up to 60 s" in caplog.messages
    monkeypatch.setattr(connection, "PATIENCE", 0.0)
    with locked(tmp_path / "mlflow.db"), pytest.raises(Exception, match="database is locked"):
        client.create_run(experiment)


@pytest.mark.slow  # MLflow itself tries for a minute
def test_a_store_that_stays_locked_costs_the_record_and_not_the_work(
    here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Locked from the run's first training figure on. Once it is free, `sync` logs the run, once."""
    store = tmp_path / "store.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store}?timeout=0.1")
    monkeypatch.setattr(connection, "PATIENCE", 0.2)
    held, free = threading.Event(), threading.Event()

    def hold_when_it_trains() -> None:
        while not held.is_set():
            if store.exists() and any("train/loss" in run.metrics for run in read_store(store)):
                with closing(sqlite3.connect(store, timeout=30, isolation_level=None)) as writer:
                    writer.execute("begin exclusive")
                    held.set()
                    free.wait(PATIENCE)
                    writer.execute("commit")
            time.sleep(0.02)

    holder = threading.Thread(target=hold_when_it_trains)
    holder.start()
    try:
        done = here("tracking=mlflow", "recovery=finetune", "recovery.steps=200", "recovery.batch_size=2",
                    "recovery.validate_every=0", folder=tmp_path / "outputs" / "day" / "time")  # fmt: skip
        assert held.is_set()
    finally:
        held.set()
        free.set()
        holder.join()
    assert done.code == 1
    assert len(done.stderr.splitlines()) == 2, done.stderr  # when it went away, and what to do
    assert "the run goes on without it" in done.stderr
    assert "database is locked" in done.stderr
    assert f"prune-lab sync {done.folder}" in done.stderr
    assert done.summary()["status"] == "FINISHED"
    assert any("not in the MLflow store" in warning for warning in done.summary()["warnings"])
    assert [run.status for run in read_store(store)] == ["RUNNING"]

    monkeypatch.setattr("prune_lab.tracking.mlflow_sync.is_alive", lambda tags: False)  # that run's process is this one
    monkeypatch.setattr("prune_lab.tracking.mlflow_store.is_alive", lambda tags: False)
    assert sync.main([]) == 0
    assert "1 logged" in capsys.readouterr().out
    killed, logged = read_store(store)
    assert (killed.status, logged.status) == ("KILLED", "FINISHED")
    assert logged.metrics == pytest.approx(done.summary()["metrics"])
    assert done.summary()["unlogged"] is None
    assert not any("not in the MLflow store" in warning for warning in done.summary()["warnings"])
    assert sync.main([str(done.folder)]) == 0
    assert "0 logged, 1 held already" in capsys.readouterr().out
    assert len(read_store(store)) == 2


# A server that goes away in the middle of a sweep.


@pytest.fixture(scope="module")
def lost(tmp_path_factory: pytest.TempPathFactory, folder: Path, corpus: Path) -> tuple[Path, Ended]:
    """A sweep of two jobs on a real server, which is killed while the first one trains."""
    place = tmp_path_factory.mktemp("lost")
    port = free_port()
    env = {**os.environ, "PYTHONPATH": str(ROOT), "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    own = {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{port}", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
    serving = [
        sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{place}/store.db", "--default-artifact-root", str(place / "artifacts"),
        "--no-serve-artifacts",
    ]  # fmt: skip
    job = [
        "model=hf", f"model.name={folder}", "dataset=text", f"dataset.path={corpus}", "dataset.seq_len=32",
        "measure=quality_only", "measure.max_windows=8", "recovery=finetune", "recovery.steps=150",
        "recovery.batch_size=2", "recovery.validate_every=0", "recovery.autocast=none",
    ]  # fmt: skip
    files = [place / name for name in ("stdout", "stderr")]
    with (place / "server.log").open("w") as log:
        server = subprocess.Popen(serving, cwd=place, env=env, stdout=log, stderr=log, start_new_session=True)
    sweep = None
    try:
        wait_until(lambda: answers(port), server, place / "server.log")
        arguments = [*job, "amount=0.2,0.4", "hydra.sweep.dir=sweep", "-m"]
        sweep = start_module("prune_lab", arguments, place, files, PRUNE_LAB_CACHE=str(place / "cache"), **own)
        trains = lambda: any("train/loss" in run.metrics for run in read_store(place / "store.db"))  # noqa: E731
        wait_until(trains, sweep, files[1])
        os.killpg(server.pid, signal.SIGKILL)
        code = sweep.wait(PATIENCE)
        assert code is not None
        return place, Ended(code, files[0].read_text(), place / "sweep", files[1].read_text())
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        if sweep is not None:
            sweep.kill()


def test_a_sweep_goes_on_without_its_server_and_says_what_to_do(lost: tuple[Path, Ended]) -> None:
    place, done = lost
    assert done.code == 1, done.stderr
    assert "Traceback" not in done.stderr
    for job in "01":
        summary = done.summary(job)
        assert summary["status"] == "FINISHED"
        assert "quality/perplexity" in summary["metrics"]
        assert summary["unlogged"] in summary["warnings"]
        assert f"prune-lab sync {done.folder / job}" in done.stderr
    assert f"prune-lab sync {done.folder} does it" in done.stderr
    assert len(done.stderr.splitlines()) == 4, done.stderr  # the store went away; two jobs; the sweep
    assert "Leaderboard" in done.stdout
    assert (done.folder / "results.md").exists()
    assert {run.status for run in read_store(place / "store.db")} == {"RUNNING"}


def test_sync_logs_the_sweep_as_if_the_server_had_stayed(lost: tuple[Path, Ended]) -> None:
    """Without torch, whose import would take longer than the work; a second time it finds nothing to do."""
    place, done = lost
    code = (
        "import sys; from prune_lab.commands.sync import main\n"
        "print([main(['sweep']), main(['sweep'])], 'torch' in sys.modules)"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": f"sqlite:///{place}/store.db"}
    said = subprocess.run([sys.executable, "-c", code], cwd=place, env=env, capture_output=True, text=True, check=False)
    assert said.stderr == ""
    assert said.stdout.splitlines()[-1] == "[0, 0] False"
    assert "sync: 2 logged, 0 held already" in said.stdout
    assert "sync: 0 logged, 2 held already" in said.stdout
    runs = read_store(place / "store.db")
    (parent,) = [run for run in runs if "prune_lab.sweep" in run.tags]
    assert parent.status == "FINISHED"
    assert parent.tags["mlflow.note.content"] == (done.folder / "results.md").read_text()
    children = [run for run in runs if run.parent == parent.run_id and run.status == "FINISHED"]
    assert len(children) == 2
    for job, run in zip("01", children, strict=True):
        summary = done.summary(job)
        assert run.metrics == pytest.approx(summary["metrics"])
        assert run.tags["prune_lab.fingerprint"] == summary["fingerprint"]
        assert summary["unlogged"] is None
        assert {path.name for path in (place / "artifacts").glob(f"*/{run.run_id}/artifacts/*")} == {
            "config.yaml", "layers.csv", "summary.json",
        }  # fmt: skip
    assert {run.status for run in runs if run not in [parent, *children]} == {"KILLED"}
    assert {entry["unlogged"] for entry in json.loads((done.folder / "results.json").read_text())} == {None}


def test_sync_refuses_a_folder_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert sync.main(["nowhere"]) == 2
    assert capsys.readouterr().err == (
        "prune_lab: nowhere: no such folder; name one that runs wrote to, such as outputs or multirun\n"
    )
