"""A finished run is not computed again; anything that could change its result makes it another run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from mlflow import MlflowClient
from mlflow.entities import Run
from safetensors.torch import load_file, save_file
from warm import give_store, run_module

from prune_lab import __main__ as program
from prune_lab.cache import cache_folder
from prune_lab.fingerprint import fingerprint
from prune_lab.sweeps import sweep

# MLflow 3's own models use a deprecated part of SQLAlchemy, which says so when a store is first opened.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")

AGAIN = "finished before, not computed again"


@dataclass(frozen=True)
class Ended:
    """What a command line left: its exit code, what it printed, and its folder."""

    code: int
    stdout: str
    folder: Path
    stderr: str = ""

    def summary(self, job: str = "") -> dict[str, Any]:
        """summary.json of the run, or of a job of the sweep."""
        found = json.loads((self.folder / job / "summary.json").read_text())
        assert isinstance(found, dict)
        return found

    @property
    def computed(self) -> bool:
        """Whether the single run was computed, by its summary and by what was said, which must agree."""
        again = self.summary()["reused_from"] is not None
        assert again == (AGAIN in self.stdout)
        return not again


# Through the cache folder: tracking=none, in this process.

RunHere = Callable[..., Ended]


@pytest.fixture
def run_here(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[RunHere]:
    """Runs a command line in this process, on the small model, untracked, in a folder of its own."""
    on_sigterm = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(sweep, "_current", None)
    count = 0

    def run(*overrides: str) -> Ended:
        nonlocal count
        count += 1
        folder = tmp_path / f"run{count}"
        places = [f"hydra.run.dir={folder}", f"hydra.sweep.dir={folder}"]
        arguments = [*small, "measure=quality_only", "tracking=none", *places, *overrides]
        monkeypatch.setattr(sys, "argv", ["prune_lab", *arguments])
        capsys.readouterr()
        code = program._run(arguments)
        said = capsys.readouterr()
        assert said.err == ""
        return Ended(code, said.out, folder)

    yield run
    signal.signal(signal.SIGTERM, on_sigterm)


def test_the_same_command_is_not_computed_again(run_here: RunHere) -> None:
    """Its times are those of the first run to the last digit, and no layers.csv was written anew."""
    first, second = run_here(), run_here()
    assert (first.code, second.code) == (0, 0)
    assert first.computed
    assert not second.computed
    assert second.summary()["metrics"] == first.summary()["metrics"]
    assert second.summary()["fingerprint"] == first.summary()["fingerprint"]
    assert not (second.folder / "layers.csv").exists()


def test_what_a_run_left_that_was_killed_at_its_very_end_goes(run_here: RunHere) -> None:
    """A checkpoint of what is on record as finished; that of another run stays."""
    first = run_here()
    left, other = (cache_folder() / "training" / name for name in (first.summary()["fingerprint"], "other"))
    for folder in (left, other):
        folder.mkdir(parents=True)
        (folder / "training.safetensors").touch()
    assert not run_here().computed
    assert not left.exists()
    assert other.exists()


def test_resume_false_computes_again(run_here: RunHere) -> None:
    first, second = run_here(), run_here("resume=false")
    assert second.computed
    assert second.summary()["metrics"]["time/measure_s"] != first.summary()["metrics"]["time/measure_s"]
    assert second.summary()["metrics"]["quality/perplexity"] == first.summary()["metrics"]["quality/perplexity"]


@pytest.mark.parametrize("override", ["quiet=false", "device=cpu", "dtype=float32", "device=cpu dtype=float32"])
def test_what_auto_stands_for_is_the_same_run(override: str, run_here: RunHere) -> None:
    run_here("device=cpu")
    assert not run_here("device=cpu", *override.replace("device=cpu", "").split()).computed


@pytest.mark.parametrize(
    "override",
    [
        "amount=0.4", "seed=1", "method=random", "method.scope=global", "measure.max_windows=7", "measure.batch_size=3",
        "dataset.seq_len=31", "dtype=bfloat16", "model.weights=random", "recovery=finetune recovery.steps=1",
    ],
)  # fmt: skip
def test_another_configuration_is_another_run(override: str, run_here: RunHere) -> None:
    run_here()
    assert run_here(*override.split()).computed


def test_another_experiment_has_its_own_results(run_here: RunHere) -> None:
    """The fingerprint is the same; resuming looks in the same experiment alone."""
    first, second = run_here(), run_here("name=another")
    assert second.computed
    assert second.summary()["fingerprint"] == first.summary()["fingerprint"]
    assert not run_here("name=another").computed


def test_a_moved_model_is_the_same_model_and_a_changed_weight_is_not(
    run_here: RunHere, folder: Path, tmp_path: Path
) -> None:
    run_here()
    moved, changed = tmp_path / "moved", tmp_path / "changed"
    shutil.copytree(folder, moved)
    assert not run_here(f"model.name={moved}").computed
    shutil.copytree(folder, changed)
    tensors = load_file(changed / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] += 1e-3
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    assert run_here(f"model.name={changed}").computed


def test_a_moved_text_is_the_same_text_and_a_changed_word_is_not(
    run_here: RunHere, corpus: Path, tmp_path: Path
) -> None:
    """The word is one of the first document, wherever its split."""
    run_here()
    moved, changed = tmp_path / "moved", tmp_path / "changed"
    shutil.copytree(corpus, moved)
    assert not run_here(f"dataset.path={moved}").computed
    shutil.copytree(corpus, changed)
    (changed / "0.txt").write_text((corpus / "0.txt").read_text().replace("thing", "think", 1))
    assert run_here(f"dataset.path={changed}").computed


def test_an_export_that_is_not_there_is_made(run_here: RunHere) -> None:
    """Of a run that was finished without one, or whose export is gone; a run that has one serves both commands."""
    run_here()
    first = run_here("export=hf")
    assert first.computed
    assert (first.folder / "export" / "model.safetensors").exists()
    assert not run_here("export=hf").computed
    assert not run_here().computed
    shutil.rmtree(first.folder / "export")
    second = run_here("export=hf")
    assert second.computed
    assert (second.folder / "export" / "model.safetensors").exists()


def test_an_export_in_another_format_is_another_run(run_here: RunHere) -> None:
    """Its size on disk is its own; without an export a run is that of a Hugging Face folder."""
    plain, bits = run_here("export=hf"), run_here("export=bitmask")
    assert plain.computed
    assert bits.computed
    assert [run_here(f"export={name}").computed for name in ("none", "hf", "bitmask")] == [False, False, False]
    sizes = [ended.summary()["metrics"]["size/disk_mb"] for ended in (plain, bits)]
    assert sizes[1] < sizes[0]
    (bits.folder / "export" / "model.bitmask.safetensors").unlink()
    assert run_here("export=bitmask").computed
    assert not run_here("export=hf").computed


def test_an_export_in_a_folder_that_other_runs_used_is_not_served_for_theirs(run_here: RunHere, tmp_path: Path) -> None:
    """Nor when the folder's summary says so again, since the first run was asked for once more."""
    place = f"hydra.run.dir={tmp_path / 'fixed'}"
    run_here(place, "amount=0.2", "export=hf")
    weights = tmp_path / "fixed" / "export" / "model.safetensors"
    first = weights.read_bytes()
    run_here(place, "amount=0.4", "export=hf")
    second = weights.read_bytes()
    assert second != first
    run_here(place, "amount=0.2")
    assert weights.read_bytes() == second
    run_here(place, "amount=0.2", "export=hf")
    assert weights.read_bytes() == first


