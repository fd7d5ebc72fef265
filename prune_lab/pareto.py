"""The size/quality plot of a sweep, and which points lie on its front."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from statistics import mean

from prune_lab.series import Position

QUALITY = "quality/perplexity"
SIZES = {"params/nonzero": "non-zero parameters (millions)", "size/disk_mb": "bytes on disk (MB)"}
_UNIT = {"params/nonzero": 1e6, "size/disk_mb": 1.0}


@dataclass(frozen=True)
class Point:
    """A run on the plot."""

    job: str
    position: Position
    metrics: dict[str, float]


def front(points: list[Point], size: str) -> list[Point]:
    """The points that no other beats in both size and perplexity, by size."""
    best, chosen = float("inf"), []
    for point in sorted(points, key=lambda p: (p.metrics[size], p.metrics[QUALITY])):
        if point.metrics[QUALITY] < best:
            best = point.metrics[QUALITY]
            chosen.append(point)
    return chosen


def _lines(points: list[Point]) -> dict[str, list[Point]]:
    """The points of each line by its label: a series; its N:M patterns are a line of their own."""
    lines: dict[str, list[Point]] = {}
    for point in points:
        label = point.position.series + (" N:M" if ":" in point.position.step else "")
        lines.setdefault(label, []).append(point)
    return lines


def draw(points: list[Point], dense: list[Point], path: Path) -> None:
    """Draws perplexity against both sizes side by side, since zeros shrink the first and not the second."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    many = len(_lines(points)) > 10
    colours = [pyplot.get_cmap("tab20" if many else "tab10")(index) for index in range(20 if many else 10)]
    for panel, (size, label) in zip(panels, SIZES.items(), strict=True):
        unit = _UNIT[size]
        for colour, (series, runs) in zip(cycle(colours), sorted(_lines(points).items()), strict=False):
            x, y = [p.metrics[size] / unit for p in runs], [p.metrics[QUALITY] for p in runs]
            panel.plot(x, y, "o", color=colour, markersize=4)
            steps = sorted({(value, round(mean(b for a, b in zip(x, y, strict=True) if a == value), 9)) for value in x})
            panel.plot([a for a, _ in steps], [b for _, b in steps], "-", color=colour, label=series)
        for point in dense:
            panel.plot(point.metrics[size] / unit, point.metrics[QUALITY], "k*", markersize=13, label="dense")
        marked = front(points + dense, size)
        panel.step(
            [p.metrics[size] / unit for p in marked], [p.metrics[QUALITY] for p in marked], where="post",
            color="0.6", linestyle=":", label="front", zorder=0,
        )  # fmt: skip
        panel.set_xlabel(label)
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        panel.yaxis.set_major_formatter(ScalarFormatter())
        panel.yaxis.set_minor_formatter(NullFormatter())
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("perplexity (log scale, lower is better)")
    handles, labels = panels[0].get_legend_handles_labels()
    if len(labels) <= 6:
        panels[0].legend()
    else:
        figure.legend(handles, labels, loc="outside right upper", fontsize="small")
    half = path.with_name(f".{path.name}")
    figure.savefig(half, dpi=130, format="png")
    pyplot.close(figure)
    half.replace(path)
