"""Sweeps that are killed at random moments and started again: nothing is lost, done twice or left half-written."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pytest
from conftest import ROOT
from safetensors import safe_open
from test_tracking import Stored, read_store
from warm import give_store, start_module

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
CODES = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}
PATIENCE = 600  # seconds to wait for a sweep, many times what it takes
AMOUNTS = "0.2,0.4,0.6"


class Process(Protocol):
    """A running sweep, the leader of its own process group."""

    pid: int

    def wait(self, timeout: float) -> int | None:
        """Its exit code, negative for a signal; None where it is still running after `timeout` seconds."""


class Started:
    """A sweep as a user starts it."""

    def __init__(self, arguments: list[str], place: Path, log: Path) -> None:
        with log.open("w") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "prune_lab", *arguments],
                cwd=place, env=environment(place), stdout=file, stderr=file, start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )  # fmt: skip
        self.pid = self._process.pid

    def wait(self, timeout: float) -> int | None:
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None


def forked(arguments: list[str], place: Path, log: Path) -> Process:
    """A sweep that finds its imports done: no seconds of them before each kill."""
    log.unlink(missing_ok=True)
    own: dict[str, str | None] = {"TMPDIR": str(place / "tmp"), "PRUNE_LAB_CACHE": str(place / "cache")}
    (place / "tmp").mkdir(exist_ok=True)
    return start_module("prune_lab", arguments, place, [log, log], MLFLOW_TRACKING_URI=None, **own)


Start = Callable[[list[str], Path, Path], Process]


def environment(place: Path) -> dict[str, str]:
    """A world of its own for the sweeps of `place`."""
    (place / "tmp").mkdir(exist_ok=True)
    env = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
    own = {"PRUNE_LAB_CACHE": str(place / "cache"), "TMPDIR": str(place / "tmp"), "PYTHONPATH": str(ROOT)}
    return env | own | {"HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def sweep(folder: Path, corpus: Path) -> list[str]:
    """Three jobs that train a little, with a checkpoint every few steps."""
    return [
        "model=hf", f"model.name={folder}", "dataset=text", f"dataset.path={corpus}", "dataset.seq_len=32",
        "measure=quality_only", "measure.max_windows=8", "recovery=finetune", "recovery.steps=12",
        "recovery.batch_size=4", "recovery.checkpoint_every=3", "recovery.autocast=none", "recovery.validate_every=6",
        "recovery.validate_windows=4", f"amount={AMOUNTS}", "-m",
    ]  # fmt: skip


@dataclass(frozen=True)
class Undisturbed:
    """What the sweep comes to when nothing happens to it, and how long that takes."""

    jobs: dict[str, dict[str, Any]]  # fingerprint -> summary
    layers: dict[str, str]  # fingerprint -> layers.csv
    seconds: float


def undisturbed(start: Start, arguments: list[str], place: Path) -> Undisturbed:
    """Runs the sweep to its end."""
    give_store(place)
    began = time.monotonic()
    assert start(arguments, place, place / "log").wait(PATIENCE) == 0, (place / "log").read_text()
    seconds = time.monotonic() - began
    (folder,) = place.glob("multirun/*/*")
    jobs = [json.loads((folder / job / "summary.json").read_text()) for job in "012"]
    layers = [(folder / job / "layers.csv").read_text() for job in "012"]
    names = [job["fingerprint"] for job in jobs]
    assert len(set(names)) == 3
    return Undisturbed(
        dict(zip(names, jobs, strict=True)), dict(zip(names, layers, strict=True)), seconds
    )  # fmt: skip


def disturb(start: Start, arguments: list[str], place: Path, kills: int, seconds: float, rng: random.Random) -> int:
    """Kills the sweep up to `kills` times and lets it come to its end; returns how often it was killed."""
    killed, numbers = 0, 0
    if rng.random() < 0.5:  # else it is killed while it makes its store, too
        give_store(place)
    while True:
        log = place / f"log{numbers}"
        numbers += 1
        process = start(arguments, place, log)
        if killed == kills:
            assert process.wait(PATIENCE) == 0, log.read_text()
            return killed
        number = rng.choice(SIGNALS)
        code = process.wait(rng.uniform(0.1, 1.0) * seconds)
        if code is None:
            os.killpg(process.pid, number)
            code = process.wait(PATIENCE)
            assert code in (CODES[number], 0, -number), (number, code, log.read_text())  # -15: before the program began
            killed += code != 0
        if code == 0:
            return killed
        if code > 0:
            assert "Traceback" not in log.read_text(), log.read_text()


def check(place: Path, expected: Undisturbed) -> None:
    """Every configuration FINISHED once, none RUNNING, the figures of an undisturbed sweep, and no half file."""
    # The record of a sweep that ended before its first job is taken back.
    runs = [run for run in read_store(place / "mlflow.db") if not run.deleted]
    assert {run.status for run in runs} <= {"FINISHED", "KILLED"}
    computed = [run for run in runs if run.status == "FINISHED" and "prune_lab.fingerprint" in run.tags]
    assert sorted(run.tags["prune_lab.fingerprint"] for run in computed) == sorted(expected.jobs)
    for run in computed:
        assert untimed(run.metrics) == untimed(expected.jobs[run.tags["prune_lab.fingerprint"]]["metrics"])
    parent = [run for run in runs if run.parent is None][-1]
    assert parent.status == "FINISHED"
    children = [run for run in runs if run.parent == parent.run_id]
    assert [run.status for run in children] == ["FINISHED"] * 3
    by_id = {run.run_id: run for run in computed}
    sources = [by_id[run.tags.get("prune_lab.reused_from", run.run_id)] for run in children]
    assert {run.tags["prune_lab.fingerprint"] for run in sources} == set(expected.jobs)
    last = max(place.glob("multirun/*/*"), key=lambda folder: folder.name)
    for entry in json.loads((last / "results.json").read_text()):
        assert untimed(entry["metrics"]) == untimed(expected.jobs[entry["fingerprint"]]["metrics"])
        assert entry["status"] == "FINISHED"
    check_files(place, expected, runs)


def check_files(place: Path, expected: Undisturbed, runs: list[Stored]) -> None:
    """Everything that is there is whole: JSON, safetensors, tables, the store; and nothing is left over."""
    for folder in (place / "multirun", place / "cache"):
        for path in folder.rglob("*.json"):
            json.loads(path.read_text())
        for path in folder.rglob("*.safetensors"):
            with safe_open(path, framework="pt") as file:
                assert all(file.get_tensor(name) is not None for name in file.keys())  # noqa: SIM118
        tables = set(expected.layers.values())
        assert all(path.read_text() in tables for path in folder.rglob("layers.csv"))
    assert [path for path in place.rglob("*") if path.name.endswith(".tmp")] == []
    assert list((place / "cache" / "training").glob("*")) == []
    with closing(sqlite3.connect(place / "mlflow.db")) as store:
        assert store.execute("pragma integrity_check").fetchall() == [("ok",)]
    for run in runs:
        if run.status == "FINISHED":
            for path in place.glob(f"mlruns/*/{run.run_id}/artifacts/*.json"):
                json.loads(path.read_text())


def untimed(metrics: dict[str, float]) -> dict[str, float]:
    """The results that are the same every time; a training's figures, by step, are no results."""
    return {name: value for name, value in metrics.items() if not re.match("time/|train/|validation/", name)}


