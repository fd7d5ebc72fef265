"""Both models in the program of measure.engine: perplexity, time, memory and bytes of what the export wrote."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prune_lab import cache as store
from prune_lab.evaluator import Evaluator
from prune_lab.export.base import Export
from prune_lab.measure.divergence import perplexity_of
from prune_lab.measure.engine import engine_module
from prune_lab.measure.engine_figures import Engine, EngineFigures
from prune_lab.measure.measurements import Measurements
from prune_lab.measure.size import MB
from prune_lab.system.console import Console
from prune_lab.system.timing_lock import timing_lock


def measure_in_engine(
    evaluator: Evaluator, folder: Path, export: Export, measured: Measurements, console: Console
) -> Engine:
    """Figures of the dense model and of the one that `export` wrote into `folder`; measured: what PyTorch has of it."""
    settings, source, engine = evaluator.measure, (type(export).__module__,), engine_module(evaluator.measure.engine)
    with _dense_export(evaluator, export, console) as dense_folder:
        of_both = [export.files(of) for of in (dense_folder, folder)]
        files = [paths[0] for paths in of_both]  # what is opened; more of them lie beside it
        of = {"engine": evaluator.protocol["engine"], "build": engine.build(), "export": export.identity}
        of |= {"repack": settings.engine_repack}
        of |= evaluator.of_windows | {"windows": len(evaluator.windows_of_engine)}
        of_dense = evaluator.dense_cache.value("engine", of, lambda: _perplexity(evaluator, files[0], console), source)
        found = [of_dense, _perplexity(evaluator, files[1], console)]
        by_torch = [evaluator.first_perplexity(evaluator.dense_losses(console)), measured.first_perplexity]
        dense, compressed = (
            EngineFigures(
                file_mb=sum(path.stat().st_size for path in paths) / MB,
                perplexity=perplexity,
                perplexity_vs_torch=None if perplexity is None or other is None else perplexity / other,
                peak_mb=engine.peak_mb(paths[0], evaluator.prompt, settings, console) if settings.memory else None,
            )
            for paths, perplexity, other in zip(of_both, found, by_torch, strict=True)
        )
        if not settings.latency:
            return Engine(settings.engine, dense, compressed)
        with timing_lock.exclusive(console.note) as load:
            latency = engine.measure_pairs(files, evaluator.prompt, settings, console)
        return Engine(settings.engine, dense, compressed, latency, load.cores)


def _perplexity(evaluator: Evaluator, file: Path, console: Console) -> float | None:
    """Perplexity of the first test windows in measure.engine; None where there are none."""
    windows, settings = evaluator.bos.before(evaluator.windows_of_engine), evaluator.measure
    if not len(windows):
        return None
    of = (file, windows, evaluator.bos.length, console, settings.engine_repack)
    return perplexity_of(engine_module(settings.engine).mean_loss(*of))


@contextmanager
def _dense_export(evaluator: Evaluator, export: Export, console: Console) -> Iterator[Path]:
    """The dense model as `export` writes it, from the cache."""

    def write(folder: Path) -> dict[str, Any]:
        console.note("exporting the dense model")
        export.write(evaluator.dense, folder)
        return {}

    of = {"export": export.identity, "carried": evaluator.hashes["carried"]}
    key = evaluator.dense_cache.key("dense_export", of, (type(export).__module__,))
    with store.entry("dense_export", key, write) as entry:
        yield entry.folder
