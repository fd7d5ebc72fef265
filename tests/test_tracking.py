"""Where results go, and that whatever ends a run is on record: finished, refused, failed, interrupted, killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Cli
from safetensors.torch import load_file, save_file
from warm import Running, give_store, start_module

from prune_lab.results.summary import Summary
from prune_lab.tracking.links import how_to_look
from prune_lab.tracking.ownership import BORN, HOST, PID, is_alive, owner_tags
from prune_lab.tracking.params import params_of, run_name

PATIENCE = 90  # seconds to wait for another process, many times what it takes


@dataclass(frozen=True)
class Stored:
    """A run as it stands in a store."""

    run_id: str
    status: str
    tags: dict[str, str]
    metrics: dict[str, float]
    deleted: bool = False

    @property
    def parent(self) -> str | None:
        """The parent's id, for a child."""
        return self.tags.get("mlflow.parentRunId")


def read_store(path: Path) -> list[Stored]:
    """All runs of an sqlite store, oldest first, read without MLflow so that asking costs nothing."""
    with closing(sqlite3.connect(path, timeout=20)) as store:
        runs = store.execute("select run_uuid, status, lifecycle_stage from runs order by start_time").fetchall()
        return [
            Stored(
                run_id,
                status,
                dict(store.execute("select key, value from tags where run_uuid = ?", (run_id,))),
                dict(store.execute("select key, value from latest_metrics where run_uuid = ?", (run_id,))),
                stage == "deleted",
            )
            for run_id, status, stage in runs
        ]


@dataclass(frozen=True)
class Stopped:
    """A process that a signal ended in the middle of its training, and its store as it was just before."""

    place: Path
    before: list[Stored]
    code: int
    stderr: str

    @property
    def after(self) -> list[Stored]:
        """The runs of its store now."""
        return read_store(self.place / "mlflow.db")


SWEEP = ["amount=0.2,0.4", "hydra.sweep.dir=here", "-m"]
STOPS = {
    "SIGTERM": (signal.SIGTERM, ["hydra.run.dir=here"]),
    "SIGHUP": (signal.SIGHUP, ["hydra.run.dir=here"]),
    "SIGINT": (signal.SIGINT, ["hydra.run.dir=here"]),
    "SIGKILL": (signal.SIGKILL, ["hydra.run.dir=here"]),
    "SIGINT to a sweep": (signal.SIGINT, SWEEP),
}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, folder: Path, corpus: Path) -> dict[str, Stopped]:
    """Real processes, all at once, each stopped as soon as its store shows that it trains."""
    places = {name: tmp_path_factory.mktemp("stopped") for name in STOPS}
    for place in places.values():
        give_store(place)
    processes = {name: start_training(place, folder, corpus, *STOPS[name][1]) for name, place in places.items()}
    done: dict[str, Stopped] = {}
    try:
        for _ in range(PATIENCE * 10):
            for name in processes.keys() - done.keys():
                process, store = processes[name], places[name] / "mlflow.db"
                if trains(store):
                    before = read_store(store)
                    process.send_signal(STOPS[name][0])
                    code = process.wait(PATIENCE)
                    assert code is not None, f"{name} did not end it"
                    done[name] = Stopped(places[name], before, code, (places[name] / "stderr").read_text())
                else:
                    assert process.poll() is None, (places[name] / "stderr").read_text()
            if len(done) == len(processes):
                return done
            time.sleep(0.1)
        raise AssertionError(f"these never trained: {processes.keys() - done.keys()}")
    finally:
        for process in processes.values():
            process.kill()


def start_training(place: Path, folder: Path, corpus: Path, *overrides: str) -> Running:
    """Starts a training without end, on one thread, that logs and is on record in the default store."""
    small = [
        "model=hf", f"model.name={folder}", "dataset=text", f"dataset.path={corpus}", "dataset.seq_len=32",
        "measure=quality_only", "recovery=finetune", "recovery.steps=100000", "recovery.autocast=none",
    ]  # fmt: skip
    own = {"PRUNE_LAB_CACHE": str(place / "cache"), "MLFLOW_TRACKING_URI": None}
    return start_module("prune_lab", [*small, *overrides], place, [place / "stdout", place / "stderr"], **own)


def trains(store: Path) -> bool:
    """Whether a run of the store has logged a figure of its training."""
    try:
        return any("train/loss" in run.metrics for run in read_store(store))
    except sqlite3.OperationalError:  # not there yet, or being made
        return False


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129), ("SIGINT", 130)])
def test_a_run_that_is_told_to_stop_is_killed(name: str, code: int, stopped: dict[str, Stopped]) -> None:
    ended = stopped[name]
    assert [run.status for run in ended.before] == ["RUNNING"]
    assert ended.code == code
    assert "Traceback" not in ended.stderr
    assert len(ended.stderr.splitlines()) <= 1, ended.stderr
    (run,) = ended.after
    assert run.status == "KILLED"
    assert run.tags["status_reason"]
    summary = json.loads((ended.place / "here" / "summary.json").read_text())
    assert summary["status"] == "KILLED"
    assert summary["reason"]


