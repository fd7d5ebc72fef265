"""Two processes train one model together: the same weights as one process, one record, the same command line."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
import torch
from conftest import Cli
from mlflow import MlflowClient
from processes import ACCELERATE_FSDP, TORCHRUN, launched, together
from safetensors.torch import load_file
from torch.testing import assert_close
from warm import give_store

from prune_lab.system import launch
from prune_lab.system.device import numbered

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")

TRAINING = [
    "measure=quality_only", "recovery.steps=8", "recovery.batch_size=4", "recovery.lr=0.003", "recovery.autocast=none",
    "recovery.validate_every=4", "export=hf",
]  # fmt: skip


def test_a_gpu_has_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """device=cuda and auto name the same one, alone the first and under a launcher each process's own."""
    for size, expected in ((None, "cuda:0"), ("1", "cuda:0"), ("2", "cuda:1")):
        for name, value in (("WORLD_SIZE", size), ("LOCAL_RANK", size and "1")):
            monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
        assert str(numbered(torch.device("cuda"))) == expected
        assert [str(numbered(torch.device(name))) for name in ("cpu", "cuda:3")] == ["cpu", "cuda:3"]


@pytest.mark.parametrize(
    ("recovery", "launchers"),
    [
        pytest.param("finetune", [TORCHRUN], marks=pytest.mark.slow),  # its shards: test_fsdp.py
        ("distill", [None, ACCELERATE_FSDP]),
        pytest.param("lora", [None, ACCELERATE_FSDP], marks=pytest.mark.slow),
    ],
    ids=["finetune", "distill", "lora"],
)
def test_two_processes_train_what_one_does(
    small: list[str], cli: Cli, tmp_path: Path, recovery: str, launchers: list[tuple[str, ...] | None]
) -> None:
    """At the same global batch, by one command line: each process has a copy of the model, or a part of it (FSDP).

    A launcher is a real one, or none: two processes with the variables that it would set.
    """
    arguments = [
        *small, *TRAINING, f"recovery={recovery}", "method=structured", "method.score=l2", "method.refit=none",
        "amount=0.25", "schedule=iterative", "schedule.rounds=2", "tracking=none", "resume=false",
    ]  # fmt: skip
    alone = cli(*arguments, f"hydra.run.dir={tmp_path / 'one'}", OMP_NUM_THREADS="1")
    assert alone.returncode == 0, alone.stderr
    for launcher in launchers:
        place = tmp_path / (launcher[0] if launcher else "forked")
        own = [*arguments, f"hydra.run.dir={place}"]
        done = launched(launcher, tmp_path, "-m", "prune_lab", *own) if launcher else together(tmp_path, *own)
        assert done.returncode == 0, done.stderr
        one, two = (load_file(folder / "export/model.safetensors") for folder in (tmp_path / "one", place))
        assert one.keys() == two.keys()
        for name, weight in one.items():
            assert_close(two[name], weight, atol=2e-4, rtol=2e-3)
        summaries = [json.loads((folder / "summary.json").read_text()) for folder in (tmp_path / "one", place)]
        assert [summary["environment"]["processes"] for summary in summaries] == [1, 2]
        assert [summary["environment"]["sharded"] for summary in summaries] == [False, launcher == ACCELERATE_FSDP]
        assert summaries[0]["fingerprint"] == summaries[1]["fingerprint"]
        assert done.stdout.count("perplexity") == alone.stdout.count("perplexity")  # one table, not two


def test_a_sweep_of_two_processes_is_recorded_once_and_found_again(small: list[str], cli: Cli, tmp_path: Path) -> None:
    arguments = [
        "-m",
        *small,
        *TRAINING,
        "recovery=finetune",
        "amount=0.3,0.5",
        f"hydra.sweep.dir={tmp_path / 'sweep'}",
    ]
    give_store(tmp_path)
    done = together(tmp_path, *arguments)
    assert done.returncode == 0, done.stderr
    client = MlflowClient("sqlite:///" + str(tmp_path / "mlflow.db"))
    experiment = client.get_experiment_by_name("prune_lab")
    runs = client.search_runs([experiment.experiment_id])
    assert [run.info.status for run in runs] == ["FINISHED"] * 3
    assert sum("mlflow.parentRunId" in run.data.tags for run in runs) == 2
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as store:
        validated = "select step from metrics where key = 'validation/perplexity' and run_uuid = ? order by step"
        assert store.execute(validated, (runs[0].info.run_id,)).fetchall() == [(0,), (4,), (8,)]
    # Its loss is that of one process. Weights would not tell: AdamW forgets a gradient's scale.
    alone = cli(
        *small, *TRAINING, "recovery=finetune", "amount=0.3", "name=alone", f"hydra.run.dir={tmp_path / 'alone'}"
    )
    assert alone.returncode == 0, alone.stderr
    (one,) = client.search_runs([client.get_experiment_by_name("alone").experiment_id])
    both = next(run for run in runs if run.data.params.get("amount") == "0.3")
    assert both.data.metrics["train/loss"] == pytest.approx(one.data.metrics["train/loss"], rel=1e-4)
    again = together(tmp_path, *arguments)
    assert again.returncode == 0, again.stderr
    for job in ("0", "1"):
        assert json.loads((tmp_path / "sweep" / job / "summary.json").read_text())["reused_from"]


