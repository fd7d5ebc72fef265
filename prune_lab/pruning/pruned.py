"""Result of a pruning method: per-layer table, masks, warnings, files."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prune_lab.models.cuts import Cut
    from prune_lab.pruning.masks import Masks


def _no_masks() -> Masks:
    from prune_lab.pruning.masks import Masks

    return Masks()


@dataclass(frozen=True)
class LayerRow:
    """One line of the per-layer table: what was removed from a Linear, in weights."""

    layer: str
    before: int
    removed: int


@dataclass
class Pruned:
    """Result of a method: the table of its scope, masks to hold, warnings, files to keep, parameters it replaced.

    metrics: figures of it by name, entries of METRICS (results/metrics.py).
    unseen: matrices that too few tokens of the calibration text came to (experts), pruned by magnitude. counted: of a
    method that removes no weight, how many of what it removes there were, and how many are gone.
    """

    rows: list[LayerRow] = field(default_factory=list)
    masks: Masks = field(default_factory=_no_masks)
    warnings: list[str] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    cuts: list[Cut] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    unseen: list[str] = field(default_factory=list)
    counted: tuple[int, int] | None = None

    def after(self, earlier: Pruned) -> Pruned:
        """This pruning as one that followed an earlier one of the same model: with the warnings of both."""
        self.warnings = list(dict.fromkeys(earlier.warnings + self.warnings))
        return self

    @property
    def realized(self) -> float:
        """Fraction of the weights in scope that were removed or zeroed, or of what is counted in their place."""
        before, removed = self.counted or (
            sum(row.before for row in self.rows), sum(row.removed for row in self.rows)
        )  # fmt: skip
        return removed / before if before else 0.0
