"""Latency of a model beside the dense one: interleaved pairs in one process, medians and intervals."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prune_lab.measure.accelerate import accelerator
from prune_lab.measure.inference import Inference
from prune_lab.measure.settings import Measure
from prune_lab.system.console import Console
from prune_lab.system.device import Device

RESAMPLES = 2000


@dataclass(frozen=True)
class Paired:
    """Milliseconds of the dense and the compressed model, shape (pairs,) each; pair i was taken side by side."""

    dense: Tensor
    compressed: Tensor

    @property
    def speedup(self) -> float:
        """Median over pairs of dense time / compressed time: above 1 is faster."""
        return float((self.dense / self.compressed).quantile(0.5))

    def interval(self) -> tuple[float, float]:
        """95 % bootstrap interval of the speed-up, resampling pairs.

        It covers the truth in 90 to 98 % of simulated series of 10 to 20 pairs with independent noise, spikes, noise
        that lasts and drift; where the second place of a pair costs more than the first, it is wider and covers more
        (tests/test_latency.py).
        """
        ratios = self.dense / self.compressed
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randint(len(ratios), (RESAMPLES, len(ratios)), generator=generator)
        medians = ratios[drawn].quantile(0.5, dim=1)  # torch.median would take the lower of two middle ones
        low, high = medians.quantile(torch.tensor([0.025, 0.975], dtype=ratios.dtype))
        return float(low), float(high)


@dataclass(frozen=True)
class Latency:
    """Paired times of a prefill (the whole prompt) and of decoding (one step: a token for each row)."""

    prefill: Paired
    decode: Paired


def measure_latency(
    dense: Any,
    compressed: Any,
    prompt: Tensor,
    settings: Measure,
    device: Device,
    console: Console,
    what: str = "latency",
) -> Latency:
    """Times both models on `prompt`, shape (batch, tokens), in pairs whose order alternates, after warm-up pairs.

    `what` is said beside the progress bar.
    """
    times: dict[str, list[tuple[float, float]]] = {"dense": [], "compressed": []}
    prompt = prompt.to(device.torch_device)
    bars = console.progress(settings.warmup + settings.pairs, what, unit="pair")
    with accelerator(settings.accelerate) as ready, bars as bar:
        order = [("dense", ready(dense)), ("compressed", ready(compressed))]
        for pair in range(settings.warmup + settings.pairs):
            for name, model in order if pair % 2 == 0 else order[::-1]:
                taken = _time_once(model, prompt, settings.decode_tokens, device)
                if pair >= settings.warmup:
                    times[name].append(taken)
            bar.update()
    columns = {name: torch.tensor(rows, dtype=torch.float64).T for name, rows in times.items()}
    return Latency(*(Paired(columns["dense"][i], columns["compressed"][i]) for i in (0, 1)))


def _time_once(model: Inference, prompt: Tensor, decode_tokens: int, device: Device) -> tuple[float, float]:
    """Milliseconds of one prefill and of one decoded token."""
    output, prefill_ms = _timed(lambda: model.prefill(prompt), device)
    _, decode_ms = _timed(lambda: model.decode(output, decode_tokens), device)
    return prefill_ms, decode_ms / decode_tokens


def _timed(work: Callable[[], Any], device: Device) -> tuple[Any, float]:
    """Result of `work` and its milliseconds; on a GPU by events, so that queued work is counted."""
    device.synchronize()
    if device.is_cuda:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        result = work()
        end.record()
        end.synchronize()
        return result, start.elapsed_time(end)
    began = time.perf_counter()
    result = work()
    return result, (time.perf_counter() - began) * 1e3