def test_an_interrupted_sweep_leaves_nothing_running(stopped: dict[str, Stopped]) -> None:
    ended = stopped["SIGINT to a sweep"]
    assert [run.status for run in ended.before] == ["RUNNING", "RUNNING"]
    assert ended.code == 130
    assert "Traceback" not in ended.stderr
    parent, child = ended.after  # the second job was never begun
    assert child.parent == parent.run_id
    assert (parent.status, child.status) == ("KILLED", "KILLED")
    results = json.loads((ended.place / "here" / "results.json").read_text())
    assert [(entry["job"], entry["status"]) for entry in results] == [("0", "KILLED")]


def test_the_next_start_finds_what_sigkill_left_running(
    stopped: dict[str, Stopped], small: list[str], cli: Cli
) -> None:
    """Nobody can say goodbye to SIGKILL. The next start is refused, halfway, and goes on record itself."""
    ended = stopped["SIGKILL"]
    assert [run.status for run in ended.after] == ["RUNNING"]
    uri = f"sqlite:///{ended.place / 'mlflow.db'}"
    done = cli(*small, "measure=quality_only", "method.pattern=2:7", MLFLOW_TRACKING_URI=uri)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "method.pattern=2:7" in done.stderr
    killed, refused = ended.after
    assert (killed.status, refused.status) == ("KILLED", "FAILED")
    assert "process" in killed.tags["status_reason"]
    assert "method.pattern=2:7" in refused.tags["status_reason"]


def test_a_run_that_fails_says_why(small: list[str], tmp_path: Path, cli: Cli) -> None:
    """Its export cannot be written, for a file is in the way."""
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "export").write_text("in the way")
    done = cli(*small, "measure=quality_only", "export=hf", "hydra.run.dir=here")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "NotADirectoryError" in done.stderr
    (run,) = read_store(tmp_path / "mlflow.db")
    assert run.status == "FAILED"
    assert "NotADirectoryError" in run.tags["status_reason"]
    summary = json.loads((tmp_path / "here" / "summary.json").read_text())
    assert summary["status"] == "FAILED"
    assert "NotADirectoryError" in summary["reason"]
    assert "Traceback" in (tmp_path / "here" / "prune_lab.log").read_text()
    assert (tmp_path / "here" / "export").read_text() == "in the way"


def test_another_store_and_experiment_are_used_and_infinity_is_no_metric(
    small: list[str], tmp_path: Path, cli: Cli, folder: Path
) -> None:
    """The last norm is scaled until the perplexity is beyond every number."""
    model = tmp_path / "model"
    shutil.copytree(folder, model)
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"] *= 1e5
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    uri = f"sqlite:///{tmp_path / 'other.db'}"
    overrides = [f"model.name={model}", "measure=quality_only", "name=elsewhere", "hydra.run.dir=here"]
    done = cli(*small, *overrides, MLFLOW_TRACKING_URI=uri)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""

    assert not (tmp_path / "mlflow.db").exists()
    (run,) = read_store(tmp_path / "other.db")
    assert (run.status, run.parent) == ("FINISHED", None)
    with closing(sqlite3.connect(tmp_path / "other.db")) as store:
        ((experiment,),) = store.execute(
            "select experiments.name from experiments join runs on runs.experiment_id = experiments.experiment_id"
        )
    assert experiment == "elsewhere"

    summary = json.loads((tmp_path / "here" / "summary.json").read_text())
    diverged = {"quality/perplexity", "quality/dense_perplexity", "quality/perplexity_ratio"}
    assert "quality/kl" in summary["metrics"]  # two wild models can be compared all the same
    assert not diverged & set(summary["metrics"])
    assert run.metrics == pytest.approx(summary["metrics"])
    assert all(abs(value) < 1e300 for value in run.metrics.values())
    for name in diverged:
        assert name in run.tags["diverged"]
        assert any(name in warning for warning in summary["warnings"])