def test_a_sweep_does_not_compare_jobs_that_an_earlier_one_left_there(run_here: RunHere, tmp_path: Path) -> None:
    place = f"hydra.sweep.dir={tmp_path / 'fixed'}"
    run_here(place, "amount=0.2,0.4", "-m")
    run_here(place, "amount=0.6", "-m")
    results = json.loads((tmp_path / "fixed" / "results.json").read_text())
    assert [job["config"]["amount"] for job in results] == [0.6]
    assert run_here(place, "amount=0.4,0.6", "-m").code == 0
    results = json.loads((tmp_path / "fixed" / "results.json").read_text())
    assert [job["config"]["amount"] for job in results] == [0.4, 0.6]


def test_a_damaged_record_is_computed_again(run_here: RunHere, tmp_path: Path) -> None:
    run_here()
    (record,) = (tmp_path / "cache").rglob("summary.json")
    record.write_text(record.read_text()[:100])
    assert run_here().computed
    assert not run_here().computed


def test_a_repeated_sweep_is_compared_again_without_a_store(run_here: RunHere) -> None:
    first, second = run_here("amount=0.2,0.4", "-m"), run_here("amount=0.2,0.4", "-m")
    assert (first.code, second.code) == (0, 0)
    assert AGAIN not in first.stdout
    assert second.stdout.count(AGAIN) == 2
    for job in "01":
        assert first.summary(job)["reused_from"] is None
        assert second.summary(job)["reused_from"]
        assert second.summary(job)["metrics"] == first.summary(job)["metrics"]
    assert not list(second.folder.glob("baseline-*.json"))
    assert (second.folder / "results.md").read_text() == (first.folder / "results.md").read_text()


