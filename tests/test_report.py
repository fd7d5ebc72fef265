"""The report: fronts by hand, any two metrics, several sources, what is missing, bad input, and the page itself."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from mlflow import MlflowClient
from warm import give_store, run_module

from prune_lab.errors import Refused
from prune_lab.job_context import JobContext
from prune_lab.report import page, runs
from prune_lab.report.runs import Report
from prune_lab.report.sources import read
from prune_lab.results.metrics import axis, of_dense
from prune_lab.results.pareto import Point, dense_points, front, steps
from prune_lab.results.series import Position, telling
from prune_lab.results.summary import Summary
from prune_lab.sweeps import comparison
from prune_lab.sweeps.comparison import Row
from prune_lab.tracking.mlflow_store import Mlflow

# MLflow 3's own models use a deprecated part of SQLAlchemy, which says so when a store is first opened.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")

STAMP = {
    "dataset": "stdlib", "dataset_facts": {}, "test_tokens_sha256": "ab" * 32, "seq_len": 256, "windows": 20,
    "dtype": "float32", "device": "cpu",
}  # fmt: skip


def finished(amount: float, perplexity: float, speedup: float = 1.0, method: str = "magnitude", **more: Any) -> Summary:
    """A run as the runner leaves it, of a model of 1000 parameters, 4 MB and perplexity 10."""
    left = 1000 * (1 - amount)
    metrics = {
        "quality/perplexity": perplexity, "quality/dense_perplexity": 10.0, "quality/perplexity_ratio": perplexity / 10,
        "params/total": 1000.0, "params/nonzero": left, "params/dense_total": 1000.0, "params/reduction": amount,
        "size/disk_mb": 4 * (1 - amount), "size/dense_disk_mb": 4.0,
        "amount/requested": amount, "amount/realized": amount, "latency/decode_speedup": speedup,
        "latency/decode_speedup_low": speedup - 0.05, "latency/decode_speedup_high": speedup + 0.05,
    }  # fmt: skip
    config = {
        "amount": amount, "seed": 0, "method": {"amount": amount, "pattern": None, "scope": "layer"},
        "schedule": {}, "recovery": {"steps": 100}, "post": {},
    }  # fmt: skip
    choices = {"model": "tiny", "dataset": "stdlib", "method": method, "schedule": "one_shot"}
    choices |= {"recovery": "none", "post": "none"}
    overrides = [f"method={method}", f"amount={amount:g}"]
    values: dict[str, Any] = {
        "fingerprint": f"{method} {amount} {perplexity}", "choices": choices, "overrides": overrides, "config": config,
        "protocol": STAMP, "metrics": metrics, "model": {"name": "tiny"}, "not_applicable": {"recovery": ["steps"]},
    }  # fmt: skip
    return Summary("FINISHED", **{**values, **more})


RUNS = [
    finished(0.2, 11, 1.1), finished(0.4, 14, 1.3), finished(0.6, 40, 1.2),
    finished(0.2, 12, 1.5, "structured"), finished(0.4, 13, 0.9, "structured"),
]  # fmt: skip


def sweep(folder: Path, summaries: list[Summary]) -> Path:
    """A sweep's folder, written as a sweep writes it."""
    folder.mkdir(parents=True)
    comparison.write(folder, [Row(str(job), summary) for job, summary in enumerate(summaries)])
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five finished runs and a refused one."""
    refused = Summary("FAILED", overrides=["amount=1.5"], reason="amount=1.5 is outside [0, 1)")
    return sweep(tmp_path / "multirun" / "day" / "time", [*RUNS, refused])


def report_of(*sources: object) -> Report:
    """The report of these sources."""
    return runs.report_of(read([str(source) for source in sources]))


def drawn(path: Path) -> dict[str, Any]:
    """What the page's script is given to draw."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text(), re.DOTALL)
    assert found
    data = json.loads(found[1])
    assert isinstance(data, dict)
    return data


Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def command(tmp_path: Path) -> Command:
    """Runs `python -m prune_lab.report ...` in the test's folder."""

    def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        return run_module("prune_lab.report", list(map(str, arguments)), tmp_path, **environment)

    return run


