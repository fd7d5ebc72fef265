"""The size/quality plot of a sweep, and which points lie on its front."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

QUALITY = "quality/perplexity"
SIZES = {"params/nonzero": "non-zero parameters (millions)", "size/disk_mb": "bytes on disk (MB)"}
_UNIT = {"params/nonzero": 1e6, "size/disk_mb": 1.0}


@dataclass(frozen=True)
class Point:
    """A run on the plot."""

    job: str
    method: str
    metrics: dict[str, float]


def front(points: list[Point], size: str) -> list[Point]:
    """The points that no other beats in both size and perplexity, by size."""
    best, chosen = float("inf"), []
    for point in sorted(points, key=lambda p: (p.metrics[size], p.metrics[QUALITY])):
        if point.metrics[QUALITY] < best:
            best = point.metrics[QUALITY]
            chosen.append(point)
    return chosen


def draw(points: list[Point], dense: list[Point], path: Path) -> None:
    """Draws perplexity against both sizes side by side, since zeros shrink the first and not the second."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    for panel, (size, label) in zip(panels, SIZES.items(), strict=True):
        unit = _UNIT[size]
        for method in sorted({point.method for point in points}):
            line = sorted((p for p in points if p.method == method), key=lambda p: p.metrics["params/nonzero"])
            panel.plot(
                [p.metrics[size] / unit for p in line], [p.metrics[QUALITY] for p in line], "o-", label=method
            )  # fmt: skip
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
    panels[0].legend()
    half = path.with_name(f".{path.name}")
    figure.savefig(half, dpi=130, format="png")
    pyplot.close(figure)
    half.replace(path)