def chaos(start: Start, sweep: list[str], kills: int, at_once: int, tmp: pytest.TempPathFactory) -> None:
    """Kills sweeps `kills` times in all, each up to `at_once` times before it may come to its end."""
    seed = int(os.environ.get("CHAOS_SEED", random.randrange(10**6)))
    print(f"CHAOS_SEED={seed} repeats the moments")  # noqa: T201 - pytest shows it when the test fails
    rng = random.Random(seed)
    expected = undisturbed(start, sweep, tmp.mktemp("undisturbed"))
    killed = episodes = 0
    while killed < kills:
        place = tmp.mktemp("disturbed")
        killed += disturb(start, sweep, place, min(at_once, kills - killed), expected.seconds, rng)
        check(place, expected)
        episodes += 1
        assert episodes <= 3 * kills, "the sweeps end before they can be killed"
    print(f"{killed} kills in {episodes} sweeps; one takes {expected.seconds:.1f} s")  # noqa: T201


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and signals")
def test_a_sweep_that_is_killed_5_times_comes_to_the_same_end(
    sweep: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    chaos(forked, sweep, 5, 5, tmp_path_factory)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and signals")
def test_sweeps_that_are_killed_30_times_come_to_the_same_end(
    sweep: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """As above, with sweeps that are started as a user starts them."""
    chaos(Started, sweep, 30, 4, tmp_path_factory)
