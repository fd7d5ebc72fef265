"""What a scan over blocks leaves in a run's folder: its figures, a table, a heat-map."""

from __future__ import annotations

import json
import math

from prune_lab.pruning.heat_map import draw


def files_of(columns: list[str], rises: list[list[float]], score: str, windows: int, dense: float) -> dict[str, bytes]:
    """sensitivity.json, .md and .png, by name.

    rises[block][i]: rise of the loss in nats for columns[i]; dense: the loss of the model as it is, over `windows`.
    """
    ratios = [[_perplexity(rise) for rise in of_block] for of_block in rises]
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
        "sensitivity.png": draw(columns, ratios),
    }


def _perplexity(loss: float) -> float:
    """exp(loss); infinite where the model diverged, which is said and does not end the scan."""
    return math.exp(loss) if loss < 700 else math.inf


def _json(value: float) -> float | str:
    """JSON has no infinity."""
    return value if math.isfinite(value) else "inf"


def _markdown(columns: list[str], ratios: list[list[float]]) -> str:
    lines = ["| block | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {index} | " + " | ".join(f"{r:.4g}" for r in row) + " |" for index, row in enumerate(ratios)]
    return "\n".join(lines) + "\n"
