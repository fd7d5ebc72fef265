"""method=unstructured: single weights by any score of pruning/scores.py, as method=structured has it for units."""

from __future__ import annotations

from dataclasses import dataclass

from prune_lab.methods.weights import WeightMethod
from prune_lab.pruning.scores import OF_WEIGHTS


@dataclass(frozen=True)
class Unstructured(WeightMethod):
    """Single weights of lowest score; `score` names one of pruning/scores.py, where the papers are."""

    score: str = "taylor"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score not in OF_WEIGHTS:
            raise ValueError(f"score={self.score!r} is none of {', '.join(OF_WEIGHTS)}")

    @property
    def ranked_by(self) -> str:
        """The score that the key names."""
        return self.score
