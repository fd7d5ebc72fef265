"""Measurements of one model: by itself, and beside the dense one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from prune_lab.measure.continuations import Continuation
from prune_lab.measure.divergence import Divergence
from prune_lab.measure.perplexity import Quality
from prune_lab.measure.size import Size
from prune_lab.measure.tasks import Scores


@dataclass(frozen=True)
class Measurements:
    """Quality, size, memory, task scores and continuations.

    memory_mb: peak memory in MB (10^6 bytes), None where it was not asked for. tasks: the scores of each task by name.
    answers: of each task whose documents are answered rightly or wrongly, "1" or "0" for each of them, in order.
    continuations: of each prompt, where any were asked for.
    divergence, ratio_interval: difference from the dense model, and the 95 % interval of the ratio of perplexities;
    same_experts: share of the dense model's choices of experts that this one makes as well; first_perplexity: that of
    the windows which measure.engine runs too. None of the dense model itself, and where there is none.
    """

    quality: Quality
    size: Size
    memory_mb: float | None
    tasks: dict[str, Scores] = field(default_factory=dict)
    answers: dict[str, str] = field(default_factory=dict)
    continuations: tuple[Continuation, ...] = ()
    divergence: Divergence | None = None
    ratio_interval: tuple[float, float] | None = None
    same_experts: float | None = None
    first_perplexity: float | None = None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Measurements:
        """From what `asdict` made of a dense model's and JSON kept."""
        quality = {name: float(value) for name, value in values["quality"].items()}  # a diverged one stands as "inf"
        size = Size(**values["size"])
        continuations = continuations_from(values["continuations"])
        return cls(Quality(**quality), size, values["memory_mb"], values["tasks"], values["answers"], continuations)


def continuations_from(kept: list[dict[str, Any]]) -> tuple[Continuation, ...]:
    """From what `asdict` made of each and JSON kept."""
    return tuple(Continuation(tuple(one["ids"]), one["end"]) for one in kept)
