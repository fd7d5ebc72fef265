"""method=unstructured: single weights by any score, the counterpart of method=structured."""

from __future__ import annotations

from dataclasses import dataclass

from prune_lab.methods.weights import WeightMethod
from prune_lab.pruning.scores import OF_WEIGHTS


@dataclass(frozen=True)
class Unstructured(WeightMethod):
    """Single weights of lowest score; `score` names one of pruning/scores.py, where the papers are."""

    score: str = "taylor"  # type: ignore[misc] # the score's name is fixed elsewhere, and a key here

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score not in OF_WEIGHTS:
            raise ValueError(f"score={self.score!r} is none of {', '.join(OF_WEIGHTS)}")
