"""Search for the shape of least damage within bounds, over all shapes that a stock config can hold. Pure.

The damage of a shape is taken to be the sum of those of its axes, each between measured steps in proportion. What it
costs follows from its shape, or from a model fitted to a few measured shapes (cost_fit.py). With both known for every
shape, the best one is found by looking at all of them: the axes of a stock config are a few whole numbers.
hydra/sweeper=budget runs what is proposed here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy
from numpy.typing import NDArray

from prune_lab.results.bounds import Bound, number

Values = NDArray[numpy.float64]
Counts = dict[str, int]  # of what stays, by axis

LIMIT = 20_000_000  # shapes that are looked at
APART = 0.04  # of an axis: candidates that differ less along every axis are taken for one


@dataclass(frozen=True)
class Axis:
    """An axis: the number there is, those that can stay, and the damage in nats of those where it was measured."""

    name: str
    total: int
    possible: tuple[int, ...]  # descending, without the total
    counts: tuple[int, ...]  # descending
    kl: tuple[float, ...]

    @property
    def options(self) -> Values:
        """The numbers that can stay, all of them first."""
        return numpy.array([self.total, *self.possible], dtype=float)

    @cached_property
    def damage(self) -> Values:
        """Damage of each option: between steps in proportion, nowhere less than after a smaller cut."""
        gone = [0.0, *(self.total - count for count in self.counts)]
        steps = numpy.maximum.accumulate([0.0, *(value if math.isfinite(value) else math.inf for value in self.kl)])
        found: Values = numpy.interp(self.total - self.options, gone, numpy.minimum(steps, 1e6))
        return found


@dataclass(frozen=True)
class Space:
    """All shapes along some axes, as a grid whose dimensions are the axes, and costs that follow from a shape.

    corners: values of the costs where each axis is at one of two counts.
    """

    axes: tuple[Axis, ...]
    corners: tuple[tuple[Counts, dict[str, float]], ...]

    def __post_init__(self) -> None:
        if (size := math.prod(len(axis.options) for axis in self.axes)) > LIMIT:
            raise ValueError(
                f"{size:,} shapes are too many to look at: give a larger hydra.sweeper.round_to, or fewer "
                "hydra.sweeper.axes"
            )

    @classmethod
    def read(cls, found: Mapping[str, Any]) -> Space:
        """The space of what method=damage left."""
        axes = tuple(
            Axis(name, of["total"], tuple(of["possible"]), tuple(of["counts"]), tuple(of["kl"]))
            for name, of in found["axes"].items()
        )
        return cls(axes, tuple((corner["counts"], corner["costs"]) for corner in found["costs"]))

    @property
    def names(self) -> list[str]:
        """Names of the axes."""
        return [axis.name for axis in self.axes]

    @property
    def exact(self) -> set[str]:
        """Metrics that follow from a shape."""
        return set(self.corners[0][1])

    @cached_property
    def damage(self) -> Values:
        """Damage of every shape."""
        found: Values = sum(self._along(number, axis.damage) for number, axis in enumerate(self.axes))  # type: ignore[assignment]
        return numpy.broadcast_to(found, self.shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of options of each axis."""
        return tuple(len(axis.options) for axis in self.axes)

    def options(self) -> dict[str, Values]:
        """Counts of every shape by axis, to be broadcast."""
        return {axis.name: self._along(number, axis.options) for number, axis in enumerate(self.axes)}

    def _along(self, number: int, values: Values) -> Values:
        return values.reshape([-1 if place == number else 1 for place in range(len(self.axes))])

    def cost(self, metric: str, counts: Mapping[str, Any] | None = None) -> Values:
        """An exact cost of every shape, or of that with these counts: affine in each count while the others stay."""
        of_shapes, total = counts if counts is not None else self.options(), numpy.zeros(())
        low = {axis.name: min(corner[axis.name] for corner, _ in self.corners) for axis in self.axes}
        high = {axis.name: axis.total for axis in self.axes}
        for corner, values in self.corners:
            share: Any = values[metric]
            for name, count in corner.items():
                at = (of_shapes[name] - low[name]) / (high[name] - low[name])
                share = share * (at if count == high[name] else 1 - at)
            total = total + share
        return numpy.round(numpy.asarray(total, dtype=float), 6)  # whole numbers stay whole

    def counts_at(self, place: Sequence[int]) -> Counts:
        """Counts of the shape at a place of the grid."""
        return {axis.name: int(axis.options[at]) for axis, at in zip(self.axes, place, strict=True)}

    def place_of(self, counts: Mapping[str, int]) -> tuple[int, ...]:
        """The place of a shape in the grid."""
        return tuple(int(numpy.flatnonzero(axis.options == counts[axis.name])[0]) for axis in self.axes)

    @property
    def dense(self) -> Counts:
        """Counts of the dense model."""
        return {axis.name: axis.total for axis in self.axes}

    def steps(self) -> list[Counts]:
        """Shapes for a cost model to be fitted to: each axis cut alone and all others, in part and together."""
        half = {axis.name: int(axis.options[len(axis.options) // 2]) for axis in self.axes}
        least = {axis.name: int(axis.options[-1]) for axis in self.axes}
        found = [self.dense | {name: least[name]} for name in self.names]
        found += [half, *(half | {name: self.dense[name]} for name in self.names)]
        found += [least]
        return [dict(counts) for counts in dict.fromkeys(tuple(counts.items()) for counts in found)]


def within(bounds: Iterable[tuple[Bound, Values]], shape: tuple[int, ...]) -> NDArray[numpy.bool_]:
    """The shapes whose costs keep to all bounds."""
    kept = numpy.ones(shape, dtype=bool)
    for bound, cost in bounds:
        # What is equal to the limit but for rounding keeps to it.
        kept &= numpy.broadcast_to(cost <= bound.limit * (1 + 1e-9), shape)
    return kept


def nearest(bounds: Iterable[tuple[Bound, Values]], space: Space) -> str:
    """Words on bounds that no shape keeps to: the shape that comes nearest to each."""
    found = []
    for bound, cost in bounds:
        costs = numpy.broadcast_to(cost, space.shape)
        place = numpy.unravel_index(int(costs.argmin()), space.shape)
        least = float(costs[place])
        at = " ".join(f"{name}={count}" for name, count in space.counts_at([int(p) for p in place]).items())
        if least > bound.limit:
            found.append(f"the least {bound.metric} of all shapes that were looked at is {number(least)}, at {at}")
    return "; ".join(found) or "no shape keeps to all bounds at once, though one keeps to each"


def best_apart(space: Space, kept: NDArray[numpy.bool_], count: int, taken: Iterable[Counts] = ()) -> list[Counts]:
    """The shapes of least damage among those kept, up to `count`, each apart from the others and from those taken."""
    flat = numpy.flatnonzero(kept)
    order = flat[numpy.argsort(space.damage.ravel()[flat], kind="stable")]
    chosen, found = list(taken), list[Counts]()
    for start in range(0, len(order), 4096):
        for place in order[start : start + 4096]:
            counts = space.counts_at([int(p) for p in numpy.unravel_index(int(place), space.shape)])
            if all(_are_apart(space, counts, other) for other in chosen):
                chosen.append(counts)
                found.append(counts)
                if len(found) == count:
                    return found
    return found


def _are_apart(space: Space, counts: Counts, other: Counts) -> bool:
    """True where two shapes differ by APART of an axis, or by one of it where that is more."""
    return any(abs(counts[a.name] - other[a.name]) >= max(1, APART * a.total) for a in space.axes)


def front(space: Space, cost: Values) -> list[Counts]:
    """Shapes than which none costs less and does less damage, from the dearest, which does none, to the cheapest."""
    costs, damage = numpy.broadcast_to(cost, space.shape).ravel(), space.damage.ravel()
    order = numpy.lexsort((damage, costs))
    least = numpy.minimum.accumulate(damage[order])
    is_less = numpy.concatenate([[True], least[1:] < least[:-1]])
    found = order[is_less].tolist()
    return [space.counts_at([int(p) for p in numpy.unravel_index(place, space.shape)]) for place in reversed(found)]


def marginal(space: Space, cost: Values) -> list[tuple[str, list[float], list[float]]]:
    """By axis: how much of a cost the first steps save, and the damage of each of them, each axis cut alone."""
    found = []
    costs = numpy.broadcast_to(cost, space.shape)
    for place, axis in enumerate(space.axes):
        index = [0] * len(space.axes)
        saved, damage = [], []
        for option in range(len(axis.options)):
            index[place] = option
            saved.append(float(costs[(0,) * len(index)] - costs[tuple(index)]))
            damage.append(float(axis.damage[option]))
        found.append((axis.name, saved, damage))
    return found
