"""Metrics of a run from what was measured of the compressed and of the dense model."""

from __future__ import annotations

from dataclasses import asdict

from prune_lab.measure.continuations import generation_of
from prune_lab.measure.divergence import flips
from prune_lab.measure.engine_figures import Engine
from prune_lab.measure.macs import Macs
from prune_lab.measure.measurements import Measurements
from prune_lab.measure.speed import Paired
from prune_lab.measure.timing import Timings
from prune_lab.methods.base import Method
from prune_lab.pruning.pruned import Pruned
from prune_lab.results.metrics import dense_name


def compare(
    method: Method, dense: Measurements, compressed: Measurements, timings: Timings | None, pruned: Pruned
) -> dict[str, float]:
    """Metrics by name, each an entry of METRICS in results/metrics.py; MLflow opens on the first.

    Each field of Quality, Divergence and Generation is a metric of its name. timings: None where nothing was timed.
    """
    metrics: dict[str, float] = {}
    for (name, value), was in zip(asdict(compressed.quality).items(), asdict(dense.quality).values(), strict=True):
        metrics |= _both(f"quality/{name}", value, was)
    metrics["quality/perplexity_ratio"] = metrics["quality/perplexity"] / metrics["quality/dense_perplexity"]
    if compressed.ratio_interval is not None:
        ends = zip(("low", "high"), compressed.ratio_interval, strict=True)
        metrics |= {f"quality/perplexity_ratio_{end}": value for end, value in ends}
    if compressed.divergence is not None:
        metrics |= {f"quality/{name}": value for name, value in asdict(compressed.divergence).items()}
    requested = 0.0 if "amount" in method.not_applicable else method.amount
    metrics |= {"amount/requested": requested, "amount/realized": pruned.realized}
    size, full = compressed.size, dense.size
    metrics |= {
        **_both("params/total", size.params, full.params),
        **_both("params/nonzero", size.nonzero, full.nonzero),
        "params/reduction": 1 - size.nonzero / max(1, full.nonzero),
        "params/physical_reduction": 1 - size.params / full.params,
        **_both("size/disk_mb", size.disk_mb, full.disk_mb),
        "size/reduction": 1 - size.disk_mb / full.disk_mb,
        **_both("memory/weights_mb", size.weights_mb, full.weights_mb),
    }
    metrics |= _both("memory/weights_read_mb", size.read_mb, full.read_mb) | pruned.metrics
    if compressed.same_experts is not None:
        metrics["routing/same_experts"] = compressed.same_experts
    if size.active is not None and full.active is not None:
        metrics |= _both("params/active", size.active, full.active)
    if size.kv_cache_bytes is not None and full.kv_cache_bytes is not None:
        metrics |= _both("memory/kv_cache_bytes_per_token", size.kv_cache_bytes, full.kv_cache_bytes)
    if compressed.memory_mb is not None and dense.memory_mb is not None:
        metrics |= {
            **_both("memory/peak_mb", compressed.memory_mb, dense.memory_mb),
            "memory/reduction": 1 - compressed.memory_mb / dense.memory_mb,
        }
    for prefix, tasks in (("", compressed.tasks), ("dense_", dense.tasks)):
        for task, scores in tasks.items():
            metrics |= {f"tasks/{prefix}{task}_{score}": float(value) for score, value in scores.items()}
    for task in compressed.answers.keys() & dense.answers.keys():  # not where one model's answers are partly right
        metrics[f"tasks/{task}_flips"] = flips(dense.answers[task], compressed.answers[task])
    if compressed.continuations:
        after, before = (asdict(generation_of(one.continuations, dense.continuations)) for one in (compressed, dense))
        for name, value in after.items():
            metrics |= _both(f"generation/{name}", value, before[name])
    return metrics | (latency_figures(timings) if timings is not None else {})


def latency_figures(timings: Timings) -> dict[str, float]:
    """Metrics of time and energy by name."""
    headline = timings.headline
    metrics = _timed("prefill", "ms", headline.prefill) | _timed("decode", "ms_per_token", headline.decode)
    metrics["throughput/decode_tokens_per_s"] = 1e3 / metrics["latency/decode_ms_per_token_p50"]
    if timings.aa is not None:
        metrics |= _speedup("aa_prefill", timings.aa.prefill) | _speedup("aa_decode", timings.aa.decode)
    for (batch, length), taken in timings.grid.items():
        at = f"_b{batch}_l{length}"
        for stage, unit, paired in (("prefill", "ms", taken.prefill), ("decode", "ms_per_token", taken.decode)):
            medians = float(paired.compressed.quantile(0.5)), float(paired.dense.quantile(0.5))
            metrics |= _both(f"latency/{stage}_{unit}_p50{at}", *medians) | _speedup(stage, paired, at)
    if timings.energy is not None:
        metrics |= _both("energy/joules_per_token", timings.energy.compressed, timings.energy.dense)
    return metrics


def engine_figures(engine: Engine) -> dict[str, float]:
    """Metrics of an engine by name."""
    name, metrics = engine.name, dict[str, float]()
    for figure, after in asdict(engine.compressed).items():
        before = getattr(engine.dense, figure)
        if after is not None and before is not None:
            metrics |= _both(f"{name}/{figure}", after, before)
    if (after := engine.compressed.perplexity) is not None and engine.dense.perplexity is not None:
        metrics[f"{name}/perplexity_ratio"] = after / engine.dense.perplexity
    if engine.latency is not None:
        metrics |= _timed("prefill", "ms", engine.latency.prefill, name)
        metrics |= _timed("decode", "ms_per_token", engine.latency.decode, name)
    return metrics


def compute_figures(dense: Macs, compressed: Macs) -> dict[str, float]:
    """Metrics of multiply-accumulates per token by name."""
    effective = {"compute/effective_macs_per_token": compressed.effective}
    return _both("compute/macs_per_token", compressed.total, dense.total) | effective


def _both(name: str, compressed: float, dense: float) -> dict[str, float]:
    """A metric and the dense model's figure beside it."""
    return {name: compressed, dense_name(name): dense}


def _timed(stage: str, unit: str, paired: Paired, of: str = "latency") -> dict[str, float]:
    median = f"{of}/{stage}_{unit}_p50"
    return {
        median: float(paired.compressed.quantile(0.5)),
        f"{of}/{stage}_{unit}_p95": float(paired.compressed.quantile(0.95)),
        dense_name(median): float(paired.dense.quantile(0.5)),
        **_speedup(stage, paired, of=of),
    }


def _speedup(stage: str, paired: Paired, at: str = "", of: str = "latency") -> dict[str, float]:
    low, high = paired.interval()
    name = f"{of}/{stage}_speedup{at}"
    return {name: paired.speedup, f"{name}_low": low, f"{name}_high": high}
