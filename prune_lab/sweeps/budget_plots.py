"""Plots of a search within bounds: the front of cost over damage, and what each axis gives."""

from __future__ import annotations

from pathlib import Path

import numpy

from prune_lab.methods.shape import TITLES
from prune_lab.results.metrics import axis as axis_of
from prune_lab.sweeps import shape_search
from prune_lab.sweeps.budget import Found

FRONT, AXES = "budget_front.png", "budget_axes.png"
_POINTS = 400  # of a front that has more


def draw(found: Found, folder: Path) -> None:
    """Draws both plots, a panel for each cost that was looked at."""
    import matplotlib

    matplotlib.use("Agg")
    _draw_front(found, folder / FRONT)
    _draw_axes(found, folder / AXES)


def _draw_front(found: Found, path: Path) -> None:
    """Predicted damage of the best shape over its cost, the bound, and the shapes that were measured."""
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(found.costs), figsize=(6.4 * len(found.costs), 4.4), squeeze=False)
    for panel, (metric, costs) in zip(panels[0], found.costs.items(), strict=True):
        of = axis_of(metric)
        shapes = shape_search.front(found.space, costs)
        shapes = shapes[:: max(1, len(shapes) // _POINTS)]
        places = [found.space.place_of(counts) for counts in shapes if counts != found.space.dense]
        whole = numpy.broadcast_to(costs, found.space.shape)
        panel.plot(
            [whole[place] / of.unit for place in places], [found.space.damage[place] for place in places],
            label="best shape, sum of its axes", color="tab:gray",
        )  # fmt: skip
        for name in found.space.names:
            saved, damage = _along(found, metric, name)
            panel.plot(saved, damage, linewidth=0.8, linestyle="--", label=f"{TITLES[name]} alone")
        done = [one for one in found.candidates if one.metrics.get(metric) is not None]
        panel.scatter(
            [one.metrics[metric] / of.unit for one in done], [one.kl for one in done],
            label="measured whole", color="tab:blue", zorder=3,
        )  # fmt: skip
        if found.winner is not None and metric in found.winner.metrics:
            panel.scatter(
                [found.winner.metrics[metric] / of.unit], [found.winner.kl], marker="*", s=160, color="tab:red",
                label="best", zorder=4,
            )  # fmt: skip
        for bound in found.bounds:
            if bound.metric == metric:
                panel.axvline(bound.limit / of.unit, color="black", linewidth=0.8, linestyle=":", label="bound")
        panel.set_xlabel(of.title)
        panel.set_ylabel("KL divergence on held-out windows (nats)")
        panel.set_yscale("log")
        panel.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _along(found: Found, metric: str, name: str) -> tuple[list[float], list[float]]:
    """Costs and damages along one axis."""
    space, unit = found.space, axis_of(metric).unit
    place = space.names.index(name)
    costs = numpy.broadcast_to(found.costs[metric], space.shape)
    line = costs[tuple(slice(None) if number == place else 0 for number in range(len(space.axes)))]
    # Without the dense model, whose damage of 0 has no place on a logarithmic axis.
    return [float(cost) / unit for cost in line[1:]], [float(value) for value in space.axes[place].damage[1:]]


def _draw_axes(found: Found, path: Path) -> None:
    """Damage of each axis over what it saves, each cut alone: the flatter, the cheaper."""
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(found.costs), figsize=(6.4 * len(found.costs), 4.4), squeeze=False)
    for panel, (metric, costs) in zip(panels[0], found.costs.items(), strict=True):
        unit = axis_of(metric).unit
        for name, saved, damage in shape_search.marginal(found.space, costs):
            panel.plot([value / unit for value in saved], damage, marker=".", label=TITLES[name])
        panel.set_xlabel(f"saved of {axis_of(metric).title.removesuffix(', lower is better')}")
        panel.set_ylabel("damage (nats), cut along this axis alone")
        panel.set_yscale("symlog", linthresh=0.01)
        panel.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