# Directions and fronts.


@pytest.mark.parametrize(
    ("better", "metrics"),
    [
        (
            "lower",
            "quality/perplexity quality/perplexity_ratio quality/perplexity_ratio_high quality/kl quality/kl_p99"
            " quality/bits_per_byte params/total params/nonzero size/disk_mb tasks/arc_easy_flips"
            " memory/kv_cache_bytes_per_token memory/weights_mb memory/peak_mb"
            " latency/prefill_ms_p50 latency/prefill_ms_p95"
            " latency/decode_ms_per_token_p50 latency/decode_ms_per_token_p95 time/prune_s time/measure_s",
        ),
        (
            "higher",
            "params/reduction params/physical_reduction size/reduction memory/reduction amount/requested"
            " amount/realized latency/prefill_speedup latency/decode_speedup_low latency/decode_speedup_high"
            " throughput/decode_tokens_per_s tasks/arc_easy_acc quality/same_top",
        ),
        (None, "unheard/of unheard/of_mb unheard/perplexity"),
    ],
)
def test_which_direction_is_better(better: str | None, metrics: str) -> None:
    assert {name: axis(name).better for name in metrics.split()} == dict.fromkeys(metrics.split(), better)


def point(job: str, **metrics: float) -> Point:
    """A run on the plot; __ stands for the slash."""
    return Point(job, Position("any", ""), {name.replace("__", "/"): value for name, value in metrics.items()})


def test_the_front_of_speed_and_quality_by_hand() -> None:
    """Faster is higher, better is lower: c and d are beaten by b, e is as fast as a and worse."""
    points = [
        point("a", latency__decode_speedup=1.0, quality__perplexity=10),
        point("b", latency__decode_speedup=1.5, quality__perplexity=12),
        point("c", latency__decode_speedup=1.4, quality__perplexity=13),
        point("d", latency__decode_speedup=1.5, quality__perplexity=14),
        point("e", latency__decode_speedup=1.0, quality__perplexity=11),
        point("f", latency__decode_speedup=2.0, quality__perplexity=30),
        point("no quality", latency__decode_speedup=9.0),
    ]
    speed, quality = "latency/decode_speedup", "quality/perplexity"
    assert [p.job for p in front(points, speed, quality)] == ["f", "b", "a"]
    assert [p.job for p in front(points, quality, speed)] == ["a", "b", "f"]
    assert front(points, speed, "unheard/of") == []


def test_the_front_where_higher_is_better_twice() -> None:
    points = [
        point("a", tasks__x_acc=0.5, params__reduction=0.1), point("b", tasks__x_acc=0.4, params__reduction=0.4),
        point("c", tasks__x_acc=0.3, params__reduction=0.3),
    ]  # fmt: skip
    assert [p.job for p in front(points, "params/reduction", "tasks/x_acc")] == ["b", "a"]


def test_the_dense_model_by_the_names_of_a_run() -> None:
    metrics = {
        "quality/perplexity": 14.0, "quality/dense_perplexity": 10.0, "quality/perplexity_ratio": 1.4,
        "params/nonzero": 600.0, "params/total": 700.0, "params/dense_total": 1000.0, "params/reduction": 0.4,
        "latency/decode_ms_per_token_p50": 2.0, "latency/dense_decode_ms_per_token_p50": 4.0,
        "latency/decode_speedup": 2.0, "latency/decode_speedup_low": 1.9, "amount/realized": 0.5, "time/prune_s": 3.0,
    }  # fmt: skip
    assert of_dense(metrics) == {
        "quality/perplexity": 10.0, "quality/perplexity_ratio": 1.0,
        "params/nonzero": 1000.0, "params/total": 1000.0, "params/reduction": 0.0,
        "latency/decode_ms_per_token_p50": 4.0, "throughput/decode_tokens_per_s": 250.0,
        "latency/decode_speedup": 1.0, "latency/decode_speedup_low": 1.0, "amount/realized": 0.0,
    }  # fmt: skip


