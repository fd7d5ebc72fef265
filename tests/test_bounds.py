"""Bounds: what a text means, what is none, and what a run says that does not keep to them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import Cli

from prune_lab.results.bounds import Bound, check_measured, hold, not_kept, read_bounds, texts_of


@pytest.mark.parametrize(
    ("text", "bound"),
    [
        ("params/total<=110e6", Bound("params/total", 110e6)),
        ("params/total <= 110_000_000", Bound("params/total", 110e6)),
        ("  size/disk_mb<=150 ", Bound("size/disk_mb", 150.0)),
        ("latency/decode_ms_per_token_p50<=0.5", Bound("latency/decode_ms_per_token_p50", 0.5)),
        ("llama_cpp/decode_ms_per_token_p50<=20", Bound("llama_cpp/decode_ms_per_token_p50", 20.0)),
        ("tasks/piqa_flips<=0.1", Bound("tasks/piqa_flips", 0.1)),
        ("latency/prefill_ms_p50_b4_l128<=9", Bound("latency/prefill_ms_p50_b4_l128", 9.0)),
    ],
)
def test_a_bound_is_read(text: str, bound: Bound) -> None:
    assert read_bounds([text]) == (bound,)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("params/total", "is not METRIC<=NUMBER"),
        ("params/total<110e6", "is not METRIC<=NUMBER"),
        ("params/total>=110e6", "is not METRIC<=NUMBER"),
        ("params/total==110e6", "is not METRIC<=NUMBER"),
        ("110e6>=params/total", "is not METRIC<=NUMBER"),
        ("params/total<=", "is not METRIC<=NUMBER"),
        ("<=3", "is not METRIC<=NUMBER"),
        ("", "is not METRIC<=NUMBER"),
        ("params/total<=110M", "its unit is parameters"),
        ("size/disk_mb<=150MB", "its unit is MB"),
        ("latency/decode_ms_per_token_p50<=20ms", "its unit is ms per token"),
        ("params/total<=nan", "must be a finite number"),
        ("params/total<=inf", "must be a finite number"),
        ("params/total<=-1", "must be a finite number"),
        ("params<=1", "is not a metric"),
        ("params/totl<=1", "is not a metric"),
        ("params/dense_total<=1", "is not a metric"),
        ("latency/decode_speedup<=2", "is better when higher"),
        ("throughput/decode_tokens_per_s<=2", "is better when higher"),
        ("scope/share<=1", "is only shown"),
        ("validation/perplexity<=9", "is logged while a model trains"),
    ],
)
def test_what_is_no_bound_is_refused(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        read_bounds([text])


def test_a_metric_is_bounded_once() -> None:
    with pytest.raises(ValueError, match="params/total is bounded twice"):
        read_bounds(["params/total<=3", "size/disk_mb<=1", "params/total<=2"])


@pytest.mark.parametrize(
    ("metric", "says"),
    [
        ("latency/prefill_ms_p50", "measure.latency=true"),
        ("memory/peak_mb", "measure.memory=true"),
        ("llama_cpp/file_mb", "measure.engine=llama_cpp,"),
        ("onnxruntime/decode_ms_per_token_p50", "measure.engine=onnxruntime measure.latency=true"),
        ("llama_cpp/peak_mb", "measure.engine=llama_cpp measure.memory=true"),
        ("energy/joules_per_token", "measure.energy=true"),
        ("generation/loops", "measure.generation_prompts=8"),
        ("tasks/piqa_flips", "measure.tasks=[piqa]"),
        ("quality/kl_p99", "measure.kl_windows=32"),
    ],
)
def test_a_metric_that_runs_would_not_measure_names_the_keys(metric: str, says: str) -> None:
    measure = dict.fromkeys(("latency", "memory", "energy"), False) | {"engine": "none", "tasks": []}
    measure |= {"generation_prompts": 0, "kl_windows": 0}
    with pytest.raises(ValueError, match=re.escape(says)):
        check_measured(metric, measure)
    measure = dict.fromkeys(("latency", "memory", "energy"), True) | {"engine": metric.split("/")[0]}
    check_measured(metric, measure | {"tasks": ["arc_easy", "piqa"], "generation_prompts": 2, "kl_windows": None})


def test_what_every_run_measures_needs_no_key() -> None:
    measure = dict.fromkeys(("latency", "memory", "energy"), False) | {"engine": "none", "tasks": []}
    for metric in ("params/total", "size/disk_mb", "memory/weights_mb", "quality/perplexity", "compute/macs_per_token"):
        check_measured(metric, measure | {"generation_prompts": 0, "kl_windows": 0})


def test_one_text_is_a_list_of_one() -> None:
    assert texts_of("a<=1") == ("a<=1",)
    assert texts_of(["a<=1", "b<=2"]) == ("a<=1", "b<=2")
    for wrong in (3, {"params/total": 3}, [3], None):
        with pytest.raises(ValueError, match="is not a list of METRIC<=NUMBER"):
            texts_of(wrong)


def test_a_limit_is_kept_by_its_own_value_and_not_by_a_missing_one() -> None:
    bounds = read_bounds(["params/total<=10", "quality/kl<=0.5"])
    assert hold(bounds, {"params/total": 10, "quality/kl": 0.5})
    assert not hold(bounds, {"params/total": 10})
    assert not_kept(bounds, {"params/total": 2_000_000, "quality/kl": 0.5}) == [
        "bound params/total <= 10 is not kept: it is 2,000,000"
    ]
    assert not_kept(bounds, {"params/total": 10}) == [
        "bound quality/kl <= 0.5 is not kept: the run has not measured it"
    ]


def test_a_run_says_which_bounds_it_does_not_keep(small: list[str], cli: Cli, tmp_path: Path) -> None:
    done = cli(*small, "tracking=none", "bound=['params/total<=10','params/reduction<=1']")
    assert done.returncode == 2
    assert "is better when higher" in done.stderr
    done = cli(*small, "tracking=none", "measure=quality_only", "bound=['params/total<=10','quality/perplexity<=1e9']")
    assert done.returncode == 0, done.stderr
    assert "bound params/total <= 10 is not kept" in done.stdout
    assert "quality/perplexity <=" not in done.stdout
