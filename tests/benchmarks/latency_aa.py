"""A/A: the latency harness on the dense model against itself. The interval should contain 1.00 in 19 of 20 tries."""

from __future__ import annotations

import copy

from prune_lab.measure.settings import Measure
from prune_lab.measure.speed import measure_latency
from prune_lab.models.load import Tiny
from prune_lab.system import device as devices
from prune_lab.system.console import Console
from prune_lab.text.stdlib import Stdlib
from prune_lab.text.tokens import Tokens

TRIES = 5

if __name__ == "__main__":
    device = devices.resolve("auto", "auto")
    dense = Tiny().load(device, seed=0)
    prompt = Tokens(Stdlib().corpus(), dense.tokenizer).stream("test")[:256][None]
    twin = copy.deepcopy(dense.model)  # elsewhere in memory, as a compressed model is
    for number in range(TRIES):
        latency = measure_latency(dense.model, twin, prompt, Measure(), device, Console())
        for stage in ("prefill", "decode"):
            paired = getattr(latency, stage)
            low, high = paired.interval()
            verdict = "contains 1.00" if low <= 1 <= high else "MISSES 1.00"
            print(f"try {number} {stage:7} ratio {paired.speedup:.3f} [{low:.3f}, {high:.3f}] {verdict}")