def test_a_dense_model_stands_once_with_the_median_of_its_latencies() -> None:
    slow = [{"quality/dense_perplexity": 10.0, "latency/dense_prefill_ms_p50": ms} for ms in (3.0, 9.0, 4.0)]
    other = {"quality/dense_perplexity": 20.0, "latency/dense_prefill_ms_p50": 1.0}
    points = [Point("", Position("", ""), metrics) for metrics in [*slow, other]]
    assert [p.metrics for p in dense_points(points)] == [
        {"quality/perplexity": 10.0, "latency/prefill_ms_p50": 4.0},
        {"quality/perplexity": 20.0, "latency/prefill_ms_p50": 1.0},
    ]


def test_a_line_goes_by_its_steps() -> None:
    """Amounts by size, not as text; N:M by what is removed; seeds of a step together."""
    points = [Point(str(n), Position("s", step), {}) for n, step in enumerate(["0.5", "1e-05", "0.25", "0.5"])]
    assert [[p.job for p in group] for group in steps(points)] == [["1"], ["2"], ["0", "3"]]
    patterns = [Point(step, Position("s N:M", step), {}) for step in ("1:4", "4:8", "2:4", "3:4")]
    assert [group[0].job for group in steps(patterns)] == ["3:4", "2:4", "4:8", "1:4"]


def test_what_tells_runs_apart() -> None:
    runs = [
        {"method": "wanda", "method.scope": "row", "recovery": "none", "recovery.steps": "n/a"},
        {"method": "wanda", "method.scope": "layer", "recovery": "distill", "recovery.steps": "10"},
        {"method": "structured", "method.units": "mlp", "recovery": "distill", "recovery.steps": "20"},
    ]
    assert telling(runs) == [
        ["method=wanda", "method.scope=row"],
        ["method=wanda", "method.scope=layer", "recovery=distill", "recovery.steps=10"],
        ["method=structured", "recovery=distill", "recovery.steps=20"],
    ]


# A sweep's folder.


def test_a_sweep_leaves_its_report(folder: Path) -> None:
    data = drawn(folder / "report.html")
    assert data["start"] == ["params/nonzero", "quality/perplexity"]
    assert [line["name"] for line in data["lines"]] == ["magnitude", "structured"]
    assert [line["steps"] for line in data["lines"]] == [[[0], [1], [2]], [[3], [4]]]
    assert data["dense"] == [5]
    assert {path.name for path in folder.iterdir()} == {"results.json", "results.md", "pareto.png", "report.html"}


def test_every_pair_of_metrics_has_its_front(folder: Path) -> None:
    """By eye: of size and quality structured 0.2 is beaten by magnitude 0.2, and magnitude 0.4 by structured 0.4."""
    data = drawn(folder / "report.html")
    names = [a["metric"] for a in data["axes"]]
    assert set(names) == {name for name in RUNS[0].metrics if "/dense_" not in name}
    assert len(data["fronts"]) == len(names) * (len(names) - 1) // 2

    def front_of(x: str, y: str) -> set[int]:
        i, j = sorted((names.index(x), names.index(y)))
        return set(data["fronts"][f"{i},{j}"])

    assert front_of("params/nonzero", "quality/perplexity") == {5, 0, 4, 2}
    assert front_of("latency/decode_speedup", "quality/perplexity") == {5, 0, 3}
    assert front_of("latency/decode_speedup", "params/reduction") == {3, 1, 2}


def test_values_are_in_the_unit_of_their_axis(folder: Path) -> None:
    data = drawn(folder / "report.html")
    by_name = {a["metric"]: values for a, values in zip(data["axes"], data["values"], strict=True)}
    assert by_name["params/nonzero"] == [0.0008, 0.0006, 0.0004, 0.0008, 0.0006, 0.001]  # millions
    assert by_name["quality/perplexity"] == [11, 14, 40, 12, 13, 10]


