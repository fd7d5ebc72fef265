"""method=sparsegpt: prune column by column, and let the weights that stay make up for those that go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from prune_lab.methods.weights import WeightMethod
from prune_lab.pruning.pattern import Pattern
from prune_lab.pruning.pruned import Pruned
from prune_lab.pruning.seen import Seen

if TYPE_CHECKING:
    from torch import Tensor

    from prune_lab.models.anatomy import Anatomy
    from prune_lab.pruning.calibration import Calibrator


@dataclass(frozen=True)
class SparseGPT(WeightMethod):
    """One-shot pruning with second-order weight updates (Frantar & Alistarh, 2301.00774).

    Weights are ranked within all rows x 128 columns ("window"), or within N:M groups, as they are at that moment.
    """

    scope: str = "window"

    needs = ("gram",)
    scopes: ClassVar[tuple[str, ...]] = ("window",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.allocation == "global":
            raise ValueError(
                "allocation='global': SparseGPT changes weights as it goes, so that there is no one ranking of all of "
                "them; allowed are uniform, owl, sensitivity"
            )

    def prune(self, anatomy: Anatomy, amount: float, seed: int, calibrator: Calibrator | None = None) -> Pruned:
        """Prunes and updates every prunable Linear and returns the masks that keep zeros so."""
        from prune_lab.pruning import sparsegpt

        try:
            return super().prune(anatomy, amount, seed, calibrator)
        finally:
            sparsegpt.forget_sweeps()

    def prune_linear(self, name: str, linear: Any, amount: float, seen: Seen, pruned: Pruned) -> Tensor:
        """Prunes and updates one Linear in place and returns its keep-mask, shape (out, in)."""
        from prune_lab.pruning import sparsegpt

        assert seen.gram is not None
        pattern = None if self.pattern is None else Pattern.parse(self.pattern)
        solved = sparsegpt.prune_linear(linear, seen.gram, amount, pattern)
        if solved.damping > sparsegpt.DAMPING:
            pruned.warnings.append(
                f"{name}: its inputs' gram needed damping {solved.damping:g} instead of {sparsegpt.DAMPING:g}"
            )
        return solved.keep
