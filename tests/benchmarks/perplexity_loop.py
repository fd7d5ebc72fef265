"""Our perplexity beside a bare batched forward loop over the same windows: median ratio of interleaved repeats.

python tests/benchmarks/perplexity_loop.py

And the peak memory of both by vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from prune_lab.measure.perplexity import measure_losses, quality_of
from prune_lab.models.load import Tiny
from prune_lab.system import device as devices
from prune_lab.system.console import Console
from prune_lab.text.stdlib import Stdlib
from prune_lab.text.tokens import Tokens

WINDOWS, BATCH, REPEATS = 32, 8, 5


@torch.no_grad()
def bare(model: torch.nn.Module, windows: torch.Tensor) -> None:
    """Forward passes and nothing else."""
    for batch in windows.split(BATCH):
        model(input_ids=batch, use_cache=False)


@torch.no_grad()
def naive(model: torch.nn.Module, windows: torch.Tensor) -> float:
    """The definition, from whole logits, window by window."""
    losses = [model(input_ids=w[None], labels=w[None], use_cache=False).loss.double() for w in windows]
    return math.exp(float(torch.stack(losses).mean()))


def peak_mb(function: Callable[[], object]) -> float:
    """MB that a call holds at most on top of what was there before; on Linux."""

    def held(name: str) -> int:
        return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) * 1024

    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = held("VmRSS")
    function()
    return (held("VmHWM") - before) / 1e6


def print_memory(windows: torch.Tensor) -> None:
    """Peak memory by vocabulary, of small models of random weights."""
    print("\n| vocabulary | ours, peak | bare loop, peak |\n|---|---|---|")
    for vocabulary in (4096, 16384, 65536):
        config = LlamaConfig(
            vocab_size=vocabulary, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2
        )
        model = LlamaForCausalLM(config).eval()
        bare(model, windows[:1])  # the warm-up
        ours = peak_mb(lambda model=model: measure_losses(model, windows, BATCH, device, Console()))  # type: ignore[misc]
        print(f"| {vocabulary:,} | {ours:.0f} MB | {peak_mb(lambda model=model: bare(model, windows)):.0f} MB |")  # type: ignore[misc]


if __name__ == "__main__":
    device = devices.resolve("cpu", "float32")
    model = Tiny().load(device, seed=0)
    windows = Tokens(Stdlib().corpus(), model.tokenizer).windows("test", 256)[:WINDOWS].long()
    ratios = []
    for repeat in range(REPEATS + 1):
        began = time.perf_counter(), time.process_time()
        found = quality_of(measure_losses(model.model, windows, BATCH, device, Console()), 1.0)
        between = time.perf_counter(), time.process_time()
        bare(model.model, windows)
        end = time.perf_counter(), time.process_time()
        if repeat:  # the first is the warm-up
            ratios.append([(b - a) / (c - b) for a, b, c in zip(began, between, end, strict=True)])
    wall, work = (median(ratio[i] for ratio in ratios) for i in (0, 1))
    away = found.perplexity / naive(model.model, windows) - 1
    print(f"torch {torch.__version__}, threads: {torch.get_num_threads()}\n")
    print(f"perplexity / bare forward loop: {wall:.3f} by wall time, {work:.3f} by process time (target 1.10)")
    print(f"relative difference from a naive loop in float32: {away:.1e} (target 1e-6)")
    print_memory(windows[: 2 * BATCH])