def test_a_point_says_what_was_asked_for_and_what_came_out(folder: Path) -> None:
    said = drawn(folder / "report.html")["hover"][1].split("<br>")
    assert said[:2] == ["<b>magnitude 0.4</b> (job 1)", "method=magnitude amount=0.4"]
    assert {"quality/perplexity: 14", "params/nonzero: 600", "latency/decode_speedup: 1.3"} <= set(said)


def test_what_did_not_finish_stands_below_with_its_reason(folder: Path) -> None:
    (missing,) = report_of(folder).missing
    assert (missing.label, missing.status) == ("job 5: amount=1.5", "FAILED")
    text = (folder / "report.html").read_text()
    table = text[text.index('id="missing"') :]
    assert "<td>job 5: amount=1.5</td><td>FAILED</td><td>amount=1.5 is outside [0, 1)</td>" in table
    assert "1 did not finish" in page.about(report_of(folder))


def test_a_diverged_run_takes_no_axis_from_the_others(tmp_path: Path) -> None:
    diverged = finished(0.8, 1, diverged=["quality/perplexity"])
    del diverged.metrics["quality/perplexity"]
    place = sweep(tmp_path / "sweep", [*RUNS, diverged])
    report = report_of(place)
    assert "quality/perplexity" in report.metrics
    assert [one.reason for one in report.missing] == ["no finite number: quality/perplexity"]
    assert report.unfinished == 0
    page.write(report, place / "report.html")
    data = drawn(place / "report.html")
    values = data["values"][[a["metric"] for a in data["axes"]].index("quality/perplexity")]
    assert values == [11, 14, 40, 12, 13, None, 10]


def test_axes_are_what_all_runs_have(tmp_path: Path) -> None:
    untimed = finished(0.8, 50)
    untimed.metrics = {name: value for name, value in untimed.metrics.items() if not name.startswith("latency/")}
    report = report_of(sweep(tmp_path / "sweep", [*RUNS, untimed]))
    assert set(report.metrics) == {m for m in untimed.metrics if "/dense_" not in m}


