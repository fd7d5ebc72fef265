"""method=damage: measures what each axis of a model's shape costs at several steps, and removes nothing."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from prune_lab.errors import Refused
from prune_lab.methods.depth import Depth
from prune_lab.methods.experts import Experts
from prune_lab.methods.shape import AXES, EITHER, TITLES, UNITS, Shape, Ways, group_of, split, total_of
from prune_lab.methods.structured import Structured
from prune_lab.models.anatomy import HIDDEN
from prune_lab.pruning.pruned import Pruned

if TYPE_CHECKING:
    from prune_lab.models.anatomy import Anatomy
    from prune_lab.pruning.calibration import Calibrator

AMOUNTS = (0.05, 0.1, 0.2, 0.3, 0.45, 0.7)
FILE = "damage.json"
USUAL = tuple(axis for axis in AXES if axis != "query_heads")
# Source that the result depends on, beside that of dense_cache.SOURCE.
_SOURCE = tuple(f"prune_lab.methods.{name}" for name in ("damage", "shape", "depth", "structured", "experts"))


@dataclass(frozen=True)
class Damage(Ways):
    """Damage of each axis: the KL divergence on held-out calibration windows of the model cut along that axis alone.

    Leaves damage.json and .md in the run's folder: the counts of each axis that a stock config can hold, the damage at
    the counts nearest to `amounts`, and what shapes cost, which a search for a shape reads (sweeps/shape_search.py).
    Each step is kept as soon as it is measured. Channels and groups are cut by statistics of the dense model, which are
    collected once, of the first windows, up to `tokens`. Other blocks go at each count, so that between two counts the
    damage is not known: of blocks only the counts that were measured are possible. round_to: counts of MLP and hidden
    channels are multiples of it.
    """

    axes: tuple[str, ...] = USUAL
    amounts: tuple[float, ...] = AMOUNTS
    round_to: int = 32
    held_out: int = 8
    tokens: int = 16384

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "axes", tuple(self.axes))
        object.__setattr__(self, "amounts", tuple(self.amounts))
        if not self.axes or set(self.axes) - set(AXES) or len(set(self.axes)) != len(self.axes):
            raise ValueError(f"axes={list(self.axes)} must be one or more of {', '.join(AXES)}, each once")
        if set(EITHER) <= set(self.axes):
            raise ValueError("axes: of heads and query_heads one alone: a KV group goes with its query heads")
        rising = list(self.amounts) == sorted(set(self.amounts)) and all(0 < amount < 1 for amount in self.amounts)
        if not self.amounts or not rising:
            raise ValueError(f"amounts={list(self.amounts)} must rise, each between 0 and 1")
        if self.round_to < 1:
            raise ValueError(f"round_to={self.round_to} must be at least 1")
        if self.tokens < 1:
            raise ValueError(f"tokens={self.tokens} must be at least 1: tokens of the text that calibrates")
        if self.held_out < 1:
            raise ValueError(f"held_out={self.held_out} must be at least 1: calibration windows that damage is seen on")

    @property
    def calibrated(self) -> bool:
        """True: it measures on calibration text."""
        return True

    def forward_passes(self, blocks: int) -> float:
        """Time of the statistics, and of the steps, each of which reads the held-out windows."""
        return 1.5 + 0.5 * len(self.axes) * len(self.amounts)

    def prune(self, anatomy: Anatomy, amount: float, seed: int, calibrator: Calibrator | None = None) -> Pruned:
        """Measures, and leaves the model as it was."""
        from prune_lab.pruning.shape_costs import costs_of_corners

        assert calibrator is not None
        totals, possible, left_out = self._counts(anatomy)
        steps = {axis: self._steps(totals[axis], counts) for axis, counts in possible.items()}
        left_out |= {
            axis: f"a stock config holds no other number of {TITLES[axis]} than {totals[axis]} near those asked for"
            for axis, counts in steps.items()
            if not counts
        }
        steps = {axis: counts for axis, counts in steps.items() if counts}
        if not steps:
            raise Refused(f"method=damage: no axis of the model can be cut: {'; '.join(left_out.values())}")
        damage = self._measure(anatomy, steps, seed, calibrator)
        corners = {axis: (counts[-1], totals[axis]) for axis, counts in steps.items()}
        groups = {axis: axis if axis == "blocks" else group_of(anatomy, axis) for axis in steps}
        of_costs = {"corners": corners, "groups": groups}
        costs = calibrator.remember(
            anatomy, "shape_costs", of_costs, lambda: costs_of_corners(anatomy, corners, groups), _SOURCE
        )
        found = {
            "what": "KL divergence in nats from the dense model when it is cut along one axis alone",
            "held_out_windows": self.held_out,
            "axes": {
                axis: {
                    "total": totals[axis],
                    "possible": counts if axis == "blocks" else [n for n in possible[axis] if n >= counts[-1]],
                    "counts": counts,
                    "kl": damage[axis],
                }
                for axis, counts in steps.items()
            },
            "left_out": left_out,
            "costs": costs,
        }
        files = {FILE: (json.dumps(found, indent=1) + "\n").encode(), "damage.md": _markdown(found).encode()}
        left = [f"{TITLES[axis]} stay as they are: {why}" for axis, why in left_out.items()]
        warning = "nothing was removed: damage.md in the run's folder says what each axis costs"
        return Pruned(warnings=[warning, *left], files=files)

    def _counts(self, anatomy: Anatomy) -> tuple[dict[str, int], dict[str, list[int]], dict[str, str]]:
        """Total of each axis, the counts below it that can be held, descending; and why others are left out."""
        totals, possible, left_out = dict[str, int](), dict[str, list[int]](), dict[str, str]()
        for axis in (axis for axis in AXES if axis in self.axes):
            try:
                total = total_of(anatomy, axis)
                counts = self._possible(anatomy, axis, total)
            except Refused as error:
                left_out[axis] = str(error)
                continue
            if not counts:
                left_out[axis] = f"a stock config holds no other number of {TITLES[axis]} than {total}"
                continue
            totals[axis], possible[axis] = total, counts
        return totals, possible, left_out

    def _possible(self, anatomy: Anatomy, axis: str, total: int) -> list[int]:
        step = self.round_to if axis in ("mlp", HIDDEN) else 1
        counts = [count for count in range(total - 1, 0, -1) if count % step == 0]
        if axis in (*UNITS, HIDDEN):
            group = group_of(anatomy, axis)
            return [count for count in counts if anatomy.can_hold(group, count)]
        why, found = None, list[int]()
        for count in counts:
            try:
                self.method_of(axis).check_model(anatomy, [1 - count / total])
            except Refused as error:
                why = error
                continue
            found.append(count)
        if not found and why is not None:
            raise why
        return found

    def _steps(self, total: int, possible: list[int]) -> list[int]:
        """The possible counts that are nearest to those after each amount, descending."""
        nearest = {min(possible, key=lambda n: (abs(n - total * (1 - amount)), n)) for amount in self.amounts}
        return sorted(nearest, reverse=True)

    def _measure(
        self, anatomy: Anatomy, steps: dict[str, list[int]], seed: int, calibrator: Calibrator
    ) -> dict[str, list[float]]:
        """Damage of each step of each axis."""
        from prune_lab.pruning.block_importance import divergence_from

        own, held_out = split(calibrator, self.held_out)
        windows = max(1, self.tokens // own.windows.shape[1])
        own = replace(own, windows=own.windows[:windows], propagate="dense")
        divergence: list[Callable[[Any], float]] = []

        def damage(axis: str, count: int) -> float:
            divergence[:] = divergence or [divergence_from(anatomy, held_out)]
            cut = copy.deepcopy(anatomy.model)
            shape: dict[str, Any] = {**_ways(self), axis: count}
            Shape(**shape).prune(_like(anatomy, cut), 0.0, seed, own)
            return divergence[0](cut)

        found = dict[str, list[float]]()
        with calibrator.console.progress(sum(map(len, steps.values())), "damage", unit="shape") as bar:
            for axis, counts in steps.items():
                found[axis] = []
                for count in counts:
                    of = {"axis": axis, "count": count, "held_out": self.held_out, "seed": seed} | self._way_of(axis)
                    step = partial(damage, axis, count)
                    found[axis].append(calibrator.remember(anatomy, "damage", of, step, _SOURCE))
                    bar.update()
        return found

    def _way_of(self, axis: str) -> dict[str, Any]:
        """Keys that the result of an axis depends on."""
        way = self.method_of(axis)
        assert isinstance(way, Depth | Structured | Experts)
        return {"way": {**asdict(way), "refit of blocks": self.blocks_refit}, "tokens": self.tokens}


def _ways(method: Ways) -> dict[str, Any]:
    """The keys of Ways."""
    return {field.name: getattr(method, field.name) for field in fields(Ways)}


def _like(anatomy: Anatomy, model: Any) -> Anatomy:
    """Another model as an anatomy with the same dense results."""
    return type(anatomy)(model, anatomy.dense_cache)


def _markdown(found: dict[str, Any]) -> str:
    lines = ["| axis | stay | of | KL |", "| --- | ---: | ---: | ---: |"]
    for axis, of_axis in found["axes"].items():
        pairs = zip(of_axis["counts"], of_axis["kl"], strict=True)
        lines += [f"| {TITLES[axis]} | {count} | {of_axis['total']} | {kl:.4g} |" for count, kl in pairs]
    lines += [""] * bool(found["left_out"])
    lines += [f"{TITLES[axis]} stay as they are: {why}" for axis, why in found["left_out"].items()]
    return "\n".join(lines) + "\n"
