"""docs/metrics.md lists every metric that a run can log, with its direction as the code has it, and no other."""

from __future__ import annotations

import ast
import dataclasses
import re

import pytest
import torch
from conftest import ROOT
from metrics_page import Row, rows_of, without_dense

from prune_lab.compare import compare, compute_figures
from prune_lab.measure.energy import Energy
from prune_lab.measure.figures import Figures
from prune_lab.measure.macs import Macs
from prune_lab.measure.perplexity import Quality
from prune_lab.measure.size import Size
from prune_lab.measure.speed import Latency, Paired
from prune_lab.measure.timing import Timings
from prune_lab.methods.magnitude import Magnitude
from prune_lab.pruning.pruned import Pruned
from prune_lab.results.metrics import axis

ROWS = rows_of(ROOT / "docs" / "metrics.md")
NAMES = [name for row in ROWS for name in row.names]
UNITS = {"_mb": "MB", "_ms_p50": "ms", "_ms_p95": "ms", "_s": "s", "reduction": "fraction", "_speedup": "times dense"}


def emitted() -> set[str]:
    """Names of what compare.py makes of a run with everything measured, and of what is named elsewhere in the code."""
    pair = Paired(torch.ones(10), torch.ones(10))
    latency = Latency(pair, pair)
    timings = Timings(latency, aa=latency, grid={(4, 128): latency}, energy=Energy(1.0, 1.0))
    scores = dict.fromkeys(("acc", "acc_stderr", "acc_norm", "acc_norm_stderr", "n", "truncated"), 1.0)
    quality = Quality(*[1.0] * len(dataclasses.fields(Quality)))
    figures = Figures(quality, Size(1, 1, 1.0, 1.0), 1.0, {"arc_easy": scores})
    found = set(compare(Magnitude(), figures, figures, timings, Pruned()))
    return found | set(compute_figures(Macs(1, 1), Macs(1, 1))) | written("time", "train", "validation")


def written(*groups: str) -> set[str]:
    """Names of metrics of these groups that stand in the package's source."""
    trees = (ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "prune_lab").rglob("*.py"))
    texts = {n.value for tree in trees for n in ast.walk(tree) if isinstance(n, ast.Constant)}
    name = re.compile(rf"({'|'.join(groups)})/[a-z_]+")
    return {text for text in texts if isinstance(text, str) and name.fullmatch(text)}


EMITTED = sorted(emitted())


def row_of(metric: str) -> Row:
    found = [row for row in ROWS if row.is_about(without_dense(metric))]
    assert len(found) == 1, f"docs/metrics.md has {len(found)} rows of {metric}"
    return found[0]


@pytest.mark.parametrize("metric", EMITTED)
def test_the_page_has_a_metric_with_its_direction(metric: str) -> None:
    row = row_of(metric)
    if metric == without_dense(metric):
        assert row.better == (axis(metric).better or ""), metric
    assert row.measured
    for end, unit in UNITS.items():
        if metric.endswith(end) and not metric.endswith("tokens_per_s"):
            assert row.unit == unit, metric


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.names[0])
def test_a_row_is_of_metrics_that_exist(row: Row) -> None:
    for name in row.names:
        alone = Row((name,), row.unit, row.better, row.dense, row.measured)
        of_name = [metric for metric in EMITTED if alone.is_about(without_dense(metric))]
        assert of_name, f"no run logs {name}"
        assert row.dense == ("yes" if any("/dense_" in metric for metric in of_name) else ""), name


def test_a_metric_stands_once() -> None:
    assert len(set(NAMES)) == len(NAMES) > 40
    assert len(EMITTED) > 60
