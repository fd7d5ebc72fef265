"""The picture of a sensitivity scan."""

from __future__ import annotations

import io

import numpy


def draw(columns: list[str], ratios: list[list[float]]) -> bytes:
    """A PNG: blocks down, what each loses across, colour and text the factor on perplexity (log scale)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.colors import LogNorm

    values = numpy.clip(numpy.array(ratios, dtype=float), 1e-3, 1e6)
    size = (2 + 0.62 * len(columns), 1.8 + 0.42 * len(ratios))
    figure, axes = pyplot.subplots(figsize=size, layout="constrained")
    norm = LogNorm(1.0, max(1.1, float(values.max())))
    image = axes.imshow(numpy.maximum(values, 1.0), norm=norm, cmap="YlOrRd", aspect="auto")
    middle = float(norm.vmax or 1.1) ** 0.6
    for row, of_block in enumerate(ratios):
        for column, ratio in enumerate(of_block):
            ink = "white" if ratio > middle else "black"
            axes.text(column, row, f"{ratio:.3g}", ha="center", va="center", fontsize=7, color=ink)
    axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right", fontsize=8)
    axes.set_yticks(range(len(ratios)), [str(index) for index in range(len(ratios))])
    axes.set_ylabel("block")
    figure.colorbar(image, label="perplexity x dense")
    file = io.BytesIO()
    figure.savefig(file, dpi=130, format="png")
    pyplot.close(figure)
    return file.getvalue()
