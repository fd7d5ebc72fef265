"""What every pruning method has in common, and what it answers with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from prune_lab.checks import check_amount
from prune_lab.models.anatomy import Anatomy
from prune_lab.pruning.calibration import Calibrator
from prune_lab.pruning.masks import Masks
from prune_lab.pruning.surgery import Cut


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
    masks: Masks = field(default_factory=Masks)
    notes: list[str] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    cuts: list[Cut] = field(default_factory=list)

    def after(self, earlier: Pruned) -> Pruned:
        """This pruning as one that followed an earlier one of the same model: with the notes of both."""
        self.notes = list(dict.fromkeys(earlier.notes + self.notes))
        return self

    @property
    def realized(self) -> float:
        """Fraction of the weights in scope that were removed or zeroed."""
        before = sum(row.before for row in self.rows)
        return sum(row.removed for row in self.rows) / before if before else 0.0


@dataclass(frozen=True)
class Method:
    """A method option: prunes a model to a cumulative amount.

    `not_applicable` names keys that are accepted so that sweeps compose, and are not used.
    """

    amount: float = 0.5

    not_applicable: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        check_amount(self.amount)

    @property
    def calibrated(self) -> bool:
        """Whether it looks at calibration text."""
        return False

    @property
    def needs_whole_model(self) -> str | None:
        """Why it cannot prune block by block (model.stream=true), with what can; None where it can."""
        return "units and blocks are removed from a model in memory; give a method for single weights"

    def prune(self, anatomy: Anatomy, amount: float, seed: int, calibrator: Calibrator | None = None) -> Pruned:
        """Removes, in place, `amount` of what the dense model had in scope; raises Refused where it cannot.

        `calibrator` is there if the method is `calibrated`.
        """
        raise NotImplementedError
