"""Report of a sensitivity analysis in the run's folder: its figures as JSON, a table in Markdown, a heat map."""

from __future__ import annotations

import io
import json
import math

import numpy


def files_of(
    columns: list[str], increases: list[list[float]], score: str, windows: int, dense: float
) -> dict[str, bytes]:
    """sensitivity.json, .md and .png, by name.

    increases[block][i]: loss increase in nats for columns[i]; dense: the loss of the model as it is, over `windows`.
    """
    ratios = [[_perplexity(increase) for increase in of_block] for of_block in increases]
    table = {
        "what": "perplexity of calibration text, times the dense model's, when one block alone loses that much",
        "score": score,
        "windows": windows,
        "dense_perplexity": _json(_perplexity(dense)),
        "columns": columns,
        "blocks": [[_json(ratio) for ratio in of_block] for of_block in ratios],
    }
    return {
        "sensitivity.json": (json.dumps(table, indent=1) + "\n").encode(),
        "sensitivity.md": _markdown(columns, ratios).encode(),
        "sensitivity.png": _heat_map(columns, ratios),
    }


def _perplexity(loss: float) -> float:
    """exp(loss); infinite where the model diverged, which is reported and does not end the analysis."""
    return math.exp(loss) if loss < 700 else math.inf


def _json(value: float) -> float | str:
    """JSON has no infinity."""
    return value if math.isfinite(value) else "inf"


def _markdown(columns: list[str], ratios: list[list[float]]) -> str:
    lines = ["| block | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {index} | " + " | ".join(f"{r:.4g}" for r in row) + " |" for index, row in enumerate(ratios)]
    return "\n".join(lines) + "\n"


def _heat_map(columns: list[str], ratios: list[list[float]]) -> bytes:
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