def test_without_tracking_mlflow_is_not_imported(small: list[str], tmp_path: Path) -> None:
    code = (
        "import sys; from prune_lab import __main__ as program\n"
        "try: program.main()\n"
        "except SystemExit as end: print('ended:', end.code, 'mlflow' in sys.modules, 'torch' in sys.modules)"
    )
    arguments = [*small, "tracking=none", "hydra.run.dir=here"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines()[-1] == "ended: 0 False True", done.stderr
    assert not (tmp_path / "mlflow.db").exists()
    summary = json.loads((tmp_path / "here" / "summary.json").read_text())
    assert summary["status"] == "FINISHED"
    assert "quality/perplexity" in summary["metrics"]


def test_a_store_that_cannot_be_opened_is_refused_before_the_first_job(
    small: list[str], tmp_path: Path, cli: Cli
) -> None:
    (tmp_path / "notes.db").write_text("this is no database " * 100)
    done = cli(*small, "amount=0.2,0.4", "-m", MLFLOW_TRACKING_URI=f"sqlite:///{tmp_path}/notes.db")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert f"{tmp_path}/notes.db" in done.stderr
    assert not list(tmp_path.rglob("summary.json"))


def test_an_owner_is_alive_as_long_as_its_process_may_be() -> None:
    mine = owner_tags()
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert is_alive(mine)
    assert not is_alive({**mine, PID: str(gone.pid)})
    assert not is_alive({**mine, BORN: str(float(mine[BORN]) - 1000)}), "the pid is in use again"
    assert is_alive({**mine, PID: str(gone.pid), HOST: "elsewhere"}), "another machine's processes cannot be seen"
    assert not is_alive({HOST: socket.gethostname()})


def test_a_method_s_own_amount_is_the_one_on_record() -> None:
    config = {"amount": 0.5, "seed": 0, "method": {"amount": 0.3, "pattern": None}}
    config |= {group: {} for group in ("schedule", "recovery", "post")}
    choices = {"method": "magnitude", "recovery": "none", "post": "none"}
    summary = Summary("FINISHED", config=config, choices=choices, protocol={"dtype": "float32", "device": "cpu"})
    assert params_of(summary)["amount"] == 0.3
    assert run_name(summary) == "magnitude 0.3"


@pytest.mark.parametrize(
    ("export", "name"), [("none", "magnitude 0.5"), ("hf", "magnitude 0.5"), ("bitmask", "magnitude 0.5 + bitmask")]
)
def test_the_export_is_a_parameter_and_told_where_it_changes_a_figure(export: str, name: str) -> None:
    groups = ("method", "schedule", "recovery", "post", "export")
    config: dict[str, Any] = {"amount": 0.5, "seed": 0} | {group: {} for group in groups}
    choices = {"method": "magnitude", "recovery": "none", "post": "none", "export": export}
    summary = Summary("FINISHED", config=config, choices=choices, protocol={"dtype": "float32", "device": "cpu"})
    assert params_of(summary)["export"] == export
    assert run_name(summary) == name


def test_a_record_of_a_version_that_had_a_switch_is_read() -> None:
    """Such as prune-lab sync finds, when export was true or false."""
    config: dict[str, Any] = {"amount": 0.5, "seed": 0, "method": {}, "schedule": {}, "recovery": {}, "post": {}}
    choices = {"method": "magnitude", "recovery": "none", "post": "sparse_bitmask"}
    stamp = {"dtype": "float32", "device": "cpu"}
    summary = Summary("FINISHED", config=config | {"export": True}, choices=choices, protocol=stamp)
    assert "export" not in params_of(summary)
    assert run_name(summary) == "magnitude 0.5 + sparse_bitmask"


def test_a_stores_password_is_not_shown() -> None:
    lines = "\n".join(how_to_look("postgresql://me:secret@host:5432/db", "7", ["a", "b"]))
    assert "secret" not in lines
    assert "--backend-store-uri postgresql://me:***@host:5432/db" in lines
    lines = "\n".join(how_to_look("https://mlflow.example.org/", "7", ["a", "b"]))
    assert "mlflow ui" not in lines
    assert "https://mlflow.example.org/#/experiments/7/runs" in lines


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of MLflow's own queries
def test_the_card_is_with_the_run_and_the_export_is_registered(small: list[str], tmp_path: Path, cli: Cli) -> None:
    """Also of a run that had finished before, and once."""
    from mlflow import MlflowClient
    from transformers import AutoModelForCausalLM

    run = [*small, "method=magnitude", "export=hf", "measure=quality_only", "quiet=true"]
    done = cli(*run, "hydra.run.dir=one")
    assert done.returncode == 0, done.stderr
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (found,) = client.search_runs([client.get_experiment_by_name("prune_lab").experiment_id])
    assert [file.path for file in client.list_artifacts(found.info.run_id, "export")] == ["export/README.md"]
    card = Path(client.download_artifacts(found.info.run_id, "export/README.md")).read_text()
    assert card == (tmp_path / "one" / "export" / "README.md").read_text()
    assert client.search_registered_models() == []
    for folder, words in (("two", []), ("three", []), ("four", ["amount=0.25"])):
        done = cli(*run, *words, "tracking.register=mine 0.5", f"hydra.run.dir={folder}")
        assert done.returncode == 0, done.stderr
    versions = client.search_model_versions("name = 'mine 0.5'")
    assert sorted(int(version.version) for version in versions) == [1, 2]
    assert {version.run_id for version in versions} > {found.info.run_id}
    assert all(version.description.startswith("# ") for version in versions)
    assert all("| transformers 5 | yes |" in version.description for version in versions)
    summary = json.loads((tmp_path / "three" / "summary.json").read_text())
    assert "registered in MLflow as models:/mine 0.5/1" in summary["warnings"]
    for version, folder in (("1", "one"), ("2", "four")):
        (source,) = (one.source for one in versions if str(one.version) == version)
        again = AutoModelForCausalLM.from_pretrained(Path(source.removeprefix("file://")))
        expected = load_file(tmp_path / folder / "export" / "model.safetensors")
        state = again.state_dict()
        assert all((state[name] == tensor).all() for name, tensor in expected.items())
