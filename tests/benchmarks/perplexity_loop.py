"""Our perplexity beside a bare batched forward loop over the same windows: median ratio of interleaved repeats."""

from __future__ import annotations

import time
from statistics import median

import torch

from prune_lab import device as devices
from prune_lab.console import Console
from prune_lab.measure.perplexity import measure_quality
from prune_lab.models.load import Tiny
from prune_lab.text.stdlib import Stdlib
from prune_lab.text.tokens import Tokens

WINDOWS, BATCH, REPEATS = 128, 8, 7


@torch.no_grad()
def bare(model: torch.nn.Module, windows: torch.Tensor) -> None:
    """Forward passes and nothing else."""
    for batch in windows.split(BATCH):
        model(input_ids=batch, use_cache=False)


if __name__ == "__main__":
    device = devices.resolve("cpu", "float32")
    model = Tiny().load(device, seed=0)
    windows = Tokens(Stdlib().corpus(), model.tokenizer).windows("test", 256)[:WINDOWS]
    ratios = []
    for repeat in range(REPEATS + 1):
        began = time.perf_counter()
        measure_quality(model.model, windows, 1.0, BATCH, device, Console())
        between = time.perf_counter()
        bare(model.model, windows)
        if repeat:  # the first is the warm-up
            ratios.append((between - began) / (time.perf_counter() - between))
    print(f"perplexity / bare forward loop: {median(ratios):.3f} (of {min(ratios):.3f} to {max(ratios):.3f})")
