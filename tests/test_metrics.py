"""The table of metrics: it has every metric that a run logs, with its direction and unit, and no other."""

from __future__ import annotations

import ast
import dataclasses
import re

import pytest
import torch
from conftest import ROOT

from prune_lab.commands.reference import write_metrics
from prune_lab.compare import compare, compute_figures, engine_figures
from prune_lab.measure.continuations import Continuation
from prune_lab.measure.divergence import Divergence, divergence_of, position_divergences, ratio_interval
from prune_lab.measure.energy import Energy
from prune_lab.measure.engine_figures import Engine, EngineFigures
from prune_lab.measure.macs import Macs
from prune_lab.measure.measurements import Measurements
from prune_lab.measure.perplexity import Quality
from prune_lab.measure.size import Size
from prune_lab.measure.speed import Latency, Paired
from prune_lab.measure.timing import Timings
from prune_lab.methods.magnitude import Magnitude
from prune_lab.methods.none import NoPruning
from prune_lab.pruning.pruned import Pruned
from prune_lab.results.metrics import ENGINES, MEASURED, METRICS, axis, check_known, find, members, of_dense
from prune_lab.results.series import Position, pivot
from prune_lab.results.summary import Summary

PAGE = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
SCORES = ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr", "word_perplexity", "exact_match", "n", "truncated")
UNITS = {"_mb": "MB", "_ms_p50": "ms", "_ms_p95": "ms", "_s": "s", "reduction": "fraction", "_speedup": "times dense"}


def emitted() -> set[str]:
    """Names of what compare.py makes of a run with everything measured, and of what is named elsewhere in the code."""
    pair = Paired(torch.ones(10), torch.ones(10))
    latency = Latency(pair, pair)
    timings = Timings(latency, aa=latency, grid={(4, 128): latency}, energy=Energy(1.0, 1.0))
    quality = Quality(*[1.0] * len(dataclasses.fields(Quality)))
    divergence = Divergence(*[1.0] * len(dataclasses.fields(Divergence)))
    tasks, answers = {"arc_easy": dict.fromkeys(SCORES, 1.0)}, {"arc_easy": "01"}
    texts = (Continuation((1, 2), "eos"),)
    size = Size(1, 1, 1.0, 1.0, 1.0, 1, 1)
    figures = Measurements(quality, size, 1.0, tasks, answers, texts, divergence, (1.0, 1.0), 1.0)
    found = set(compare(Magnitude(), figures, figures, timings, Pruned()))
    there = EngineFigures(1.0, 1.0, 1.0, 1.0)
    for engine in ENGINES:
        found |= set(engine_figures(Engine(engine, there, there, latency)))
    return found | set(compute_figures(Macs(1, 1), Macs(1, 1))) | written()


def written() -> set[str]:
    """Names that look like a metric's where the package's source has a dictionary's key, or a stopwatch's name."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "prune_lab").rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    keys = [key for node in nodes if isinstance(node, ast.Dict) for key in node.keys]
    keys += [
        word for node in nodes if isinstance(node, ast.Call) and "stopwatch" in ast.unparse(node) for word in node.args
    ]
    texts = [key.value for key in keys if isinstance(key, ast.Constant) and isinstance(key.value, str)]
    return {text for text in texts if re.fullmatch(r"[a-z]+/[a-z0-9_]+", text)}


EMITTED = sorted(emitted())


def test_what_is_logged_is_in_the_table() -> None:
    for name in EMITTED:
        metric = name.replace("/dense_", "/")
        entry = find(metric)
        assert entry is not None, name
        check_known([name])
        for end, unit in UNITS.items():
            if metric.endswith(end) and not metric.endswith("tokens_per_s"):
                assert entry.unit == unit, metric


def test_figures_of_an_engine_are_of_their_model() -> None:
    """By hand: what was not asked for of one of the two has no metric."""
    pair = Paired(torch.full((10,), 6.0), torch.full((10,), 4.0))
    engine = Engine(
        "llama_cpp", EngineFigures(30.0, 8.0, 1.02, 50.0), EngineFigures(20.0, 10.0, 1.03, None), Latency(pair, pair)
    )
    times = {"p50": 4.0, "p95": 4.0}
    assert engine_figures(engine) == {
        "llama_cpp/file_mb": 20.0, "llama_cpp/dense_file_mb": 30.0,
        "llama_cpp/perplexity": 10.0, "llama_cpp/dense_perplexity": 8.0, "llama_cpp/perplexity_ratio": 1.25,
        "llama_cpp/perplexity_vs_torch": 1.03, "llama_cpp/dense_perplexity_vs_torch": 1.02,
        **{f"llama_cpp/prefill_ms_{end}": value for end, value in times.items()}, "llama_cpp/dense_prefill_ms_p50": 6.0,
        **{f"llama_cpp/decode_ms_per_token_{end}": value for end, value in times.items()},
        "llama_cpp/dense_decode_ms_per_token_p50": 6.0,
        **{f"llama_cpp/{stage}_speedup{end}": 1.5 for stage in ("prefill", "decode") for end in ("", "_low", "_high")},
    }  # fmt: skip


def test_a_task_may_be_called_as_a_dense_figure_is() -> None:
    check_known(["tasks/dense_passage_acc", "tasks/dense_dense_passage_acc"])


def test_an_entry_is_of_something_that_is_logged() -> None:
    """With the dense model's figure beside it where the table says so."""
    for entry in METRICS:
        of_entry = [name for name in EMITTED if find(name.replace("/dense_", "/")) is entry]
        assert of_entry, f"no run logs {entry.name}"
        assert any("/dense_" in name for name in of_entry) == (entry.dense == MEASURED), entry.name
        assert entry.measured, entry.name


