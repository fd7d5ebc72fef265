"""The plot of a sweep: its points, the lines they lie on, and which of them are on the front."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from textwrap import fill
from typing import Any

from prune_lab.results.metrics import Axis, axis, dense_figures, of_dense
from prune_lab.results.series import Position, place_on_line
from prune_lab.system.files import atomic_write

QUALITY = "quality/perplexity"
SIZES = ("params/nonzero", "size/disk_mb")


@dataclass(frozen=True)
class Point:
    """A run on the plot."""

    job: str
    position: Position
    metrics: dict[str, float]


def front(points: list[Point], x: str, y: str = QUALITY) -> list[Point]:
    """The points that no other beats in both metrics, the best in x first.

    Points that lack one of the two are left out. Empty where nobody said which direction of a metric is better.
    """
    cost = {"lower": 1.0, "higher": -1.0}
    to_x, to_y = axis(x).better, axis(y).better
    if to_x is None or to_y is None:
        return []
    costs = [
        (cost[to_x] * p.metrics[x], cost[to_y] * p.metrics[y], p) for p in points if x in p.metrics and y in p.metrics
    ]
    best, chosen = float("inf"), []
    for _, of_y, point in sorted(costs, key=lambda entry: entry[:2]):
        if of_y < best:
            best = of_y
            chosen.append(point)
    return chosen


def lines(points: list[Point]) -> dict[str, list[Point]]:
    """The points of each line by its label: a series; its N:M patterns are a line of their own."""
    found: dict[str, list[Point]] = {}
    for point in points:
        label = point.position.series + (" N:M" if ":" in point.position.step else "")
        found.setdefault(label, []).append(point)
    return dict(sorted(found.items()))


def steps(points: list[Point]) -> list[list[Point]]:
    """The points of a line by their step, in the order of the steps: several seeds share one."""
    found: dict[str, list[Point]] = {}
    for point in points:
        found.setdefault(point.position.step, []).append(point)
    return [found[step] for step in sorted(found, key=place_on_line)]


def dense_points(points: list[Point]) -> list[Point]:
    """The dense models that the points were made from, each once.

    What was measured beside each run (latency, memory in several sweeps) is the median over its runs.
    """
    found: dict[tuple[str, ...], list[dict[str, float]]] = {}
    for point in points:
        if dense := dense_figures(point.metrics):
            model = {name: value for name, value in dense.items() if name.startswith(("quality/", "params/", "size/"))}
            key = tuple(f"{name} {value:.6g}" for name, value in sorted(model.items()))
            found.setdefault(key, []).append(of_dense(point.metrics))
    return [Point("dense", Position("dense", ""), _medians(figures)) for figures in found.values()]


def _medians(figures: list[dict[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for each in figures for name in each)
    return {name: median(each[name] for each in figures if name in each) for name in names}


def draw(
    points: list[Point],
    dense: list[Point],
    path: Path,
    pairs: list[tuple[str, str]] | None = None,
    caption: str = "",
) -> None:
    """Draws a panel for each pair of metrics, x and y, side by side, and writes a PNG.

    Without pairs: perplexity against both sizes, since zeros shrink the first and not the second.
    """
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # without a home it keeps its fonts nowhere, and says so
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pairs = pairs or [(size, QUALITY) for size in SIZES]
    shared_y, few = len({y for _, y in pairs}) == 1, len(lines(points)) <= 4
    width = 5.5 * len(pairs) if len(pairs) > 1 else 7.5 if few else 10
    figure, row = pyplot.subplots(
        1, len(pairs), figsize=(width, 4.5), sharey=shared_y, layout="constrained", squeeze=False
    )
    for number, (panel, (x, y)) in enumerate(zip(row[0], pairs, strict=True)):
        _draw_panel(panel, points, dense, axis(x), axis(y))
        if shared_y and number:
            panel.set_ylabel("")
    handles, labels = row[0][0].get_legend_handles_labels()
    legend = dict(zip(labels, handles, strict=True))  # several dense models are one entry
    if few:
        row[0][0].legend(legend.values(), legend.keys())
    else:
        figure.legend(legend.values(), legend.keys(), loc="outside right upper", fontsize="small")
    if caption:
        figure.supxlabel(_plain(fill(caption, int(width * 14))), fontsize="small", color="0.3")
    with atomic_write(path) as half:
        figure.savefig(half, dpi=130, format="png")
    pyplot.close(figure)


def _plain(text: str) -> str:
    """Text in which matplotlib sees no formula."""
    return text.replace("$", r"\$")


def _draw_panel(panel: Any, points: list[Point], dense: list[Point], x: Axis, y: Axis) -> None:
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    def places(group: list[Point]) -> tuple[list[float], list[float]]:
        return [p.metrics[x.metric] / x.unit for p in group], [p.metrics[y.metric] / y.unit for p in group]

    def with_both(group: list[Point]) -> list[Point]:
        return [p for p in group if x.metric in p.metrics and y.metric in p.metrics]

    drawn = lines(points)  # a series keeps its colour where a panel lacks some of its points
    palette = pyplot.get_cmap("tab20" if len(drawn) > 10 else "tab10")
    for number, (series, runs) in enumerate(drawn.items()):
        colour = palette(number % palette.N)
        panel.plot(*places(with_both(runs)), "o", color=colour, markersize=4)
        middles = [(mean(a), mean(b)) for a, b in map(places, steps(with_both(runs)))]
        panel.plot([a for a, _ in middles], [b for _, b in middles], "-", color=colour, label=_plain(fill(series, 44)))
    for point in with_both(dense):
        panel.plot(*places([point]), "k*", markersize=13, label="dense")
    on_front = places(sorted(front(points + dense, x.metric, y.metric), key=lambda p: p.metrics[x.metric]))
    where = "post" if x.better == "lower" else "pre"  # what is at least as good in x reaches this far in y
    panel.step(*on_front, where=where, color="0.6", linestyle=":", label="front", zorder=0)
    panel.set_xlabel(x.title)
    panel.set_ylabel(y.title + (" (log scale)" if y.logarithmic else ""))
    if y.logarithmic:
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        panel.yaxis.set_major_formatter(ScalarFormatter())
        panel.yaxis.set_minor_formatter(NullFormatter())
    panel.grid(alpha=0.3)
