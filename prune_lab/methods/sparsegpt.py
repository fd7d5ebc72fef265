"""method=sparsegpt: prune column by column, and let the weights that stay make up for those that go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from prune_lab.methods.base import Pruned
from prune_lab.methods.weights import WeightMethod
from prune_lab.models.anatomy import out_in
from prune_lab.pruning.selection import Pattern, count_to_remove
from prune_lab.pruning.sparsegpt import DAMPING, solve
from prune_lab.pruning.statistics import Seen


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

    def prune_linear(self, name: str, linear: Any, amount: float, seen: Seen, pruned: Pruned) -> Tensor:
        """Prunes and updates one Linear in place and returns its keep-mask, shape (out, in)."""
        weight = out_in(linear, linear.weight)
        assert seen.gram is not None
        if self.pattern is None and count_to_remove(weight.numel(), amount) == 0:
            return torch.ones_like(weight, dtype=torch.bool)
        solved = solve(weight, seen.gram, amount, Pattern.parse(self.pattern) if self.pattern else None)
        weight.copy_(solved.weight)
        if solved.damping > DAMPING:
            pruned.notes.append(f"{name}: its inputs' gram needed damping {solved.damping:g} instead of {DAMPING:g}")
        return solved.keep