def test_names_are_text_in_the_page(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script>&amp;<b>"
    overrides = ["method=magnitude", "amount=0.3", f"dataset.path={evil}"]
    runs = [finished(0.3, 12, overrides=overrides), Summary("FAILED", overrides=overrides, reason=f"because {evil}")]
    place = sweep(tmp_path / "a<b>&c", [RUNS[0], *runs])
    text = (place / "report.html").read_text()
    ours = text[: text.index("plotly.js v")] + text[text.rindex('"use strict"') :]
    assert ours.count("<script") == ours.count("</script>") == 2
    assert "alert(1)</script>" not in ours
    assert "a<b>" not in ours
    assert "because &lt;/script&gt;&lt;script&gt;alert(1)&lt;/script&gt;&amp;amp;&lt;b&gt;" in ours
    data = drawn(place / "report.html")
    assert "&lt;script&gt;alert(1)" in data["hover"][1]
    assert all("<b>" not in line["name"] for line in data["lines"])


class _Outside(HTMLParser):
    """Collects what a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [f"{tag} {name}={value}" for name, value in attrs if name in ("src", "href", "data")]


def test_the_page_fetches_nothing(folder: Path) -> None:
    page_of = _Outside()
    page_of.feed((folder / "report.html").read_text())
    assert page_of.found == []
    assert len((folder / "report.html").read_bytes()) < 6e6


# Several sources.


def test_joined_sweeps_share_a_plot_and_a_line(tmp_path: Path) -> None:
    """The same recipe in two sweeps is one series; what only a recipe's file says tells series apart."""
    first = sweep(tmp_path / "first" / "a", RUNS[:2])
    trained = finished(0.4, 10.5)
    trained.choices = {**trained.choices, "recovery": "distill"}
    trained.not_applicable = {}
    second = sweep(tmp_path / "second" / "b", [RUNS[2], trained])
    report = report_of(first, second)
    assert report.sources == ["first/a", "second/b"]
    assert [(p.job, p.position) for p in report.points] == [
        ("first/a, job 0", Position("magnitude", "0.2")),
        ("first/a, job 1", Position("magnitude", "0.4")),
        ("second/b, job 0", Position("magnitude", "0.6")),
        ("second/b, job 1", Position("magnitude recovery=distill", "0.4")),
    ]
    assert report.warnings == []
    assert len(report.dense) == 1


def test_a_run_that_stands_in_two_sweeps_is_shown_once(tmp_path: Path) -> None:
    first, second = sweep(tmp_path / "a", RUNS[:2]), sweep(tmp_path / "b", [replace(RUNS[0], reused_from="x"), RUNS[2]])
    report = report_of(first, second, tmp_path / "b" / ".")
    assert len(report.sources) == 2
    assert [p.metrics["quality/perplexity"] for p in report.points] == [11, 14, 40]
    assert report.repeated == 1


@pytest.mark.parametrize(
    ("key", "value"),
    [("dataset", "other"), ("test_tokens_sha256", "cd" * 32), ("seq_len", 512), ("windows", 21), ("dtype", "bfloat16"),
     ("device", "cuda:0")],
)  # fmt: skip
def test_other_stamps_are_a_warning(tmp_path: Path, key: str, value: object) -> None:
    other = finished(0.6, 9, protocol={**STAMP, key: value})
    report = report_of(sweep(tmp_path / "a", RUNS[:2]), sweep(tmp_path / "b", [other]))
    (warning,) = report.warnings
    assert warning.startswith(f"{key} is {str(STAMP[key])[:8]} in ")
    assert f"/a, {str(value)[:8]} in " in warning
    page.write(report, tmp_path / "report.html")
    assert '<div id="warning">' in (tmp_path / "report.html").read_text()
    assert '<div id="warning">' not in (tmp_path / "a" / "report.html").read_text()


def test_runs_of_one_sweep_can_differ_too(tmp_path: Path) -> None:
    others = [finished(a, 9, protocol={**STAMP, "seq_len": 512, "windows": 10}) for a in (0.1, 0.3, 0.5, 0.7)]
    assert report_of(sweep(tmp_path / "a", [RUNS[0], *others])).warnings == [
        "seq_len is 256 in job 0, 512 in job 1 and 3 more",
        "windows is 20 in job 0, 10 in job 1 and 3 more",
    ]


def test_calibration_text_is_no_part_of_the_comparison(tmp_path: Path) -> None:
    other = finished(0.6, 9, protocol={**STAMP, "calibration": {"seed": 1}})
    assert report_of(sweep(tmp_path / "a", [RUNS[0], other])).warnings == []


# MLflow.


def track(name: str, summary: Summary, folder: Path, sweep: Path | None = None) -> None:
    """Puts a run into the store as a job does."""
    folder.mkdir(parents=True, exist_ok=True)
    with Mlflow().start_run(name, summary, JobContext(folder, sweep)) as log:
        if summary.status != "FINISHED":
            raise ValueError(summary.reason)
        log.result(summary, [summary.write(folder)])


@pytest.fixture(scope="module")
def store_of_module(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store that the tests share, since making one takes seconds; each has an experiment of its own."""
    place = tmp_path_factory.mktemp("store")
    give_store(place)
    return f"sqlite:///{place / 'mlflow.db'}"


@pytest.fixture
def own_store(store_of_module: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The store, named to the program and its processes."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store_of_module)
    return store_of_module


@pytest.fixture
def experiment(tmp_path: Path, own_store: str) -> str:
    """A sweep of two runs and a failed one, a single run, and the first run again in a second sweep."""
    name = f"trial of {tmp_path.name}"
    multirun = tmp_path / "multirun" / "first"
    Mlflow().open_sweep(name, multirun)
    for job, run in enumerate(RUNS[:2]):
        track(name, run, multirun / str(job), multirun)
    with pytest.raises(ValueError, match="out of memory"):
        track(name, replace(RUNS[2], status="FAILED", reason="out of memory"), multirun / "2", multirun)
    Mlflow().close_sweep(name, multirun, "FAILED", RUNS[:2])
    track(name, RUNS[3], tmp_path / "outputs")
    again = Mlflow().find_finished(name, RUNS[0].fingerprint)
    assert again is not None
    Mlflow().open_sweep(name, tmp_path / "second")
    Mlflow().enter_again(name, again, JobContext(tmp_path / "second" / "0", tmp_path / "second"))
    return name


def test_an_experiment_is_a_source(experiment: str) -> None:
    report = report_of(experiment)
    assert [p.position for p in report.points] == [
        Position("magnitude", "0.2"), Position("magnitude", "0.4"), Position("structured", "0.2"),
    ]  # fmt: skip
    assert [p.metrics for p in report.points] == [run.metrics for run in (*RUNS[:2], RUNS[3])]
    assert re.fullmatch(r"magnitude 0\.2 \([0-9a-f]{8}\)", report.points[0].job)
    assert report.summaries[0].overrides == ["method=magnitude", "amount=0.2"]
    (missing,) = report.missing
    assert re.fullmatch(r"magnitude 0\.6 \([0-9a-f]{8}\)", missing.label)
    assert (missing.status, missing.reason) == ("FAILED", "ValueError: out of memory")
    assert report.warnings == []


def test_an_experiment_whose_files_are_gone_still_says_enough(experiment: str, own_store: str) -> None:
    found = MlflowClient(own_store).get_experiment_by_name(experiment)
    assert found is not None
    shutil.rmtree(found.artifact_location.removeprefix("file://"))
    report = report_of(experiment)
    assert [p.position.step for p in report.points] == ["0.2", "0.4", "0.2"]
    assert [p.position.series for p in report.points] == ["magnitude", "magnitude", "structured"]
    assert "amount=0.4" in report.summaries[1].overrides
    assert report.summaries[0].protocol["test_tokens_sha256"] == STAMP["test_tokens_sha256"][:36]  # type: ignore[index]


def test_an_experiment_and_a_sweep_are_joined(experiment: str, tmp_path: Path) -> None:
    report = report_of(experiment, sweep(tmp_path / "third", [RUNS[1], RUNS[4]]))
    assert len(report.points) == 4
    assert report.repeated == 1
    assert report.warnings == []


def test_the_parent_carries_the_report(tmp_path: Path, own_store: str) -> None:
    place = sweep(tmp_path / "multirun" / "one", RUNS)
    Mlflow().open_sweep("trial", place)
    Mlflow().close_sweep("trial", place, "FINISHED", RUNS)
    client = MlflowClient(own_store)
    found = client.get_experiment_by_name("trial")
    assert found is not None
    (parent,) = client.search_runs([found.experiment_id])
    assert "report.html" in {item.path for item in client.list_artifacts(parent.info.run_id)}


def test_a_deleted_experiment_is_refused(experiment: str, own_store: str) -> None:
    client = MlflowClient(own_store)
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    client.delete_experiment(found.experiment_id)
    with pytest.raises(Refused, match=f"{experiment}: that experiment was deleted"):
        report_of(experiment)


# The command line, as real processes.


def test_the_report_lies_in_the_sweeps_folder(folder: Path, command: Command) -> None:
    (folder / "report.html").unlink()
    done = command(folder, "-x", "latency/decode_speedup", "-y", "params/reduction")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"Report: {folder / 'report.html'}  {folder / 'report.png'}\n"
    assert drawn(folder / "report.html")["start"] == ["latency/decode_speedup", "params/reduction"]
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_of_several_sources_it_lies_here_and_warns(tmp_path: Path, command: Command) -> None:
    one = sweep(tmp_path / "x" / "a", RUNS[:2])
    two = sweep(tmp_path / "x" / "b", [finished(0.5, 9, protocol={**STAMP, "dtype": "bfloat16"})])
    done = command(one, two)
    assert done.returncode == 0
    assert done.stdout == "Report: report.html  report.png\n"
    assert done.stderr.startswith("prune_lab: warning: ")
    assert "must not be compared: dtype is float32 in x/a, bfloat16 in x/b\n" in done.stderr
    assert (tmp_path / "report.png").is_file()
    assert '<div id="warning">' in (tmp_path / "report.html").read_text()


def test_an_experiment_from_the_command_line(experiment: str, tmp_path: Path, command: Command) -> None:
    done = command(experiment, "-o", "new/place")
    assert (done.returncode, done.stderr) == (0, "")
    assert len(drawn(tmp_path / "new" / "place" / "report.html")["hover"]) == 4


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "required: SOURCE"),
        (["nowhere"], "nowhere: neither a folder nor an experiment"),
        (["~nobody"], "~nobody: neither a folder nor an experiment"),
        ([""], ": neither a folder nor an experiment"),
        (["empty"], "empty: this folder has no results.json"),
        (["broken"], "results.json: it is not the results.json of a sweep"),
        (["refused"], "refused: 1 runs, of which none finished"),
        (["good", "-x", "quality/perplexty"], "-x quality/perplexty: no such metric; did you mean quality/perplexity"),
        (["good", "-y", "memory/peak_mb"], "-y memory/peak_mb: only 1 of 2 runs have it"),
        (["good", "-y", "quality/dense_perplexity"], "figures of the dense model are no axis"),
        (["good", "-z"], "unrecognized arguments: -z"),
        (["good", "-o", "file"], "file: File exists"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, command: Command, arguments: list[str], said: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "results.json").write_text('[{"job": "0", "metrics": {}}]')
    sweep(tmp_path / "refused", [Summary("FAILED", reason="no")])
    partly = finished(0.2, 11)
    partly.metrics["memory/peak_mb"] = 5.0
    sweep(tmp_path / "good", [partly, RUNS[1]])
    done = command(*arguments)
    assert done.returncode == 2, done
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert said in done.stderr
    assert not (tmp_path / "mlflow.db").exists()


def test_a_misspelt_experiment_is_answered_with_close_names(experiment: str, command: Command) -> None:
    asked = experiment.replace("trial", "trail")
    done = command(asked)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"{asked}: neither a folder nor an experiment of the MLflow store" in done.stderr
    assert f"did you mean {experiment}" in done.stderr


@pytest.mark.parametrize("help_only", [True, False])
def test_torch_is_not_imported(tmp_path: Path, experiment: str, help_only: bool) -> None:
    code = "import runpy, sys\ntry: runpy.run_module('prune_lab.report', run_name='__main__')\n"
    code += "except SystemExit as end: print(end.code, 'torch' in sys.modules, 'mlflow' in sys.modules)"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-c", code, "--help" if help_only else experiment]
    done = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1:] == [f"0 False {not help_only}"], done.stderr


# In a browser.

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def dom(browser: str, address: str, place: Path) -> str:
    """The page's elements after its script has run."""
    line = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=10000", "--dump-dom"]
    line += [f"--user-data-dir={place}", "--host-resolver-rules=MAP * ~NOTFOUND", address]
    return subprocess.run(line, capture_output=True, text=True, check=True, timeout=120).stdout


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")
def test_a_browser_draws_the_points_of_the_chosen_axes(folder: Path, tmp_path: Path) -> None:
    assert BROWSER
    address = f"file://{folder / 'report.html'}"
    for fragment, ringed in (("", 4), ("#x=latency/decode_speedup&y=quality/perplexity", 3)):
        found = dom(BROWSER, address + fragment, tmp_path / "browser")
        plot = found[found.index('id="plot"') : found.index('id="missing"')]
        assert plot.count('class="point"') == 5 + 1 + ringed  # runs, dense, front
        assert plot.count("js-line") == 2 + 2  # series, the front, and the front in the legend
        x = "decode speed-up, higher is better" if fragment else "non-zero parameters (millions), lower is better"
        assert x in plot
        assert ">structured<" in plot


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")
def test_a_log_scale_within_a_decade_has_labels(tmp_path: Path) -> None:
    """From 10, of the dense model, to 13 there is 10 alone of the 1, 2 and 5 of every decade."""
    assert BROWSER
    place = sweep(tmp_path / "sweep", [finished(0.2, 12), finished(0.4, 13)])
    found = dom(BROWSER, f"file://{place / 'report.html'}", tmp_path / "browser")
    assert len(re.findall(r'class="ytick"', found)) > 2
