"""Search for the best shape of a model within bounds: the runs that it needs, in order. hydra/sweeper=budget runs it.

1. method=damage measures each axis of the shape alone, once for a model and its calibration text.
2. Costs that do not follow from a shape are measured of a few shapes, and a model is fitted to them.
3. The shapes of least damage within the bounds are cut, refitted and measured whole; of those that keep to the bounds
   the one with the least KL divergence on held-out calibration windows wins.
4. The winner is made once more from all calibration windows, and exported.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy

from prune_lab.results.bounds import Bound, hold, number
from prune_lab.results.metrics import dense_name
from prune_lab.results.summary import Summary
from prune_lab.sweeps import cost_fit, shape_search
from prune_lab.sweeps.shape_search import Counts, Space, Values

KL, SURVEY = "shape/kl", "damage.json"
ROUNDS = 3  # in which the bounds of fitted costs are drawn tighter, where what was measured is above them
_ONE_WINDOW = ("measure.max_windows=1", "measure.kl_windows=0")
# Any weights do where costs alone are of interest.
_ANY_WEIGHTS = (
    "method.blocks_by=bi", "method.blocks_refit=none", "method.units_score=l2", "method.units_refit=none",
    "method.experts_score=random", "method.hidden_score=random", "method.hidden_refit=none",
)  # fmt: skip

Run = Callable[[Sequence[Sequence[str]]], list[Summary]]


@dataclass(frozen=True)
class Settings:
    """Keys of the search: held_out, calibration windows to choose candidates by; shapes, how many are measured whole.

    best: of bounds on quality alone, the cost that is to be least. stored_as_is: files hold the weights in the run's
    number type. runs_export: an engine measures what is exported. left_out: groups of which a run that does not need
    them has none. survey: overrides of the keys of method=damage, and of what need not be measured beside it.
    """

    held_out: int
    shapes: int
    best: str
    stored_as_is: bool = True
    runs_export: bool = False
    left_out: tuple[str, ...] = ()
    survey: tuple[str, ...] = ()


@dataclass
class Candidate:
    """A shape that was measured whole."""

    counts: Counts
    predicted: float  # its damage
    costs: dict[str, float]  # predicted, by metric
    summary: Summary

    @property
    def metrics(self) -> Mapping[str, float]:
        """Its measured metrics; none where it did not finish."""
        return self.summary.metrics if self.summary.status == "FINISHED" else {}

    @property
    def kl(self) -> float:
        """KL divergence on the held-out windows."""
        return self.metrics.get(KL, math.inf)


@dataclass
class Found:
    """Outcome of a search, for its answer and its plots."""

    bounds: tuple[Bound, ...]
    space: Space
    costs: dict[str, Values]  # of every shape, by bounded metric
    fits: dict[str, cost_fit.CostFit] = field(default_factory=dict)
    candidates: list[Candidate] = field(default_factory=list)
    winner: Candidate | None = None
    final: Summary | None = None
    why_none: str | None = None
    runs: int = 0


class Search:
    """A search within bounds; `run` runs a batch of overrides and returns the summaries."""

    def __init__(self, bounds: tuple[Bound, ...], settings: Settings, run: Run) -> None:
        if not bounds:
            raise ValueError('bound is required: bounds on metrics, such as bound=["params/total<=110e6"]')
        if Bound(settings.best, 0.0).on_quality:
            raise ValueError(
                f"hydra.sweeper.best={settings.best} is a quality: bound it, and give a cost, such as params/total"
            )
        for name in (*(bound.metric for bound in bounds), settings.best):
            if name.startswith("time/"):
                raise ValueError(
                    f"{name} is time that a run takes and no cost of its model: give latency/decode_ms_per_token_p50, "
                    "or another cost of the model, in bound and hydra.sweeper.best"
                )
        self.bounds, self.settings, self._launch = bounds, settings, run
        self._runs, self._totals = 0, Counts()

    def search(self) -> Found:
        """Runs the search; raises ValueError where the damage or a cost cannot be measured."""
        space = self._survey()
        self._totals = space.dense
        on_cost = [bound for bound in self.bounds if not bound.on_quality]
        metrics = [bound.metric for bound in on_cost] or [self.settings.best]
        found = Found(self.bounds, space, {})
        self._price(found, metrics)
        if on_cost:
            self._within_cost(found, on_cost)
        else:
            self._least_cost(found)
        kept = [one for one in found.candidates if hold(self.bounds, one.metrics)]
        if kept:
            rank = (lambda one: one.kl) if on_cost else (lambda one: one.metrics[self.settings.best])
            found.winner = min(kept, key=rank)
            (found.final,) = self._run([[*self._overrides(found.winner.counts), *self._bounds_of_final()]])
        elif found.why_none is None:
            found.why_none = _nearest_measured(found)
        found.runs = self._runs
        return found

    def _run(self, batch: Sequence[Sequence[str]]) -> list[Summary]:
        self._runs += len(batch)
        return self._launch(batch)

    def _survey(self) -> Space:
        """The damage of each axis, of a run that measures nothing else."""
        overrides = ["method=damage", f"method.held_out={self.settings.held_out}", *self.settings.survey, "bound=[]"]
        overrides += self._without("recovery", "post", "export")
        for again in ((), ("resume=false",)):  # the folder of a finished run may be gone
            (summary,) = self._run([[*overrides, *again]])
            if summary.status != "FINISHED":
                raise ValueError(f"the damage of the model's axes could not be measured: {summary.reason}")
            path = Path(summary.folder) / SURVEY
            if path.is_file():
                return Space.read(json.loads(path.read_text(encoding="utf-8")))
        raise ValueError(f"{path} is missing")

    def _price(self, found: Found, metrics: Sequence[str]) -> None:
        """The costs of all shapes: exact where they follow from a shape, else by a fit to measured ones."""
        space, fitted = found.space, list[str]()
        for metric in metrics:
            if metric in space.exact and (metric != "size/disk_mb" or self.settings.stored_as_is):
                found.costs[metric] = space.cost(metric)
            else:
                fitted.append(metric)
        if not fitted:
            return
        shapes = space.steps()
        beside = [*_ANY_WEIGHTS, "bound=[]", *_ONE_WINDOW, *self._without("recovery", *self._export)]
        batch = [[*self._overrides(counts), *beside] for counts in shapes]
        summaries = self._run(batch)
        done = [(counts, s.metrics) for counts, s in zip(shapes, summaries, strict=True) if s.status == "FINISHED"]
        if len(done) < min(3, len(shapes)):
            reasons = [summary.reason for summary in summaries if summary.status != "FINISHED"]
            raise ValueError(f"the shapes that costs are fitted to did not run: {reasons[0]}")
        for metric in fitted:
            if any(metric not in measured for _, measured in done):
                raise ValueError(
                    f"bound: the runs do not measure {metric}: give measure=default, or the keys of measure that "
                    "docs/metrics.md names for it"
                )
            fit = _fitted(metric, done, space.dense)
            found.fits[metric] = fit
            found.costs[metric] = fit.cost(space.options())

    def _within_cost(self, found: Found, on_cost: Sequence[Bound]) -> None:
        """Measures the shapes of least damage within bounds on costs."""
        space, limits = found.space, {bound.metric: bound.limit for bound in on_cost}
        for _ in range(ROUNDS if found.fits else 1):
            bounded = [(Bound(bound.metric, limits[bound.metric]), found.costs[bound.metric]) for bound in on_cost]
            kept = shape_search.within(bounded, space.shape)
            if not kept.any():
                found.why_none = None if found.candidates else shape_search.nearest(bounded, space)
                return
            taken = [one.counts for one in found.candidates]
            asked = shape_search.best_apart(space, kept, self.settings.shapes, taken)
            if not asked:
                return
            measured = self._measure(found, asked)
            if any(hold(on_cost, one.metrics) for one in measured):
                return
            for metric in found.fits:  # the least that one of them was above what was predicted
                above = [one.metrics[metric] / one.costs[metric] for one in measured if metric in one.metrics]
                limits[metric] /= max(1.02, min(above, default=1.02))

    def _least_cost(self, found: Found) -> None:
        """Bisects the front of cost over damage for the cheapest shape that keeps to bounds on quality alone."""
        shapes = shape_search.front(found.space, found.costs[self.settings.best])
        good, bad = -1, len(shapes)  # the first is the dense model
        kl = next((bound.limit for bound in self.bounds if bound.metric in ("quality/kl", KL)), None)
        damage = [float(found.space.damage[found.space.place_of(counts)]) for counts in shapes]
        at = sum(value <= kl for value in damage) - 1 if kl is not None else len(shapes) // 2
        for _ in range(self.settings.shapes + 2):
            at = min(max(at, good + 1), bad - 1)
            if bad - good <= 1:
                return
            (one,) = self._measure(found, [shapes[at]])
            if hold(self.bounds, one.metrics):
                good = at
            else:
                bad = at
            at = (good + bad) // 2

    def _measure(self, found: Found, shapes: Sequence[Counts]) -> list[Candidate]:
        """Cuts, refits and measures shapes, and notes them as candidates."""
        space = found.space
        # The winner is chosen before any recovery, which a bound on quality alone makes a difference to.
        on_quality = any(bound.on_quality and bound.metric != KL for bound in self.bounds)
        beside = [f"method.held_out={self.settings.held_out}"]
        beside += self._without(*(() if on_quality else ("recovery",)), *self._export)
        summaries = self._run([[*self._overrides(counts), *beside] for counts in shapes])
        measured = []
        for counts, summary in zip(shapes, summaries, strict=True):
            place = space.place_of(counts)
            costs = {name: float(_at(values, space, place)) for name, values in found.costs.items()}
            measured.append(Candidate(counts, float(space.damage[place]), costs, summary))
        found.candidates += measured
        return measured

    def _overrides(self, counts: Counts) -> list[str]:
        shape = [f"method.{axis}={count}" for axis, count in counts.items() if count < self._totals[axis]]
        return ["method=shape", *shape]

    def _bounds_of_final(self) -> list[str]:
        """Bounds of the run of the winner, which holds no windows out that shape/kl could be measured on."""
        left = [f"{bound.metric}<={bound.limit!r}" for bound in self.bounds if bound.metric != KL]
        return [f"bound={json.dumps(left)}"] if len(left) < len(self.bounds) else []

    @property
    def _export(self) -> tuple[str, ...]:
        """The group of the export, where runs that are compared need none: neither an engine nor a bound reads it."""
        on_file = any(name == "size/disk_mb" for name in (*(b.metric for b in self.bounds), self.settings.best))
        is_read = self.settings.runs_export or (on_file and not self.settings.stored_as_is)
        return () if is_read else ("export",)

    def _without(self, *groups: str) -> list[str]:
        return [f"{group}=none" for group in groups if group in self.settings.left_out]


def _fitted(metric: str, done: Sequence[tuple[Counts, Mapping[str, float]]], dense: Counts) -> cost_fit.CostFit:
    """The fit of a cost to measured shapes, and to the dense model, where each run measured it beside the shape.

    What slows both of a pair down is no part of a shape: a run counts by its ratio to the dense model's figure.
    """
    shapes, values = [counts for counts, _ in done], [measured[metric] for _, measured in done]
    if all(dense_name(metric) in measured for _, measured in done):
        of_dense = [measured[dense_name(metric)] for _, measured in done]
        middle = statistics.median(of_dense)
        values = [value / beside * middle for value, beside in zip(values, of_dense, strict=True)]
        shapes, values = [*shapes, dense], [*values, middle]
    return cost_fit.fit(shapes, values, dense)


def _at(values: Values, space: Space, place: tuple[int, ...]) -> Any:
    return numpy.broadcast_to(values, space.shape)[place]


def _nearest_measured(found: Found) -> str:
    """Words on candidates of which none keeps to the bounds: how near to each one came."""
    done = [one for one in found.candidates if one.metrics]
    if not done:
        reasons = [one.summary.reason for one in found.candidates]
        return f"no candidate finished: {reasons[0]}" if reasons else "nothing was measured"
    nearest = []
    for bound in found.bounds:
        near = min(done, key=lambda one: one.metrics.get(bound.metric, math.inf))
        if bound.metric not in near.metrics:
            nearest.append(f"the runs do not measure {bound.metric}")
        elif not bound.holds(near.metrics):
            least, at = number(near.metrics[bound.metric]), shown(near.counts, found.space.dense)
            nearest.append(f"the least {bound.metric} that was measured is {least}, at {at}")
    return "; ".join(nearest) or "none that was measured keeps to all bounds at once, though one keeps to each"


def shown(counts: Counts, totals: Counts, prefix: str = "") -> str:
    """The counts of a shape in which it differs from the dense model."""
    return " ".join(f"{prefix}{axis}={count}" for axis, count in counts.items() if count < totals[axis]) or "dense"
