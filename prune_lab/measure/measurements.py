"""What is measured of one model by itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from prune_lab.measure.perplexity import Quality
from prune_lab.measure.size import Size
from prune_lab.measure.tasks import Scores


@dataclass(frozen=True)
class Measurements:
    """Quality, size, memory and task scores.

    memory_mb: peak memory in MB (10^6 bytes), None where it was not asked for. tasks: the scores of each task by name.
    """

    quality: Quality
    size: Size
    memory_mb: float | None
    tasks: dict[str, Scores] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Measurements:
        """From what `asdict` made of them and JSON kept."""
        quality = {name: float(value) for name, value in values["quality"].items()}  # a diverged one stands as "inf"
        return cls(Quality(**quality), Size(**values["size"]), values["memory_mb"], values["tasks"])
