"""Sweeps whose jobs run in other processes: joblib, submitit, and a Ray cluster of two nodes, one store for all.

One story of three command lines, so that each launcher also finds what another one finished.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT
from mlflow import MlflowClient
from mlflow.entities import Run
from warm import give_store, run_module

# MLflow 3's own models use a deprecated part of SQLAlchemy, which says so when a store is first opened.
pytestmark = [
    pytest.mark.process,  # of launchers, whose fixtures are asked for by name
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated"),
]

PLUGINS = {
    "joblib": "hydra_joblib_launcher",
    "submitit": "hydra_submitit_launcher",
    "ray": "hydra_ray_launcher",
    "optuna": "hydra_optuna_sweeper",
}


def needs(plugin: str) -> None:
    """Skips where a launcher is not installed."""
    if find_spec(f"hydra_plugins.{PLUGINS[plugin]}") is None:
        pytest.skip(f"{PLUGINS[plugin]} is not installed: pip install 'prune-lab[test]'")


@dataclass(frozen=True)
class Ended:
    """A sweep that came to its end, and the runs that it left in the store."""

    done: subprocess.CompletedProcess[str]
    folder: Path
    runs: list[Run]

    @property
    def parent(self) -> Run:
        """The one run that is nobody's child."""
        (parent,) = [run for run in self.runs if "mlflow.parentRunId" not in run.data.tags]
        return parent

    @property
    def children(self) -> dict[tuple[str, str], Run]:
        """The others by their method and amount."""
        children = [run for run in self.runs if run is not self.parent]
        return {(run.data.params["method"], run.data.params["amount"]): run for run in children}

    def summary(self, job: int) -> dict[str, Any]:
        """summary.json of a job."""
        found = json.loads((self.folder / str(job) / "summary.json").read_text())
        assert isinstance(found, dict)
        return found


class Lab:
    """A working folder with the small model, text and a store."""

    def __init__(self, place: Path, folder: Path, corpus: Path) -> None:
        self.place = place
        # Relative paths: a job must find them wherever its process was started.
        (place / "model").symlink_to(folder)
        (place / "corpus").symlink_to(corpus)
        give_store(place)
        self.small = [
            "model=hf", "model.name=model", "dataset=text", "dataset.path=corpus", "dataset.seq_len=32",
            "measure=quality_only", "measure.max_windows=8", "device=cpu",
        ]  # fmt: skip

    def sweep(self, name: str, *overrides: str, recipe: str = "config") -> Ended:
        """Runs a sweep into the folder `name`, by a recipe of experiments/ or by the command line alone."""
        before = {run.info.run_id for run in self.runs()}
        where = ["-cd", str(ROOT / "experiments"), "-cn", recipe]
        given = [*where, *self.small, *overrides, f"hydra.sweep.dir={name}", "-m"]
        done = run_module("prune_lab", given, self.place, PRUNE_LAB_CACHE="cache", MLFLOW_TRACKING_URI="")
        return Ended(done, self.place / name, [run for run in self.runs() if run.info.run_id not in before])

    def runs(self) -> list[Run]:
        """All runs of the store."""
        client = MlflowClient(f"sqlite:///{self.place / 'mlflow.db'}")
        experiment = client.get_experiment_by_name("prune_lab")
        return client.search_runs([experiment.experiment_id]) if experiment else []


@contextmanager
def ray_cluster() -> Iterator[str]:
    """A cluster of two nodes on this machine, each with room for one job; its folder is not that of any test."""
    script = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
cluster.add_node(num_cpus=1)
cluster.wait_for_nodes()
print(cluster.address, flush=True)
sys.stdin.readline()
cluster.shutdown()
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": "sqlite:////nowhere/of/the/cluster.db"}
    for _ in range(3):  # a node gives up after seconds on a busy machine
        process = subprocess.Popen(
            [sys.executable, "-c", script], cwd="/", env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert process.stdout
        if address := process.stdout.readline().strip():
            break
        process.communicate()
    assert address, "Ray starts no cluster here"
    try:
        yield address
    finally:
        process.communicate("\n", timeout=120)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, folder: Path, corpus: Path) -> Lab:
    """One working folder for all."""
    return Lab(tmp_path_factory.mktemp("lab"), folder, corpus)


