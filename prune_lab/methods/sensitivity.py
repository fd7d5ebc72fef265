"""method=sensitivity: measures the loss increase of pruning each block alone, and removes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from prune_lab.methods.base import Method
from prune_lab.methods.structured import Structured
from prune_lab.methods.unstructured import Unstructured
from prune_lab.pruning.loss_increase import AMOUNTS, WINDOWS
from prune_lab.pruning.pruned import Pruned
from prune_lab.pruning.scores import OF_UNITS, OF_WEIGHTS

if TYPE_CHECKING:
    from prune_lab.models.anatomy import Anatomy
    from prune_lab.pruning.calibration import Calibrator

SCORES = tuple(name for name in OF_WEIGHTS if name in OF_UNITS)
PARTS = ("weights", "mlp", "heads", "block")


@dataclass(frozen=True)
class Sensitivity(Method):
    """Sensitivity analysis: the perplexity of calibration text when one block alone loses some of its parts.

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
            raise ValueError(f"score={self.score!r} is not one of {', '.join(SCORES)}")

    @property
    def calibrated(self) -> bool:
        """True: it measures on calibration text."""
        return True

    def prune(self, anatomy: Anatomy, amount: float, seed: int, calibrator: Calibrator | None = None) -> Pruned:
        """Measures, and leaves the model as it was."""
        from prune_lab.pruning import block_importance, sensitivity_report

        assert calibrator is not None
        dense = calibrator.loss(anatomy.model, WINDOWS)
        columns, increases = list[str](), [list[float]() for _ in anatomy.blocks]
        for part in self.parts:
            if part == "block":
                found = block_importance.loss_increases(anatomy, calibrator, dense)
            elif part == "weights":
                unstructured = Unstructured(score=self.score)
                found = unstructured.loss_increases(anatomy, seed, calibrator, self.amounts)
            else:
                structured = Structured(units=(part,), score=self.score)
                found = structured.loss_increases(anatomy, seed, calibrator, self.amounts, part)
            columns += [part] if part == "block" else [f"{part} {a:g}" for a in self.amounts]
            for of_block, more in zip(increases, found, strict=True):
                of_block += more
        windows = min(WINDOWS, len(calibrator.windows))
        files = sensitivity_report.files_of(columns, increases, self.score, windows, dense)
        warning = "nothing was removed: sensitivity.md and .png in the run's folder say what each block would cost"
        return Pruned(warnings=[warning], files=files)
