"""A sweep from the command line to the store, its files and what a person reads, on one real sweep."""

from __future__ import annotations

import csv
import json
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import yaml
from mlflow import MlflowClient
from mlflow.entities import Run
from warm import give_store, run_module

from prune_lab import __version__
from prune_lab.results.pareto import Point, front
from prune_lab.results.summary import Summary
from prune_lab.sweeps import comparison
from prune_lab.sweeps.comparison import Row, speedup
from prune_lab.system.console import Console

# MLflow 3's own models use a deprecated part of SQLAlchemy, which says so when a store is first opened.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")

# Metrics that every run logs by default: written out, so that a name that is changed or lost is noticed.
METRICS = {
    "quality/perplexity", "quality/dense_perplexity", "quality/perplexity_ratio", "quality/bits_per_byte",
    "quality/dense_bits_per_byte", "quality/perplexity_ratio_low", "quality/perplexity_ratio_high",
    "quality/kl", "quality/kl_p50", "quality/kl_p99", "quality/same_top",
    "params/total", "params/dense_total", "params/nonzero", "params/dense_nonzero", "params/reduction",
    "params/physical_reduction",
    "amount/requested", "amount/realized",
    "size/disk_mb", "size/dense_disk_mb", "size/reduction",
    "latency/prefill_ms_p50", "latency/prefill_ms_p95", "latency/dense_prefill_ms_p50", "latency/prefill_speedup",
    "latency/prefill_speedup_low", "latency/prefill_speedup_high",
    "latency/decode_ms_per_token_p50", "latency/decode_ms_per_token_p95", "latency/dense_decode_ms_per_token_p50",
    "latency/decode_speedup", "latency/decode_speedup_low", "latency/decode_speedup_high",
    "throughput/decode_tokens_per_s",
    "memory/weights_mb", "memory/dense_weights_mb", "memory/kv_cache_bytes_per_token",
    "memory/dense_kv_cache_bytes_per_token", "memory/peak_mb", "memory/dense_peak_mb", "memory/reduction",
    "compute/macs_per_token", "compute/dense_macs_per_token", "compute/effective_macs_per_token",
    "time/prune_s", "time/recover_s", "time/post_s", "time/measure_s",
}  # fmt: skip


@dataclass(frozen=True)
class Sweep:
    """A sweep that was run: its working folder, what the process said, and the store it left."""

    place: Path
    done: subprocess.CompletedProcess[str]

    @property
    def client(self) -> MlflowClient:
        """The default store, read back."""
        return MlflowClient(f"sqlite:///{self.place / 'mlflow.db'}")

    @property
    def runs(self) -> list[Run]:
        """All runs of the default experiment, oldest first."""
        experiment = self.client.get_experiment_by_name("prune_lab")
        assert experiment is not None
        return self.client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"])

    @property
    def parents(self) -> list[Run]:
        """Runs that are nobody's child."""
        return [run for run in self.runs if "mlflow.parentRunId" not in run.data.tags]

    @property
    def children(self) -> list[Run]:
        """The jobs' runs, in the order of their amounts."""
        found = [run for run in self.runs if "mlflow.parentRunId" in run.data.tags]
        return sorted(found, key=lambda run: float(run.data.params["amount"]))

    @property
    def folder(self) -> Path:
        """The one sweep folder."""
        (folder,) = self.place.glob("multirun/*/*")
        return folder

    def summary(self, job: int) -> dict[str, Any]:
        """summary.json of a job."""
        found = json.loads((self.folder / str(job) / "summary.json").read_text())
        assert isinstance(found, dict)
        return found

    def artifacts(self, run: Run) -> set[str]:
        """Names of a run's artifacts."""
        return {item.path for item in self.client.list_artifacts(run.info.run_id)}


def run_sweep(place: Path, folder: Path, corpus: Path, *overrides: str) -> Sweep:
    """Runs `python -m prune_lab ... -m` on the small model in a folder of its own."""
    small = [
        "model=hf", f"model.name={folder}", "dataset=text", f"dataset.path={corpus}", "dataset.seq_len=32",
        "device=cpu", "measure=quick", "measure.max_windows=8", "measure.prompt_tokens=16", "measure.decode_tokens=2",
    ]  # fmt: skip
    own = {"PRUNE_LAB_CACHE": str(place / "cache"), "MLFLOW_TRACKING_URI": None}
    give_store(place)
    return Sweep(place, run_module("prune_lab", [*small, *overrides, "-m"], place, **own))


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory, folder: Path, corpus: Path) -> Sweep:
    """Two finished jobs with everything measured."""
    overrides = ["method=structured", "amount=0.2,0.4", "measure.pairs=10", "measure.memory=true"]
    return run_sweep(tmp_path_factory.mktemp("sweep"), folder, corpus, *overrides)