def test_a_name_fits_one_entry() -> None:
    """But for scores of tasks, whose last two entries take what the others leave."""
    for name in (name for name in EMITTED if "/dense_" not in name):
        fitting = [entry.name for entry in METRICS if entry.words_of(name) is not None]
        own = [entry for entry in fitting if "{score}" not in entry]
        assert len(own) == 1 or (not own and name.startswith("tasks/")), (name, fitting)
    assert len(EMITTED) > 60


def test_the_dense_model_has_what_a_run_that_changes_nothing_has() -> None:
    """Measured as a compressed one: nothing removed, as fast, the same figures."""
    torch.manual_seed(0)
    times = torch.rand(20, dtype=torch.float64) + 1
    latency = Latency(Paired(times, times), Paired(times / 8, times / 8))
    timings = Timings(latency, aa=latency, grid={(4, 128): latency}, energy=Energy(0.7, 0.7))
    quality = Quality(*[11.0 + place for place, _ in enumerate(dataclasses.fields(Quality))])
    losses = torch.rand(3, 7)
    divergence = divergence_of(*position_divergences(times[None], times[None]))
    tasks, answers = {"arc_easy": dict.fromkeys(SCORES, 0.5)}, {"arc_easy": "0110"}
    interval = ratio_interval(losses, losses)
    texts = (Continuation((7,) * 20, "length"), Continuation((1, 2, 0), "eos"))
    size = Size(700, 600, 3.0, 4.0, 2.0, 8, 500)
    same = Measurements(quality, size, 5.0, tasks, answers, texts, divergence, interval, 1.0)
    metrics = compare(NoPruning(), same, same, timings, Pruned()) | compute_figures(Macs(90, 80), Macs(90, 80))
    run = {name: value for name, value in metrics.items() if "/dense_" not in name}
    dense = of_dense(metrics)
    assert {name: run[name] for name in dense} == pytest.approx(dense)
    assert {name for name in run if name not in dense} == {
        "compute/effective_macs_per_token", "latency/prefill_ms_p95", "latency/decode_ms_per_token_p95",
    }  # fmt: skip


def test_what_is_not_in_the_table_cannot_be_logged() -> None:
    for name in [
        "quality/perplexty", "perplexity", "Quality/perplexity", "quality/perplexity ", "quality/", "own/size_mb",
        "quality/dense_perplexity_ratio", "quality/dense_dense_perplexity", "params/dense_reduction",
        "time/dense_prune_s", "latency/dense_prefill_speedup", "latency/encode_speedup", "latency/prefill_speedup_b4",
        "latency/prefill_speedup_bB_lL", "latency/prefill_speedup_middle", "latency/{stage}_speedup", "time/wait_s",
        "tasks/acc", "",
    ]:  # fmt: skip
        summary = Summary("RUNNING")
        with pytest.raises(ValueError, match=re.escape(f"{name!r} is not a metric")):
            summary.set_metrics({"quality/perplexity": 10.0, name: 1.0})
        assert summary.metrics == {}


@pytest.mark.parametrize(
    "name", ["own/size_mb", "own/perplexity", "quality/dense_perplexity", "latency/prefill_speedup_b4", "seconds_s"]
)
def test_what_is_not_in_the_table_is_drawn_without_a_direction(name: str) -> None:
    """As a stored run of another version may have it; its dense model stands beside it by the name alone."""
    found = axis(name)
    assert (found.metric, found.title, found.unit, found.better) == (name, name, 1.0, None)
    assert not found.logarithmic
    assert of_dense({"own/size_mb": 1.0, "own/dense_size_mb": 2.0, "own/reduction": 0.5}) == {"own/size_mb": 2.0}


