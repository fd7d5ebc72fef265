"""Base class of the pruning methods."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from prune_lab.checks import check_amount
from prune_lab.pruning.pruned import Pruned

if TYPE_CHECKING:
    from prune_lab.models.anatomy import Anatomy
    from prune_lab.pruning.calibration import Calibrator


@dataclass(frozen=True)
class Method:
    """A method option: prunes a model to a cumulative amount.

    `not_applicable` names keys that are accepted so that sweeps compose, and are not used.
    """

    amount: float = 0.5

    not_applicable: ClassVar[tuple[str, ...]] = ()
    in_whole_passes: ClassVar[bool] = False  # its calibration text passes the dense model as a whole, whatever it is

    def __post_init__(self) -> None:
        check_amount(self.amount)

    @property
    def calibrated(self) -> bool:
        """True where the method needs calibration text."""
        return False

    def forward_passes(self, blocks: int) -> float:
        """Time of a pruning of a model of so many blocks, in forward passes over the calibration text, about.

        For the estimate of a run's time. Measured on SmolLM2-135M (16 windows of 1024, two cores): Wanda 1.5.
        """
        return 1.5

    def solved_width(self, anatomy: Anatomy) -> int | None:
        """Most inputs of a Linear for which it solves with their gram matrix; None where it solves for none."""
        return None

    @property
    def needs_whole_model(self) -> str | None:
        """Reason that it cannot prune block by block (model.stream=true), with what can; None where it can."""
        return "units and blocks are removed from a model in memory; give a method for single weights or experts"

    @property
    def cuts(self) -> tuple[str, ...]:
        """Kinds of units of which a model has fewer afterwards."""
        return ()

    def check(self, config: Any, amounts: Iterable[float]) -> None:
        """Raises Refused where a config of transformers cannot hold what is left after one of the cumulative amounts.

        Asked before a model is loaded; `config` is the dense model's.
        """

    def check_model(self, anatomy: Anatomy, amounts: Iterable[float]) -> None:
        """Raises Refused where a model cannot lose one of the cumulative amounts.

        Asked of the dense model once it is loaded, before anything is measured.
        """

    def prune(self, anatomy: Anatomy, amount: float, seed: int, calibrator: Calibrator | None = None) -> Pruned:
        """Removes, in place, `amount` of what the dense model had in scope; raises Refused where it cannot.

        `calibrator` is there if the method is `calibrated`.
        """
        raise NotImplementedError
