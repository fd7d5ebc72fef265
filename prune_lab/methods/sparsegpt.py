"""method=sparsegpt: prunes column by column and updates the remaining weights to make up for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from prune_lab.methods.weights import WeightMethod
from prune_lab.pruning.pattern import Pattern
from prune_lab.pruning.pruned import Pruned

if TYPE_CHECKING:
    from torch import Tensor

    from prune_lab.models.anatomy import Anatomy
    from prune_lab.pruning.calibration import Calibrator
    from prune_lab.pruning.statistics import LinearStatistics


@dataclass(frozen=True)
class SparseGPT(WeightMethod):
    """One-shot pruning with second-order weight updates (Frantar & Alistarh, 2301.00774).

    Updated weights are ranked within all rows x 128 columns (scope="window"), each row of them alone ("row"), or N:M
    groups, whatever the scope.
    """

    scope: str = "window"

    needs = ("gram",)
    scopes: ClassVar[tuple[str, ...]] = ("window", "row")

    def forward_passes(self, blocks: int) -> float:
        """Time of the statistics, and of the solve: 2.8 passes together, measured as Wanda's were."""
        return super().forward_passes(blocks) + 1.3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.allocation == "global":
            raise ValueError(
                "allocation='global': SparseGPT changes weights as it goes, so that there is no one ranking of all of "
                "them; allowed are uniform, owl, sensitivity"
            )

    def prune(self, anatomy: Anatomy, amount: float, seed: int, calibrator: Calibrator | None = None) -> Pruned:
        """Prunes and updates every prunable Linear and returns the masks that keep zeros zero."""
        from prune_lab.pruning import sparsegpt_solver

        try:
            return super().prune(anatomy, amount, seed, calibrator)
        finally:
            sparsegpt_solver.forget_sweeps()

    def prune_linear(
        self, name: str, linear: Any, amount: float, statistics: LinearStatistics, pruned: Pruned
    ) -> Tensor:
        """Prunes and updates one Linear in place and returns its keep-mask, shape (out, in)."""
        from prune_lab.pruning import sparsegpt_solver
        from prune_lab.pruning.gram import DAMPING

        assert statistics.gram is not None
        pattern = None if self.pattern is None else Pattern.parse(self.pattern)
        solved = sparsegpt_solver.prune_linear(linear, statistics.gram, amount, pattern, self.scope == "row")
        if solved.damping > DAMPING:
            pruned.warnings.append(f"{name}: its inputs' gram needed damping {solved.damping:g} instead of {DAMPING:g}")
        return solved.keep
