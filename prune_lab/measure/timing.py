"""Timings of a run: the headline; the dense model against itself and other shapes when asked for."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from prune_lab.measure.energy import Energy, measure_energy
from prune_lab.measure.prompts import PromptShape
from prune_lab.measure.settings import Measure
from prune_lab.measure.speed import Latency, measure_latency
from prune_lab.system.console import Console
from prune_lab.system.device import Device


@dataclass(frozen=True)
class Timings:
    """Paired times: `headline` at batch 1, `grid` of prompts by their shape (rows, tokens).

    `aa` is the dense model against a copy of itself; None if not asked for, as `grid` is then empty.
    `energy` is None too where no counter can be read.
    """

    headline: Latency
    aa: Latency | None = None
    grid: Mapping[PromptShape, Latency] = field(default_factory=dict)
    energy: Energy | None = None


def measure_timings(
    dense: Any,
    compressed: Any,
    prompt: Tensor,
    grid: Mapping[PromptShape, Tensor],
    settings: Measure,
    device: Device,
    console: Console,
) -> Timings:
    """Times `compressed` beside `dense` on `prompt`, shape (1, tokens), and on each prompt of `grid`."""

    def timed(other: Any, rows: Tensor, what: str) -> Latency:
        return measure_latency(dense, other, rows, settings, device, console, what)

    headline, aa = timed(compressed, prompt, "latency"), None
    if settings.aa:
        # A copy, not the same object: it lies elsewhere in memory as the compressed model does, and each of the two
        # finds the caches full of the other's weights. The same object twice would be quieter than what it vouches for.
        aa = timed(copy.deepcopy(dense), prompt, "dense against itself")
    others = {
        (rows, length): timed(compressed, batch, f"latency of {rows} x {length}")
        for (rows, length), batch in grid.items()
    }
    energy = None
    if settings.energy:
        console.note("measuring energy")
        energy = measure_energy(dense, compressed, prompt, settings, device)
    return Timings(headline, aa, others, energy)
