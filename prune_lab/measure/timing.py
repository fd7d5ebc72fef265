"""Everything that a run times: the headline, and the dense model against itself when asked for."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from prune_lab.console import Console
from prune_lab.device import Device
from prune_lab.measure.settings import Measure
from prune_lab.measure.speed import Latency, measure_latency


@dataclass(frozen=True)
class Timings:
    """Paired times: `headline` at batch 1; `aa` is the dense model against a copy of itself, None if not asked for."""

    headline: Latency
    aa: Latency | None = None


def measure_timings(
    dense: Any, compressed: Any, prompt: Tensor, settings: Measure, device: Device, console: Console
) -> Timings:
    """Times `compressed` beside `dense` as the settings say; `prompt` has shape (1, tokens)."""
    headline = measure_latency(dense, compressed, prompt, settings, device, console)
    aa = None
    if settings.aa:
        # A copy, not the same object: it lies elsewhere in memory as the compressed model does, and each of the two
        # finds the caches full of the other's weights. The same object twice would be quieter than what it vouches for.
        twin = copy.deepcopy(dense)
        aa = measure_latency(dense, twin, prompt, settings, device, console, "dense against itself")
    return Timings(headline, aa)
