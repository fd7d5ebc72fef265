"""Report of the runs of one or several sources: points, dense models, metrics, warnings, and what is missing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from prune_lab.errors import Refused
from prune_lab.report.comparability import warnings
from prune_lab.results.metrics import is_dense
from prune_lab.results.pareto import Point, dense_points
from prune_lab.results.series import keys, position, shared, telling
from prune_lab.results.summary import Summary
from prune_lab.tracking.params import params_of

FINISHED = "FINISHED"


@dataclass(frozen=True)
class Run:
    """A run of a source, which is a sweep's folder or an MLflow experiment."""

    source: str
    job: str  # its number in a sweep, or its name in MLflow
    summary: Summary
    tracked: bool = False  # it was read from an MLflow store


@dataclass(frozen=True)
class Missing:
    """Run that a plot cannot show, or not on every axis, with its status and the reason."""

    label: str
    status: str
    reason: str


@dataclass(frozen=True)
class Report:
    """Content of a report: `summaries` are those of `points`, in the same order."""

    sources: list[str]
    points: list[Point]
    summaries: list[Summary]
    dense: list[Point]
    metrics: list[str]
    missing: list[Missing]
    warnings: list[str]
    repeated: int  # runs that were left out since they stand in more than one source

    @property
    def unfinished(self) -> int:
        """Number of runs that did not finish."""
        return sum(one.status != FINISHED for one in self.missing)

    def pair(self, x: str | None = None, y: str | None = None) -> tuple[str, str]:
        """The axes to begin with: those asked for, else size and quality, else the first two there are."""
        y = y or next(m for m in ("quality/perplexity", *self.metrics) if m in self.metrics and m != x)
        x = x or next(m for m in ("params/nonzero", "size/disk_mb", *self.metrics) if m in self.metrics and m != y)
        return x, y


def report_of(sources: dict[str, list[Run]]) -> Report:
    """The report of the runs of each source. Raises Refused where there is nothing to plot."""
    every = [run for runs in sources.values() for run in runs]
    runs = _once(run for run in every if run.summary.status == FINISHED)
    if not runs:
        count = f"{len(every)} runs, of which none finished" if every else "no runs"
        raise Refused(f"{', '.join(sources)}: {count}; there is nothing to plot")
    metrics = _metrics(runs)
    if len(metrics) < 2:
        raise Refused(f"{', '.join(sources)}: the finished runs share fewer than two metrics; there is nothing to plot")
    several = len(sources) > 1
    points = _points(runs, every, several)
    return Report(
        sources=list(sources),
        points=points,
        summaries=[run.summary for run in runs],
        dense=dense_points(points),
        metrics=metrics,
        missing=[missing for run in every if (missing := _missing(run, several))],
        warnings=warnings([(run.source, _label(run, several), run.summary) for run in runs]),
        repeated=sum(run.summary.status == FINISHED for run in every) - len(runs),
    )


def _label(run: Run, several: bool) -> str:
    job = run.job if run.tracked else f"job {run.job}"
    return f"{run.source}, {job}" if several else job


def _once(runs: Iterable[Run]) -> list[Run]:
    """Runs without repetitions: one that was found finished stands in two sweeps, and a sweep's run in MLflow too."""
    found: dict[object, Run] = {}
    for number, run in enumerate(runs):
        figures = tuple(sorted((name, f"{value:.9g}") for name, value in run.summary.metrics.items()))
        found.setdefault((run.summary.fingerprint or number, figures), run)
    return list(found.values())


def _metrics(runs: list[Run]) -> list[str]:
    """Metrics that all runs share, but for runs in which they diverged; figures of the dense model are no axes."""
    names = dict.fromkeys(name for run in runs for name in run.summary.metrics if not is_dense(name))
    return [name for name in names if all(name in run.summary.metrics or name in run.summary.diverged for run in runs)]


def _missing(run: Run, several: bool) -> Missing | None:
    summary = run.summary
    label = _label(run, several)
    if not run.tracked:  # MLflow's names of runs say enough
        label = " ".join([f"{label}:", *summary.overrides])
    if summary.status != FINISHED:
        return Missing(label, summary.status, summary.reason or "no reason is on record")
    if summary.diverged:
        return Missing(label, summary.status, f"no finite number: {', '.join(summary.diverged)}")
    return None


def _points(runs: list[Run], every: list[Run], several: bool) -> list[Point]:
    """Points of the runs. In one sweep's folder overrides tell series apart; elsewhere the runs' facts do.

    A recipe's file sets keys that are no override, and MLflow keeps parameters.
    """
    if not several and not any(run.tracked for run in every):
        words, common = [run.summary.overrides for run in runs], shared([run.summary.overrides for run in every])
    else:
        words, common = telling(_needed([_facts(run.summary) for run in runs])), []
    return [
        Point(_label(run, several), position(replace(run.summary, overrides=asked), common), run.summary.metrics)
        for run, asked in zip(runs, words, strict=True)
    ]


def _facts(summary: Summary) -> dict[str, str]:
    """Facts of a run: its few, telling parameters, the model by its name, and by the dense model's figures."""
    if summary.config and summary.protocol:
        facts = {key: str(value) for key, value in params_of(summary).items()}
        facts["model"] = str(summary.model.get("name") or facts.get("model")).rstrip("/").rpartition("/")[2]
    else:
        facts = keys(summary.overrides)
    facts = {key: value.replace("'", "") for key, value in facts.items()}  # units=[mlp, heads]
    facts["method"] = summary.choices.get("method", facts.get("method", ""))
    m = summary.metrics
    if {"params/dense_total", "quality/dense_perplexity"} <= set(m):
        facts["dense"] = f"{m['params/dense_total'] / 1e6:.4g}M/{m['quality/dense_perplexity']:.4g}"
    return facts


def _needed(runs: list[dict[str, str]]) -> list[dict[str, str]]:
    """Facts without the dense model's figures where the names of model and dataset say as much."""
    named = {(facts.get("model"), facts.get("dataset")) for facts in runs}
    apart = {(facts.get("model"), facts.get("dataset"), facts.get("dense")) for facts in runs}
    return [{k: v for k, v in facts.items() if k != "dense"} for facts in runs] if len(apart) == len(named) else runs