# Options with keys that the others lack; the second job is refused for one of its own.
METHODS = ["method=magnitude,depth,structured", "method.by=nope", "method.units=[heads]"]


@pytest.fixture(scope="module")
def joblib(lab: Lab) -> Ended:
    """Two jobs at a time, one of three refused, timed; the store is new."""
    needs("joblib")
    timed = ["measure.latency=true", "measure.pairs=10", "measure.prompt_tokens=16", "measure.decode_tokens=2"]
    return lab.sweep("by_joblib", *METHODS, "amount=0.5", *timed, recipe="parallel")


@pytest.fixture(scope="module")
def submitit(lab: Lab) -> Ended:
    """As on Slurm, but that submitit starts the processes here."""
    needs("submitit")
    return lab.sweep("by_submitit", *METHODS, "amount=0.3", "hydra/launcher=submitit_local", recipe="slurm")


@pytest.fixture(scope="module")
def ray(lab: Lab, submitit: Ended) -> Ended:
    """On a running cluster that knows nothing of us; 0.3 was computed before."""
    needs("ray")
    with ray_cluster() as address:
        at = f"hydra.launcher.ray.init.address='{address}'"
        return lab.sweep("by_ray", "method=magnitude", "amount=0.3,1.5,0.4,0.1,0.6", at, recipe="ray")


@pytest.fixture(params=["joblib", *(pytest.param(name, marks=pytest.mark.slow) for name in ("submitit", "ray"))])
def ended(request: pytest.FixtureRequest) -> Ended:
    """Each of them."""
    found = request.getfixturevalue(request.param)
    assert isinstance(found, Ended)
    return found


def test_one_refused_job_does_not_stop_the_others_and_is_told(ended: Ended) -> None:
    assert ended.done.returncode == 1, ended.done.stderr
    board = ended.done.stdout[ended.done.stdout.index("Leaderboard") :]
    entries = results(ended)
    assert [entry["status"] for entry in entries] == ["FINISHED", "FAILED"] + ["FINISHED"] * (len(entries) - 2)
    word = next(word for word in ("amount=1.5", "method.by=nope") if word in entries[1]["overrides"])
    said = {"amount=1.5": "amount=1.5 is outside [0, 1)", "method.by=nope": "method.by='nope'"}[word]
    assert said in " ".join(board.split())
    assert [entry["overrides"] for entry in entries] == [ended.summary(n)["overrides"] for n in range(len(entries))]


def results(ended: Ended) -> list[dict[str, Any]]:
    """results.json, by job."""
    found = json.loads((ended.folder / "results.json").read_text())
    assert isinstance(found, list)
    return found


def test_all_jobs_are_children_of_one_parent(ended: Ended) -> None:
    finished = {
        (entry["choices"]["method"], str(entry["config"]["amount"])): entry
        for entry in results(ended)
        if entry["status"] == "FINISHED"
    }
    assert ended.children.keys() == finished.keys()
    assert len(finished) == len(ended.runs) - 1
    assert ended.parent.info.status == "FAILED"
    for job, run in ended.children.items():
        assert run.info.status == "FINISHED"
        assert run.data.tags["mlflow.parentRunId"] == ended.parent.info.run_id
        of_job = finished[job]
        assert run.data.metrics == pytest.approx(of_job["metrics"], rel=1e-12)
    assert ended.parent.data.tags["mlflow.note.content"] == (ended.folder / "results.md").read_text()


def test_jobs_ran_in_other_processes_than_the_sweep(ended: Ended) -> None:
    pids = {run.data.tags["prune_lab.pid"] for run in ended.children.values()}
    assert ended.parent.data.tags["prune_lab.pid"] not in pids


@pytest.mark.parametrize("launcher", ["joblib", pytest.param("submitit", marks=pytest.mark.slow)])
def test_jobs_elsewhere_leave_out_what_does_not_apply(launcher: str, request: pytest.FixtureRequest) -> None:
    """Each job is told which keys only the others' options have; what its own option takes arrives."""
    ended = request.getfixturevalue(launcher)
    magnitude, depth, structured = (ended.summary(job) for job in range(3))
    assert magnitude["not_applicable"]["method"] == ["by", "units"]
    assert "method.by=nope" in depth["overrides"]
    assert not any("units" in word for word in depth["overrides"])
    assert structured["not_applicable"]["method"] == ["by"]
    assert structured["config"]["method"]["units"] == ["heads"]


