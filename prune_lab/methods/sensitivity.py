"""method=sensitivity: measures what pruning each block alone would cost, and removes nothing."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from prune_lab.methods.base import Method, Pruned
from prune_lab.methods.structured import KINDS, Structured
from prune_lab.methods.unstructured import Unstructured
from prune_lab.models.anatomy import Anatomy
from prune_lab.models.blocks import bypassed
from prune_lab.pruning.calibration import Calibrator
from prune_lab.pruning.heat_map import draw
from prune_lab.pruning.scores import OF_UNITS, OF_WEIGHTS
from prune_lab.pruning.sensitivity import AMOUNTS, WINDOWS

SCORES = tuple(name for name in OF_WEIGHTS if name in OF_UNITS)
PARTS = ("weights", *KINDS, "block")


@dataclass(frozen=True)
class Sensitivity(Method):
    """A scan over blocks: the perplexity of calibration text when one block alone loses some of its parts.

    Leaves sensitivity.json, .md (a table) and .png (a heat-map) in the run's folder. Parts: single weights, MLP
    channels, KV groups (zeroed, by `score`), and the whole block.
    """

    parts: tuple[str, ...] = PARTS
    amounts: tuple[float, ...] = AMOUNTS
    score: str = "wanda"

    not_applicable: ClassVar[tuple[str, ...]] = ("amount",)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "parts", tuple(self.parts))
        object.__setattr__(self, "amounts", tuple(self.amounts))
        if not self.parts or set(self.parts) - set(PARTS) or len(set(self.parts)) != len(self.parts):
            raise ValueError(f"parts={list(self.parts)} must be some of {', '.join(PARTS)}")
        rising = list(self.amounts) == sorted(set(self.amounts)) and all(0 < amount < 1 for amount in self.amounts)
        if not self.amounts or not rising:
            raise ValueError(f"amounts={list(self.amounts)} must rise, each between 0 and 1")
        if self.score not in SCORES:
            raise ValueError(f"score={self.score!r} is none of {', '.join(SCORES)}")

    @property
    def calibrated(self) -> bool:
        """It measures on calibration text."""
        return True

    @torch.no_grad()
    def prune(self, anatomy: Anatomy, amount: float, seed: int, calibrator: Calibrator | None = None) -> Pruned:
        """Measures, and leaves the model as it was."""
        assert calibrator is not None
        dense = calibrator.loss(anatomy.model, WINDOWS)
        columns, rises = list[str](), [list[float]() for _ in anatomy.blocks]
        for part in self.parts:
            columns += [part] if part == "block" else [f"{part} {a:g}" for a in self.amounts]
            for of_block, found in zip(rises, self._scan(part, anatomy, seed, calibrator, dense), strict=True):
                of_block += found
        ratios = [[_perplexity(rise) for rise in of_block] for of_block in rises]
        table = {
            "what": "perplexity of calibration text, times the dense model's, when one block alone loses that much",
            "score": self.score,
            "windows": min(WINDOWS, len(calibrator.windows)),
            "dense_perplexity": _json(_perplexity(dense)),
            "columns": columns,
            "blocks": [[_json(ratio) for ratio in of_block] for of_block in ratios],
        }
        files = {
            "sensitivity.json": (json.dumps(table, indent=1) + "\n").encode(),
            "sensitivity.md": _markdown(columns, ratios).encode(),
            "sensitivity.png": draw(columns, ratios),
        }
        notes = ["nothing was removed: sensitivity.md and .png in the run's folder say what each block would cost"]
        return Pruned(notes=notes, files=files)

    def _scan(self, part: str, anatomy: Anatomy, seed: int, calibrator: Calibrator, dense: float) -> list[list[float]]:
        if part == "weights":
            return Unstructured(score=self.score).scan(anatomy, seed, calibrator, self.amounts)
        if part in KINDS:
            return Structured(units=(part,), score=self.score).scan(anatomy, part, self.amounts, seed, calibrator)
        found = []
        for index in range(len(anatomy.blocks)):
            with bypassed(anatomy, [index]):
                found.append([calibrator.loss(anatomy.model, WINDOWS) - dense])
        return found


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
