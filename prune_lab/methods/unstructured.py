"""method=unstructured: single weights by any score, the counterpart of method=structured."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from prune_lab.methods.weights import WeightMethod
from prune_lab.pruning.scores import OF_WEIGHTS, SCORES
from prune_lab.pruning.statistics import Seen


@dataclass(frozen=True)
class Unstructured(WeightMethod):
    """Single weights of lowest score; `score` names one of pruning/scores.py, where the papers are."""

    score: str = "taylor"  # type: ignore[assignment] # the key of structured; `importance` is what ranks

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score not in OF_WEIGHTS:
            raise ValueError(f"score={self.score!r} is none of {', '.join(OF_WEIGHTS)}")

    @property
    def seen_by_score(self) -> frozenset[str]:
        """What the named score goes by."""
        return SCORES[self.score].needs

    @property
    def counted_score(self) -> str | None:
        """The named score, where it goes by the weight alone."""
        return self.score if SCORES[self.score].by_weight_alone else None

    def importance(self, weight: Tensor, seen: Seen) -> Tensor:
        """The named score, shape (out, in)."""
        return SCORES[self.score].function(weight, seen)