def test_a_batch_that_cannot_be_shared_equally_is_refused(small: list[str], tmp_path: Path) -> None:
    done = together(tmp_path, *small, "recovery=finetune", "recovery.batch_size=3", "tracking=none")
    assert done.returncode != 0
    assert "recovery.batch_size=3 cannot be shared equally by 2 processes" in done.stderr


def test_helping_processes_write_nowhere_and_track_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is added stands beside the other overrides, after them: the last one counts."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    given = ["method=random", "amount=0.1,0.2", "-m"]
    assert launch.for_this_process(given) == given
    monkeypatch.setenv("RANK", "1")
    helping = launch.for_this_process(given)
    assert helping[:2] == given[:2]
    assert helping[-1] == "-m"
    assert {"tracking=none", "quiet=true"} < set(helping[2:-1])
    # Of a sweep over it they would run other jobs than the first process, which then waits for them in vain.
    assert not any(word.startswith("export") for word in launch.for_this_process(["export=none,hf", "-m"])[1:])
    assert launch.for_this_process(["-cd", "experiments", "-cn", "x"])[:4] == ["-cd", "experiments", "-cn", "x"]


def metrics_of(folder: Path) -> dict[str, float]:
    """Metrics of a job that are no times."""
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "FINISHED"
    return {name: value for name, value in summary["metrics"].items() if not name.startswith("time/")}


MEASURED = [
    "measure=quality_only", "tracking=none", "dataset.calibration.n_samples=5", "dataset.calibration.batch_size=2",
    "measure.max_windows=7", "measure.kl_windows=3", "measure.batch_size=2",
]  # fmt: skip


def test_two_processes_calibrate_and_measure_what_one_does(small: list[str], cli: Cli, tmp_path: Path) -> None:
    """Windows that do not divide evenly: the table is that of one process."""
    arguments = [*small, *MEASURED, "method=wanda", "amount=0.4"]
    alone = cli(*arguments, f"hydra.run.dir={tmp_path / 'one'}", PRUNE_LAB_CACHE=str(tmp_path / "other cache"))
    assert alone.returncode == 0, alone.stderr
    done = together(tmp_path, *arguments, f"hydra.run.dir={tmp_path / 'two'}")
    assert done.returncode == 0, done.stderr
    one, two = (metrics_of(tmp_path / of) for of in ("one", "two"))
    assert {"quality/perplexity", "quality/dense_perplexity", "quality/kl"} < one.keys()
    assert two == pytest.approx(one, rel=1e-4, abs=1e-7)


@pytest.mark.slow
def test_jobs_of_two_processes_share_a_cache(small: list[str], cli: Cli, tmp_path: Path) -> None:
    """From an empty one and from a full one, with figures of the dense model that are computed once."""
    arguments = [
        "-m", *small, *MEASURED, "method=wanda,structured", "amount=0.3,0.5", "dataset.calibration.propagate=dense"
    ]  # fmt: skip
    alone = cli(*arguments, f"hydra.sweep.dir={tmp_path / 'one'}", PRUNE_LAB_CACHE=str(tmp_path / "other cache"))
    assert alone.returncode == 0, alone.stderr
    for name in ("two", "again"):
        done = together(tmp_path, *arguments, f"hydra.sweep.dir={tmp_path / name}")
        assert done.returncode == 0, done.stderr
        for job in "0123":
            one, two = (metrics_of(tmp_path / of / job) for of in ("one", name))
            assert two == pytest.approx(one, rel=1e-3, abs=1e-6)


@pytest.mark.slow  # processes wait a while for others that fail
@pytest.mark.parametrize("jobs", [["amount=0.3"], ["-m", "amount=0.3,0.5"]], ids=["run", "sweep"])
def test_a_failure_of_one_process_ends_both(small: list[str], tmp_path: Path, jobs: list[str]) -> None:
    """In a sweep, too, the rest of which is not begun: the other one waits in the middle of its job."""
    folder = tmp_path / "sweep/0" if "-m" in jobs else tmp_path / "run"
    folder.mkdir(parents=True)
    (folder / "export").write_text("in the way of the first process alone")
    arguments = [*jobs, *small, "measure=quality_only", "export=hf", "tracking=none"]
    done = together(tmp_path, *arguments, f"hydra.sweep.dir={tmp_path / 'sweep'}", f"hydra.run.dir={tmp_path / 'run'}")
    assert done.returncode == 1, done.stderr
    assert json.loads((folder / "summary.json").read_text())["status"] == "FAILED"
    assert not (tmp_path / "sweep/1/summary.json").exists()


def test_a_sweep_goes_on_after_what_all_processes_refuse(small: list[str], tmp_path: Path) -> None:
    """Before they have met, and while they look at the model."""
    arguments = [
        "-m", *small, "measure=quality_only", "tracking=none", "method=structured", "method.score=l2",
        "method.refit=none", "method.round_to=-1,1000,1", f"hydra.sweep.dir={tmp_path / 'sweep'}",
    ]  # fmt: skip
    done = together(tmp_path, *arguments)
    assert done.returncode == 1, done.stderr
    found = [json.loads((tmp_path / f"sweep/{job}/summary.json").read_text())["status"] for job in range(3)]
    assert found == ["FAILED", "FAILED", "FINISHED"]