@pytest.mark.parametrize(
    ("name", "better", "dense"),
    [
        ("tasks/arc_easy_acc_norm", "higher", None),
        ("tasks/x_acc_acc", "higher", None),
        ("tasks/wikitext_word_perplexity", "lower", None),
        ("tasks/gsm8k_exact_match_flexible-extract", None, None),
        ("tasks/arc_easy_acc_stderr", None, None),
        ("tasks/wikitext_word_perplexity_stderr", None, None),
        ("tasks/piqa_n", None, None),
        ("latency/decode_ms_per_token_p50_b16_l2048", "lower", None),
        ("latency/decode_speedup_b16_l2048", "higher", 1.0),
        ("latency/prefill_speedup_b1_l8_low", "higher", 1.0),
        ("latency/aa_decode_speedup_high", "higher", 1.0),
        ("memory/reduction", "higher", 0.0),
        ("validation/perplexity", "lower", None),
    ],
)
def test_a_family_of_metrics(name: str, better: str | None, dense: float | None) -> None:
    assert axis(name).better == better
    assert of_dense({name: 3.0}).get(name) == dense


def test_the_placeholders_of_a_name() -> None:
    run = {"tasks/arc_easy_truncated": 3.0, "tasks/dense_arc_easy_truncated": 4.0, "tasks/arc_easy_acc": 0.5}
    assert list(members("tasks/{task}_truncated", run)) == [({"task": "arc_easy"}, 3.0)]
    shape = {"latency/decode_speedup_b4_l128_low": 1.0, "latency/decode_speedup_b4_l128": 2.0}
    (found,) = members("latency/{stage}_speedup_b{batch}_l{length}", shape)
    assert found == ({"stage": "decode", "batch": "4", "length": "128"}, 2.0)


def test_titles_of_axes() -> None:
    assert axis("latency/prefill_speedup").title == "prefill speed-up, higher is better"
    assert axis("latency/prefill_speedup_low").title == "latency/prefill_speedup_low, higher is better"
    assert axis("params/nonzero").title == "non-zero parameters (millions), lower is better"
    assert axis("train/loss").title == "train/loss"
    assert [metric.name for metric in METRICS if axis(metric.name).logarithmic] == [
        "quality/perplexity", "quality/perplexity_ratio",
        "llama_cpp/perplexity", "llama_cpp/perplexity_ratio", "onnxruntime/perplexity", "onnxruntime/perplexity_ratio",
    ]  # fmt: skip


def test_a_mean_over_seeds_stands_with_its_range() -> None:
    """As every value with two bounds does."""
    runs = [(Position("a", "0.1"), 12.0), (Position("a", "0.1"), 11.0), (Position("a", "0.2"), 13.0)]
    table = pivot([*runs, (Position("b", "0.1"), 12.34567)])
    assert table == [["perplexity", "0.1", "0.2"], ["a", "11.5 [11, 12]", "13"], ["b", "12.35", ""]]


# docs/metrics.md


def test_the_page_is_up_to_date() -> None:
    assert write_metrics(PAGE) == PAGE, "run: python -m prune_lab.commands.reference docs/metrics.md"


def test_rows_of_the_page() -> None:
    lines = PAGE.splitlines()
    assert "| `params/nonzero` | parameters | lower | yes | those that are not zero |" in lines
    assert any(
        line.startswith("| `tasks/TASK_acc`, `tasks/TASK_acc_norm` | fraction | higher | yes | ") for line in lines
    )
    assert any(
        line.startswith("| `latency/prefill_speedup_bB_lL`, `latency/decode_speedup_bB_lL` | times dense | higher | | ")
        for line in lines
    )
    names = [
        name for line in lines if line.startswith("| `") for name in re.findall(r"`([^`]+)`", line.split(" | ")[0])
    ]
    assert len(set(names)) == len(names) > 40


@pytest.mark.parametrize(
    "page", ["", "<!-- run: begin -->", PAGE + PAGE, PAGE.replace("training: end", "training end")]
)
def test_a_page_without_its_markers_is_refused(page: str) -> None:
    with pytest.raises(ValueError, match=r"the tables of metrics stand between"):
        write_metrics(page)


def test_what_is_written_between_the_markers_goes() -> None:
    assert write_metrics(PAGE.replace("those that are not zero", "an older text |\n| more")) == PAGE
