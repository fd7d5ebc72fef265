"""Figures of both models in the program of measure.engine."""

from __future__ import annotations

from dataclasses import dataclass

from prune_lab.measure.speed import Latency


@dataclass(frozen=True)
class EngineFigures:
    """Figures of one model in an engine.

    Each field is a metric of its name. file_mb: bytes of its file in MB (10^6 bytes). perplexity: of the first windows
    of the test text; perplexity_vs_torch: that, divided by PyTorch's of the same. peak_mb: peak memory of a fresh
    process. None where it was not asked for.
    """

    file_mb: float
    perplexity: float | None
    perplexity_vs_torch: float | None
    peak_mb: float | None


@dataclass(frozen=True)
class Engine:
    """Figures of both models in an engine, and times in pairs where they were asked for.

    name: of the engine. cores: load of other work while they were timed, None where they were not.
    """

    name: str
    dense: EngineFigures
    compressed: EngineFigures
    latency: Latency | None = None
    cores: float | None = None