@pytest.fixture(scope="module")
def half_refused(tmp_path_factory: pytest.TempPathFactory, folder: Path, corpus: Path) -> Sweep:
    """A sweep whose first job is refused."""
    place = tmp_path_factory.mktemp("refused")
    return run_sweep(place, folder, corpus, "measure=quality_only", "amount=1.5,0.2")


def test_a_sweep_ends_with_0_and_quietly(sweep: Sweep) -> None:
    assert sweep.done.returncode == 0, sweep.done.stderr
    assert sweep.done.stderr == ""
    assert not re.search(r"\r|it/s|tok/s|%\|", sweep.done.stdout)


def test_one_finished_parent_has_two_finished_children(sweep: Sweep) -> None:
    (parent,) = sweep.parents
    assert [run.info.status for run in sweep.runs] == ["FINISHED"] * 3
    assert [run.data.tags["mlflow.parentRunId"] for run in sweep.children] == [parent.info.run_id] * 2
    assert [run.data.params["amount"] for run in sweep.children] == ["0.2", "0.4"]


def test_the_metrics_are_those_of_the_contract(sweep: Sweep) -> None:
    for job, run in enumerate(sweep.children):
        assert set(run.data.metrics) >= METRICS
        assert run.data.metrics == pytest.approx(sweep.summary(job)["metrics"], rel=1e-12)


def test_the_metrics_belong_together(sweep: Sweep) -> None:
    """Each ratio is that of its two figures, and what was removed is what was asked for, to a channel of 48."""
    for run, amount in zip(sweep.children, (0.2, 0.4), strict=True):
        m = run.data.metrics
        assert m["amount/requested"] == amount
        assert m["amount/realized"] == pytest.approx(round(48 * amount) / 48)
        assert m["params/reduction"] == pytest.approx(1 - m["params/nonzero"] / m["params/dense_nonzero"])
        assert m["params/physical_reduction"] == pytest.approx(1 - m["params/total"] / m["params/dense_total"])
        assert m["quality/perplexity_ratio"] == pytest.approx(m["quality/perplexity"] / m["quality/dense_perplexity"])
        assert m["size/reduction"] == pytest.approx(1 - m["size/disk_mb"] / m["size/dense_disk_mb"])
        assert m["memory/reduction"] == pytest.approx(1 - m["memory/peak_mb"] / m["memory/dense_peak_mb"])
        assert m["throughput/decode_tokens_per_s"] == pytest.approx(1e3 / m["latency/decode_ms_per_token_p50"])
        for stage, unit in (("prefill", "ms"), ("decode", "ms_per_token")):
            speedups = [m[f"latency/{stage}_speedup{suffix}"] for suffix in ("_low", "", "_high")]
            assert speedups == sorted(speedups)
            assert 0 < m[f"latency/{stage}_{unit}_p50"] <= m[f"latency/{stage}_{unit}_p95"]


def test_parameters_fall_in_order(sweep: Sweep) -> None:
    """A channel is three rows or columns of 32 in each of two blocks."""
    dense = sweep.children[0].data.metrics["params/dense_total"]
    assert [run.data.metrics["params/total"] for run in sweep.children] == [dense - n * 3 * 32 * 2 for n in (10, 19)]


def test_the_params_are_flat_and_few(sweep: Sweep) -> None:
    expected = {
        "model": "hf", "dataset": "text", "method": "structured", "schedule": "one_shot", "recovery": "none",
        "post": "none", "export": "none", "amount": "0.2", "seed": "0", "dtype": "float32", "device": "cpu",
        "method.units": "['mlp']", "method.score": "obs", "method.round_to": "None", "method.physical": "True",
        "method.refit": "inputs", "schedule.start": "0",
        "recovery.steps": "n/a", "recovery.lr": "n/a", "recovery.batch_size": "n/a", "post.group_size": "n/a",
    }  # fmt: skip
    first, second = sweep.children
    assert first.data.params == expected
    assert second.data.params == {**expected, "amount": "0.4"}


