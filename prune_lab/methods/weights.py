"""What methods for single weights have in common: a score, the weights that are ranked together, an allocation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from prune_lab.methods.base import Method
from prune_lab.pruning.pattern import Pattern
from prune_lab.pruning.pruned import Pruned
from prune_lab.pruning.scores import SCORES, Score
from prune_lab.pruning.seen import GRADIENTS

if TYPE_CHECKING:
    from torch import Tensor

    from prune_lab.models.anatomy import Anatomy
    from prune_lab.pruning.calibration import Calibrator
    from prune_lab.pruning.seen import Seen

ALLOCATIONS = ("uniform", "global", "owl", "sensitivity")


@dataclass(frozen=True)
class WeightMethod(Method):
    """Zeroes single weights of lowest score; subclasses give the score.

    pattern: N:M kept, such as 2:4; it fixes the amount. scope: the weights that are ranked together. allocation: how
    the amount is spread over blocks; "global" is one ranking over all of them, whatever the scope.
    """

    pattern: str | None = None
    scope: str = "layer"
    allocation: str = "uniform"

    # The name of one of pruning/scores.py; or a method score(weight, seen): the importance of each weight, shape
    # (out, in) as `weight`, of which the lowest go first. `needs`: the fields of Seen that such a method goes by.
    score: ClassVar[Any] = None
    needs: ClassVar[tuple[str, ...]] = ()
    scopes: ClassVar[tuple[str, ...]] = ("row", "layer", "global")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scope not in self.scopes:
            raise ValueError(f"scope={self.scope!r} is none of {', '.join(self.scopes)}")
        if self.allocation not in ALLOCATIONS:
            raise ValueError(f"allocation={self.allocation!r} is none of {', '.join(ALLOCATIONS)}")
        if self.scope == "global" and self.allocation not in ("uniform", "global"):
            raise ValueError(
                f"allocation={self.allocation!r} with scope=global: one ranking over all blocks is itself an "
                "allocation; give scope=layer or row"
            )
        if self.pattern is not None:
            Pattern.parse(self.pattern)
            if self.allocation != "uniform":
                raise ValueError(
                    f"allocation={self.allocation!r} with pattern={self.pattern!r}: a pattern takes the same share of "
                    "every block; give allocation=uniform"
                )

    @property
    def named_score(self) -> Score | None:
        """The score of pruning/scores.py by which it ranks; None where it has one of its own."""
        return SCORES[self.score] if isinstance(self.score, str) else None

    @property
    def seen_by_score(self) -> frozenset[str]:
        """The fields of Seen that the score goes by."""
        named = self.named_score
        return frozenset(self.needs) if named is None else named.needs

    @property
    def calibrated(self) -> bool:
        """Whether the score or the allocation looks at calibration text."""
        return bool(self.seen_by_score) or self.allocation in ("owl", "sensitivity")

    @property
    def solves(self) -> bool:
        """Whether the score goes by gram matrices."""
        return "gram" in self.seen_by_score

    @property
    def is_global(self) -> bool:
        """Whether all weights of all blocks are ranked together."""
        return self.pattern is None and "global" in (self.scope, self.allocation)

    @property
    def needs_whole_model(self) -> str | None:
        """One ranking, gradients, or losses are of the whole model; everything else is of a block."""
        if self.is_global:
            return "one ranking over all blocks needs all scores at once; give method.scope=layer or row, or owl"
        if self.allocation == "sensitivity":
            return "method.allocation=sensitivity takes the model's loss again and again; give uniform or owl"
        if of := self.seen_by_score & frozenset(GRADIENTS):
            return f"the score goes by {', '.join(sorted(of))}, gradients of the whole model; give another score"
        return None

    def prune(self, anatomy: Anatomy, amount: float, seed: int, calibrator: Calibrator | None = None) -> Pruned:
        """Zeroes weights of every prunable Linear and returns the masks that keep them so."""
        from prune_lab.pruning import weights

        return weights.prune(self, anatomy, amount, seed, calibrator)

    def prune_linear(self, name: str, linear: Any, amount: float, seen: Seen, pruned: Pruned) -> Tensor:
        """Zeroes weights of one Linear in place and returns its keep-mask, shape (out, in)."""
        from prune_lab.pruning import weights

        return weights.prune_linear(self, name, linear, amount, seen)
