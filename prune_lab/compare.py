"""The contract's metrics from what was measured: compressed beside dense."""

from __future__ import annotations

from dataclasses import asdict

from prune_lab.measure.figures import Figures
from prune_lab.measure.macs import Macs
from prune_lab.measure.speed import Paired
from prune_lab.measure.timing import Timings
from prune_lab.methods.base import Method
from prune_lab.pruning.pruned import Pruned


def compare(
    method: Method, dense: Figures, compressed: Figures, timings: Timings | None, pruned: Pruned
) -> dict[str, float]:
    """Metrics by their public names (docs/metrics.md). Each field of Quality is one; MLflow opens on the first."""
    metrics: dict[str, float] = {}
    for (name, value), was in zip(asdict(compressed.quality).items(), asdict(dense.quality).values(), strict=True):
        metrics |= {f"quality/{name}": value, f"quality/dense_{name}": was}
    metrics["quality/perplexity_ratio"] = metrics["quality/perplexity"] / metrics["quality/dense_perplexity"]
    requested = 0.0 if "amount" in method.not_applicable else method.amount
    metrics |= {"amount/requested": requested, "amount/realized": pruned.realized}
    size, full = compressed.size, dense.size
    metrics |= {
        "params/total": size.params,
        "params/dense_total": full.params,
        "params/nonzero": size.nonzero,
        "params/dense_nonzero": full.nonzero,
        "params/reduction": 1 - size.nonzero / max(1, full.nonzero),
        "params/physical_reduction": 1 - size.params / full.params,
        "size/disk_mb": size.disk_mb,
        "size/dense_disk_mb": full.disk_mb,
        "size/reduction": 1 - size.disk_mb / full.disk_mb,
        "memory/weights_mb": size.weights_mb,
        "memory/dense_weights_mb": full.weights_mb,
    }
    if compressed.memory_mb is not None and dense.memory_mb is not None:
        metrics |= {
            "memory/peak_mb": compressed.memory_mb,
            "memory/dense_peak_mb": dense.memory_mb,
            "memory/reduction": 1 - compressed.memory_mb / dense.memory_mb,
        }
    for prefix, scores in (("", compressed.tasks), ("dense_", dense.tasks)):
        for task, values in scores.items():
            metrics |= {f"tasks/{prefix}{task}_{name}": float(value) for name, value in values.items()}
    return metrics | (latency_figures(timings) if timings is not None else {})


def latency_figures(timings: Timings) -> dict[str, float]:
    """What was timed, by its public names."""
    headline = timings.headline
    metrics = _timed("prefill", "ms", headline.prefill) | _timed("decode", "ms_per_token", headline.decode)
    metrics["throughput/decode_tokens_per_s"] = 1e3 / metrics["latency/decode_ms_per_token_p50"]
    if timings.aa is not None:
        metrics |= _speedup("aa_prefill", timings.aa.prefill) | _speedup("aa_decode", timings.aa.decode)
    for (batch, length), taken in timings.grid.items():
        at = f"_b{batch}_l{length}"
        for stage, unit, paired in (("prefill", "ms", taken.prefill), ("decode", "ms_per_token", taken.decode)):
            metrics[f"latency/{stage}_{unit}_p50{at}"] = float(paired.compressed.quantile(0.5))
            metrics[f"latency/dense_{stage}_{unit}_p50{at}"] = float(paired.dense.quantile(0.5))
            metrics |= _speedup(stage, paired, at)
    if timings.energy is not None:
        metrics["energy/joules_per_token"] = timings.energy.compressed
        metrics["energy/dense_joules_per_token"] = timings.energy.dense
    return metrics


def compute_figures(dense: Macs, compressed: Macs) -> dict[str, float]:
    """Multiply-accumulates per token, by their public names."""
    return {
        "compute/macs_per_token": compressed.total,
        "compute/dense_macs_per_token": dense.total,
        "compute/effective_macs_per_token": compressed.effective,
    }


def _timed(stage: str, unit: str, paired: Paired) -> dict[str, float]:
    return {
        f"latency/{stage}_{unit}_p50": float(paired.compressed.quantile(0.5)),
        f"latency/{stage}_{unit}_p95": float(paired.compressed.quantile(0.95)),
        f"latency/dense_{stage}_{unit}_p50": float(paired.dense.quantile(0.5)),
        **_speedup(stage, paired),
    }


def _speedup(stage: str, paired: Paired, at: str = "") -> dict[str, float]:
    low, high = paired.interval()
    name = f"latency/{stage}_speedup{at}"
    return {name: paired.speedup, f"{name}_low": low, f"{name}_high": high}
