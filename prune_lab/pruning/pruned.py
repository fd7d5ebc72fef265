"""What a pruning method answers with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prune_lab.pruning.masks import Masks
    from prune_lab.pruning.surgery import Cut


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
    """What a method did: the table of its scope, masks to hold, notes worth telling, files to keep, tensors it cut."""

    rows: list[LayerRow] = field(default_factory=list)
    masks: Masks = field(default_factory=_no_masks)
    warnings: list[str] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    cuts: list[Cut] = field(default_factory=list)

    def after(self, earlier: Pruned) -> Pruned:
        """This pruning as one that followed an earlier one of the same model: with the notes of both."""
        self.warnings = list(dict.fromkeys(earlier.warnings + self.warnings))
        return self

    @property
    def realized(self) -> float:
        """Fraction of the weights in scope that were removed or zeroed."""
        before = sum(row.before for row in self.rows)
        return sum(row.removed for row in self.rows) / before if before else 0.0