def test_the_tags_say_which_run_it_is(sweep: Sweep) -> None:
    for job, run in enumerate(sweep.children):
        assert run.data.tags["prune_lab.fingerprint"] == sweep.summary(job)["fingerprint"]
        assert re.fullmatch("[0-9a-f]{64}", run.data.tags["prune_lab.fingerprint"])
        assert run.data.tags["prune_lab.version"] == __version__
        assert run.data.tags["device"] == "cpu"
        assert "status_reason" not in run.data.tags
        assert "diverged" not in run.data.tags
    assert len({run.data.tags["prune_lab.fingerprint"] for run in sweep.children}) == 2


def test_the_files_of_a_run_are_its_artifacts(sweep: Sweep, tmp_path: Path) -> None:
    for job, run in enumerate(sweep.children):
        assert sweep.artifacts(run) == {"config.yaml", "summary.json", "layers.csv"}
        files = {
            name: Path(sweep.client.download_artifacts(run.info.run_id, name, str(tmp_path))).read_text()
            for name in sweep.artifacts(run)
        }
        assert json.loads(files["summary.json"]) == sweep.summary(job)
        assert yaml.safe_load(files["config.yaml"]) == sweep.summary(job)["config"]
        table = list(csv.DictReader(files["layers.csv"].splitlines()))
        assert [row["layer"] for row in table] == [
            f"model.layers.{block}.mlp.{linear}" for block in (0, 1) for linear in ("gate_proj", "up_proj", "down_proj")
        ]
        removed = sum(int(row["removed"]) for row in table) / sum(int(row["before"]) for row in table)
        assert removed == run.data.metrics["amount/realized"]


def test_the_evaluated_text_is_a_dataset_input(sweep: Sweep, corpus: Path) -> None:
    for job, run in enumerate(sweep.children):
        (found,) = run.inputs.dataset_inputs
        digest = sweep.summary(job)["protocol"]["test_tokens_sha256"]
        assert found.dataset.name == f"dataset.path={corpus}"
        assert len(found.dataset.digest) >= 32
        assert digest.startswith(found.dataset.digest)
        assert [(tag.key, tag.value) for tag in found.tags] == [("mlflow.data.context", "test")]


def test_the_summary_says_how_it_was_measured(sweep: Sweep) -> None:
    for job in (0, 1):
        summary = sweep.summary(job)
        assert summary["status"] == "FINISHED"
        assert summary["schema_version"] == 1
        assert {key: summary["choices"][key] for key in ("model", "method", "recovery")} == {
            "model": "hf", "method": "structured", "recovery": "none",
        }  # fmt: skip
        expected = {"windows": 8, "seq_len": 32, "dtype": "float32", "device": "cpu", "pairs": 10, "prompt_tokens": 16}
        assert {key: summary["protocol"][key] for key in expected} == expected
        assert {"python", "torch", "transformers", "cpu"} <= set(summary["environment"])


def test_the_parent_carries_the_comparison(sweep: Sweep, tmp_path: Path) -> None:
    (parent,) = sweep.parents
    assert sweep.artifacts(parent) == {"pareto.png", "report.html", "results.json", "results.md"}
    for name in ("pareto.png", "report.html", "results.json"):
        stored = Path(sweep.client.download_artifacts(parent.info.run_id, name, str(tmp_path)))
        assert stored.read_bytes() == (sweep.folder / name).read_bytes()
    note = parent.data.tags["mlflow.note.content"]
    assert note == (sweep.folder / "results.md").read_text()
    for cell in ("| dense |", "| amount=0.2 |", "| amount=0.4 |"):
        assert cell in note


def test_the_dense_model_was_measured_once(sweep: Sweep) -> None:
    """Its figures stand on the parent and in both children; latencies alone are taken beside each job."""
    assert len(list(sweep.folder.glob("baseline-*.json"))) == 1
    (parent,) = sweep.parents
    dense = {name for name in sweep.children[0].data.metrics if "/dense_" in name}
    assert dense >= {name for name in METRICS if "/dense_" in name}
    assert set(parent.data.metrics) == dense
    for name in dense:
        values = [run.data.metrics[name] for run in sweep.children]
        if name.startswith("latency/"):
            assert min(values) <= parent.data.metrics[name] <= max(values)
        else:
            assert values == [parent.data.metrics[name]] * 2, name