@pytest.mark.slow
@pytest.mark.process
def test_a_sweep_is_not_served_the_results_of_older_source(small: list[str], tmp_path: Path) -> None:
    """In a copy of the package, magnitude's score is turned round: other figures. Then it is turned back."""
    copy = tmp_path / "copy"
    for part in ("prune_lab", "conf", "hydra_plugins"):
        shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
    words = [*small, "measure=quality_only", "tracking=none", "amount=0.2,0.4", "-m"]

    def summaries(name: str, done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
        assert done.returncode == 0, done.stderr
        ended = Ended(done.returncode, done.stdout, tmp_path / name)
        return [ended.summary(job) for job in "01"]

    def run_copy(name: str) -> list[dict[str, Any]]:
        done = subprocess.run(
            [sys.executable, "-m", "prune_lab", *words, f"hydra.sweep.dir={tmp_path / name}"],
            cwd=copy,
            env={**os.environ, "PYTHONPATH": str(copy)},
            capture_output=True,
            text=True,
            check=False,
        )
        return summaries(name, done)

    first = summaries("first", run_module("prune_lab", [*words, f"hydra.sweep.dir={tmp_path / 'first'}"], tmp_path))
    source = copy / "prune_lab" / "pruning" / "scores.py"
    text, score = source.read_text(), "return weight.abs()"
    assert text.count(score) == 1
    source.write_text(text.replace(score, "return -weight.abs()"))
    edited = run_copy("edited")
    source.write_text(text)
    again = run_copy("again")
    assert [summary["reused_from"] for summary in (*first, *edited)] == [None] * 4
    for before, after, last in zip(first, edited, again, strict=True):
        assert before["fingerprint"] != after["fingerprint"]
        assert before["metrics"]["quality/perplexity"] != after["metrics"]["quality/perplexity"]
        assert last["reused_from"] is not None
        assert last["metrics"] == before["metrics"]


# Through MLflow, in processes of their own: a sweep, the sweep again, one of its jobs alone, and that again anew.


@dataclass(frozen=True)
class Story:
    """Four command lines on one store, and the store's runs after each."""

    ended: dict[str, Ended]
    runs: dict[str, dict[str, Run]]

    def new(self, name: str, before: str) -> list[Run]:
        """The runs that were in the store after `name` and not after `before`, oldest first."""
        fresh = [run for run_id, run in self.runs[name].items() if run_id not in self.runs[before]]
        return sorted(fresh, key=lambda run: run.info.start_time)


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory, folder: Path, corpus: Path) -> Story:
    """The four command lines, run."""
    place = tmp_path_factory.mktemp("story")
    small = [
        "model=hf", f"model.name={folder}", "dataset=text", f"dataset.path={corpus}", "dataset.seq_len=32",
        "measure=quality_only", "measure.max_windows=8",
    ]  # fmt: skip
    own = {"PRUNE_LAB_CACHE": str(place / "cache"), "MLFLOW_TRACKING_URI": None}
    give_store(place)
    result = Story({}, {})
    for name, overrides in {
        "sweep": ["amount=0.2,0.4", "hydra.sweep.dir=sweep", "-m"],
        "sweep again": ["amount=0.2,0.4", "hydra.sweep.dir=again", "-m"],
        "single": ["amount=0.4", "hydra.run.dir=single"],
        "anew": ["amount=0.4", "resume=false", "hydra.run.dir=anew"],
    }.items():
        done = run_module("prune_lab", [*small, *overrides], place, **own)
        assert done.stderr == ""
        where = next(o for o in overrides if o.startswith("hydra.")).split("=")[1]
        result.ended[name] = Ended(done.returncode, done.stdout, place / where)
        client = MlflowClient(f"sqlite:///{place / 'mlflow.db'}")
        experiment = client.get_experiment_by_name("prune_lab")
        assert experiment is not None
        result.runs[name] = {run.info.run_id: run for run in client.search_runs([experiment.experiment_id])}
    return result


def test_every_command_of_the_story_ends_with_0(story: Story) -> None:
    assert [ended.code for ended in story.ended.values()] == [0, 0, 0, 0]
    assert len(story.runs["sweep"]) == 3
    assert {run.info.status for run in story.runs["anew"].values()} == {"FINISHED"}