def test_nothing_is_left_lying_about(ended: Ended, lab: Lab) -> None:
    hidden = {path.name for path in ended.folder.iterdir() if path.name.startswith(".")}
    assert hidden <= {".submitit"}
    assert {path.name for path in lab.place.iterdir()} <= {
        "model", "corpus", "cache", "mlflow.db", "mlruns", "by_joblib", "by_submitit", "by_ray", "by_optuna",
    }  # fmt: skip


@pytest.mark.slow  # a cluster takes half a minute
def test_a_launcher_finds_what_another_one_finished(submitit: Ended, ray: Ended) -> None:
    """Its child holds the figures and the id of the run that was computed."""
    earlier, again = submitit.children["magnitude", "0.3"], ray.children["magnitude", "0.3"]
    assert again.data.tags["prune_lab.reused_from"] == earlier.info.run_id
    assert again.data.metrics == earlier.data.metrics
    assert ray.summary(0)["reused_from"] == earlier.info.run_id
    computed = [run for (_, amount), run in ray.children.items() if amount != "0.3"]
    assert len(computed) == 3
    assert all("prune_lab.fingerprint" in run.data.tags for run in computed)


@pytest.mark.slow
def test_both_nodes_of_the_cluster_worked(ray: Ended) -> None:
    """Each has room for one job at a time: jobs that ran at the same time ran on two nodes."""
    jobs = [ray.folder / str(job) for job in range(5)]
    spans = [((job / ".hydra/config.yaml").stat().st_mtime, (job / "summary.json").stat().st_mtime) for job in jobs]
    assert any(a[0] < b[1] and b[0] < a[1] for n, a in enumerate(spans) for b in spans[:n]), spans


def test_jobs_side_by_side_say_what_else_the_machine_did_while_they_were_timed(joblib: Ended) -> None:
    for job in (0, 2):
        cores = joblib.summary(job)["environment"]["cores_used_by_others"]
        assert 0 <= cores <= (os.cpu_count() or 1) + 0.5
        noted = any(f"other work took {cores:.2f} cores" in text for text in joblib.summary(job)["warnings"])
        assert noted == (cores > 0.25)
        run = joblib.children[joblib.summary(job)["choices"]["method"], str(joblib.summary(job)["config"]["amount"])]
        assert run.data.tags["cores_used_by_others"] == str(cores)


# A search by Optuna: what it is told are the objectives.


def test_a_search_on_two_objectives_ends_with_their_front(lab: Lab) -> None:
    """The front in Optuna's file is that of a naive look at the jobs; a refused trial does not end the search."""
    needs("optuna")
    ended = lab.sweep(
        "by_optuna", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=6", "hydra.sweeper.n_jobs=2",
        "hydra.sweeper.direction=[minimize,minimize]", "hydra.sweeper.sampler.seed=1",
        "objectives=[quality/perplexity,params/nonzero]", "amount=choice(0.1,0.3,0.5,1.5)", "method=magnitude,random",
    )  # fmt: skip
    entries = results(ended)
    assert len(entries) == 6
    refused = [e for e in entries if e["status"] == "FAILED"]
    assert ended.done.returncode == (1 if refused else 0), ended.done.stderr
    assert all("amount=1.5" in e["overrides"] for e in refused)
    found = [
        (e["metrics"]["quality/perplexity"], e["metrics"]["params/nonzero"])
        for e in entries
        if e["status"] == "FINISHED"
    ]
    front = {a for a in found if not any(b[0] <= a[0] and b[1] <= a[1] and b != a for b in found)}
    told = yaml.safe_load((ended.folder / "optimization_results.yaml").read_text())
    assert {tuple(solution["values"]) for solution in told["solutions"]} == front
    assert all(math.isfinite(value) for pair in front for value in pair)
    assert len(ended.children) <= len(found)