def test_the_sweep_folder_has_the_comparison(sweep: Sweep) -> None:
    results = json.loads((sweep.folder / "results.json").read_text())
    assert [entry.pop("job") for entry in results] == ["0", "1"]
    assert results == [sweep.summary(0), sweep.summary(1)]
    picture = (sweep.folder / "pareto.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert int.from_bytes(picture[16:20], "big") > 1000  # pixels wide
    assert {path.name for path in sweep.folder.iterdir() if path.name.startswith(".")} <= {".submitit"}


def test_a_person_reads_the_leaderboard_and_the_way_to_the_plots(sweep: Sweep) -> None:
    said = sweep.done.stdout
    board = said[said.index("Leaderboard") :]
    ids = [run.info.run_id for run in sweep.children]
    experiment = sweep.children[0].info.experiment_id
    assert re.search(r"^\s+dense\b", board, re.MULTILINE)
    for job, run in enumerate(sweep.children):
        perplexity = f"{run.data.metrics['quality/perplexity']:.3f}"
        assert re.search(rf"^\s+{job}\*?\s+amount=0\.\d\s.*{re.escape(perplexity)}", board, re.MULTILINE)
    assert "mlflow ui --backend-store-uri sqlite:///mlflow.db" in board
    assert f"/#/experiments/{experiment}/runs?workflowType=machine_learning" in board
    found = re.search(r"/#/compare-runs\?runs=(\S+)&experiments=(\S+)$", board, re.MULTILINE)
    assert found
    orders = [ids, ids[::-1]]
    assert found[1] in [quote(json.dumps(order, separators=(",", ":"))) for order in orders]
    assert found[2] == quote(json.dumps([experiment]))


def test_a_refused_job_does_not_stop_the_others(half_refused: Sweep) -> None:
    assert half_refused.done.returncode == 1
    (parent,) = half_refused.parents
    (child,) = half_refused.children
    assert (parent.info.status, child.info.status) == ("FAILED", "FINISHED")
    assert child.data.params["amount"] == "0.2"
    assert [half_refused.summary(job)["status"] for job in (0, 1)] == ["FAILED", "FINISHED"]


def test_a_refused_job_is_named(half_refused: Sweep) -> None:
    assert half_refused.done.stderr.count("\n") == 1
    assert "job 0" in half_refused.done.stderr
    assert "amount=1.5" in half_refused.done.stderr
    board = half_refused.done.stdout[half_refused.done.stdout.index("Leaderboard") :]
    assert any("amount=1.5" in line and "FAILED" in line for line in board.splitlines())
    assert "outside [0, 1)" in " ".join(board.split())
    (row,) = [line for line in (half_refused.folder / "results.md").read_text().splitlines() if "FAILED" in line]
    assert row.startswith("| 0 | amount=1.5 | FAILED: amount=1.5 is outside [0, 1)")


def test_what_was_not_measured_is_no_metric(half_refused: Sweep) -> None:
    (child,) = half_refused.children
    unmeasured = {name for name in METRICS if name.startswith(("latency/", "throughput/"))}
    unmeasured |= {"memory/peak_mb", "memory/dense_peak_mb", "memory/reduction"}
    assert set(child.data.metrics) & METRICS == METRICS - unmeasured


def point(job: str, size: float, perplexity: float) -> Point:
    """A run on the plot."""
    return Point(job, "magnitude", {"params/nonzero": size, "size/disk_mb": size, "quality/perplexity": perplexity})


def test_the_front_is_what_nothing_beats_in_both() -> None:
    points = [
        point("large and best", 10, 5), point("beaten by the one below", 9, 8), point("middle", 8, 7),
        point("smallest", 2, 40), point("as small, but worse", 2, 50), point("larger, as good as smallest", 3, 40),
    ]  # fmt: skip
    assert [p.job for p in front(points, "params/nonzero")] == ["smallest", "middle", "large and best"]
    assert [p.job for p in front(points[::-1], "size/disk_mb")] == ["smallest", "middle", "large and best"]
    assert front([], "params/nonzero") == []


@pytest.mark.parametrize(
    ("low", "value", "high", "shown"),
    [
        (0.9, 1.05, 1.2, "no change [0.90, 1.20]"),
        (1.0, 1.05, 1.2, "no change [1.00, 1.20]"),
        (0.8, 0.9, 1.0, "no change [0.80, 1.00]"),
        (1.01, 1.25, 1.5, "1.25 [1.01, 1.50]"),
        (0.5, 0.6, 0.7, "0.60 [0.50, 0.70]"),
    ],
)
def test_a_speedup_whose_interval_contains_1_is_no_change(low: float, value: float, high: float, shown: str) -> None:
    name = "latency/prefill_speedup"
    assert speedup({name: value, f"{name}_low": low, f"{name}_high": high}, "prefill") == shown
    assert speedup({name: value, f"{name}_low": low, f"{name}_high": high}, "decode") == "-"


def test_a_swept_number_reads_as_it_was_meant(tmp_path: Path) -> None:
    rows = [finished("0", 20, 500), finished("1", 30, 400)]
    rows[0].summary.overrides = ["amount=0.1", "dataset.path=a0.123456789.txt"]
    rows[1].summary.overrides = ["amount=0.30000000000000004"]
    comparison.write(tmp_path, rows)
    assert "| amount=0.3 |" in (tmp_path / "results.md").read_text()


def finished(job: str, perplexity: float, nonzero: float) -> Row:
    """A job that finished with these figures."""
    metrics = {
        "quality/perplexity": perplexity, "quality/dense_perplexity": 10.0, "quality/perplexity_ratio": perplexity / 10,
        "params/nonzero": nonzero, "params/dense_total": 1000.0, "size/disk_mb": 4.0, "size/dense_disk_mb": 4.0,
        "amount/realized": 1 - nonzero / 1000,
    }  # fmt: skip
    return Row(job, Summary("FINISHED", choices={"method": "magnitude"}, overrides=[f"seed={job}"], metrics=metrics))


def test_the_leaderboard_is_by_perplexity_and_ends_with_what_did_not_finish(tmp_path: Path) -> None:
    (tmp_path / "3").mkdir()  # a job that left no summary
    failed = Row("2", Summary("FAILED", overrides=["seed=2", "method.units=a|b"], reason="it was too much"))
    rows = [finished("0", 30, 500), finished("1", 20, 600), failed, comparison.read_job(tmp_path / "3")]
    comparison.write(tmp_path, rows)
    header, _, *lines = (tmp_path / "results.md").read_text().splitlines()
    table = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    assert [cells[0] for cells in table] == ["", "1*", "0*", "2", "3"]
    assert [cells[1] for cells in table[:3]] == ["dense", "seed=1", "seed=0"]
    assert table[3][2] == "FAILED: it was too much"
    assert table[4][2].startswith("KILLED: ")
    assert {len(cells) for cells in table} == {header.count("|") - 1}


def test_the_leaderboard_has_speedups_in_llama_cpp_where_a_job_has_them(tmp_path: Path) -> None:
    rows = [finished("0", 30, 500), finished("1", 20, 600)]
    for stage, low in (("prefill", 1.2), ("decode", 0.9)):
        name = f"llama_cpp/{stage}_speedup"
        rows[1].summary.metrics.update({name: 1.3, f"{name}_low": low, f"{name}_high": 1.4})
    comparison.write(tmp_path, rows)
    header, _, *lines = (tmp_path / "results.md").read_text().splitlines()
    assert header.endswith("| peak memory | prefill in llama.cpp | decode in llama.cpp |")
    assert lines[1].endswith("| - | 1.30 [1.20, 1.40] | no change [0.90, 1.40] |")
    assert lines[2].endswith("| - | - | - |")


@pytest.mark.parametrize(
    ("width", "left_out"),
    [(160, []), (100, ["non-zero", "removed", "x dense"]), (80, ["decode speed-up", "peak memory"])],
)
def test_a_narrow_terminal_shows_fewer_columns_and_says_which(
    tmp_path: Path, width: int, left_out: list[str], sweep: Sweep, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [comparison.read_job(sweep.folder / job) for job in "01"]
    rows.append(Row("2", Summary("FAILED", overrides=["amount=7"], reason="too much")))
    console = Console()
    console._rich.width = width
    comparison.show(tmp_path, rows, console)
    said = capsys.readouterr().out.splitlines()
    head = next(line for line in said if " run " in line)
    assert all(len(line) <= width for line in said if not line.startswith(("Leaderboard", "Files", "In ", "job ")))
    assert "perplexity" in head  # no name is folded
    assert not any(name in head for name in left_out)
    assert [line for line in said if line.startswith("In results.md too: ")] == said[-3:-2] * bool(left_out)
    assert all(name in said[-3] for name in left_out)
    assert "job 2 (amount=7)  FAILED: too much" in said
    assert any(re.search(r"\bamount=0\.2\b", line) for line in said)