def test_a_repeated_sweep_enters_earlier_results_under_its_own_parent(story: Story) -> None:
    old = story.runs["sweep"]
    fresh = story.new("sweep again", "sweep")
    (parent,) = [run for run in fresh if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in fresh if run is not parent]
    assert len(children) == 2
    for child in children:
        assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert "prune_lab.fingerprint" not in child.data.tags
        source = old[child.data.tags["prune_lab.reused_from"]]
        assert child.data.params == source.data.params
        assert child.data.metrics == source.data.metrics
    assert {child.data.params["amount"] for child in children} == {"0.2", "0.4"}
    assert parent.data.metrics == {
        name: value for name, value in children[0].data.metrics.items() if "/dense_" in name
    }  # fmt: skip
    assert story.ended["sweep again"].stdout.count(AGAIN) == 2
    results = [json.loads((story.ended[name].folder / "results.json").read_text()) for name in ("sweep", "sweep again")]
    assert [entry["metrics"] for entry in results[1]] == [entry["metrics"] for entry in results[0]]


def test_a_finished_run_is_shown_and_not_recorded_twice(story: Story) -> None:
    """The job of the sweep is found when it is asked for by itself; its source is the run that was computed."""
    assert story.new("single", "sweep again") == []
    single = story.ended["single"]
    assert not single.computed
    assert single.summary()["metrics"] == story.ended["sweep"].summary("1")["metrics"]
    source = story.runs["sweep"][single.summary()["reused_from"]]
    assert source.data.params["amount"] == "0.4"


def test_resume_false_is_recorded_again(story: Story) -> None:
    (run,) = story.new("anew", "single")
    anew = story.ended["anew"]
    assert anew.computed
    assert run.data.tags["prune_lab.fingerprint"] == anew.summary()["fingerprint"]
    assert anew.summary()["fingerprint"] == story.ended["sweep"].summary("1")["fingerprint"]
    assert "mlflow.parentRunId" not in run.data.tags


# The fingerprint itself.

CONFIG: dict[str, Any] = {
    "amount": 0.5, "seed": 0, "device": "auto", "dtype": "auto", "name": "prune_lab", "resume": True, "quiet": False,
    "objectives": ["quality/perplexity"], "export": None,
    "model": {"name": "here", "weights": "pretrained"}, "dataset": {"path": "there", "test_path": None, "seq_len": 32},
    "method": {"_target_": "prune_lab.methods.magnitude.Magnitude", "amount": 0.5}, "measure": {"pairs": 10},
    "tracking": {"_target_": "prune_lab.tracking.none.NoTracking"},
}  # fmt: skip
FACTS: dict[str, Any] = {
    "protocol": {"windows": 8, "dtype": "float32", "device": "cpu"},
    "hashes": {"weights": "a", "tokenizer": "b", "text": "c"},
}


def changed(tree: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy of nested dictionaries with one dotted key changed."""
    head, _, rest = key.partition(".")
    assert head in tree
    return {**tree, head: changed(tree[head], rest, value) if rest else value}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("amount", 0.4), ("seed", 1), ("model.weights", "random"), ("dataset.seq_len", 64), ("method.amount", 0.4),
        ("method._target_", "prune_lab.methods.random.Random"), ("measure.pairs", 11), ("export", {"class": "X"}),
    ],
)  # fmt: skip
def test_what_a_result_depends_on_changes_the_fingerprint(key: str, value: Any) -> None:
    assert fingerprint(changed(CONFIG, key, value), **FACTS) != fingerprint(CONFIG, **FACTS)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("protocol.windows", 9), ("protocol.dtype", "bfloat16"), ("protocol.device", "cuda:0"), ("hashes.weights", "x"),
        ("hashes.tokenizer", "x"), ("hashes.text", "x"),
    ],
)  # fmt: skip
def test_what_was_found_out_changes_the_fingerprint(key: str, value: Any) -> None:
    assert fingerprint(CONFIG, **changed(FACTS, key, value)) != fingerprint(CONFIG, **FACTS)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", "other"), ("quiet", True), ("resume", False), ("tracking._target_", "prune_lab.tracking.mlflow_store"),
        ("objectives", ["size/disk_mb"]),
        ("device", "cpu"), ("dtype", "float32"), ("model.name", "elsewhere"), ("dataset.path", "elsewhere"),
    ],
)  # fmt: skip
def test_where_a_result_goes_and_its_parts_lie_does_not(key: str, value: Any) -> None:
    """Device and number type count as they were decided: they stand in the protocol."""
    assert fingerprint(changed(CONFIG, key, value), **FACTS) == fingerprint(CONFIG, **FACTS)
