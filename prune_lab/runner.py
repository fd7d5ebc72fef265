"""One run from beginning to end."""

from __future__ import annotations

import csv
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prune_lab.compare import compare, compute_figures, engine_figures
from prune_lab.compatibility import check_found_layout, check_low_bit_model, pruning_events
from prune_lab.compressing import Compressed, checkpoints, compress, stopwatch
from prune_lab.config.parts import Parts
from prune_lab.engine_beside import measure_in_engine
from prune_lab.estimate import COMPRESSION, DENSE, MEASURES, TIMING, expected_seconds
from prune_lab.evaluator import Evaluator, open_evaluator
from prune_lab.export.base import Export
from prune_lab.fingerprint import fingerprint
from prune_lab.job_context import JobContext
from prune_lab.measure.accelerate import check_acceleration
from prune_lab.measure.engine import engine_module
from prune_lab.measure.engine_figures import Engine
from prune_lab.measure.measurements import Measurements
from prune_lab.measure.timing import Timings, measure_timings
from prune_lab.models.anatomy import Anatomy, scope_of
from prune_lab.models.load import Loaded
from prune_lab.models.offload.on_disk import weights_on_disk
from prune_lab.models.resize import block_of, original_blocks
from prune_lab.out_of_memory import explained
from prune_lab.pruning.calibration import Calibrator
from prune_lab.results import bounds, outcome, run_warnings, samples
from prune_lab.results.card import CARD, is_card_of, model_card
from prune_lab.results.summary import EXPORT, Summary
from prune_lab.system import device as devices
from prune_lab.system.console import Console
from prune_lab.system.device import Device
from prune_lab.system.environment import describe_environment
from prune_lab.system.files import atomic_folder, atomic_write, owner_suffix, write_text
from prune_lab.system.timing_lock import timing_lock
from prune_lab.system.world import World, join
from prune_lab.tracking.base import Unreachable


def run(parts: Parts, config: dict[str, Any], context: JobContext, console: Console) -> Summary:
    """Runs one experiment, or finds it finished, and returns its summary, written and tracked."""
    device = _resolve_device(parts)
    devices.seed_all(parts.settings.seed)
    world = join(device)
    evaluator = _open(parts, context, device, console, world)
    summary, calibrator = _begin(parts, config, context, evaluator, console)
    outcome.header(summary, console)
    job, id_of_main = world.from_main((context.job, summary.fingerprint))
    if job != context.job:  # one of them was refused before it met the other
        raise RuntimeError(f"this process is at job {context.job} of the sweep, and the first one at job {job}")
    finished = _find_finished(parts, summary, context) if world.is_main else None
    is_finished = world.from_main(finished is not None)
    if finished is not None:
        return _enter_again(parts, finished, summary, context)
    if is_finished:
        return _helped(summary, context)
    amounts = [event.amount for event in pruning_events(parts)[0]]
    parts.method.check_model(Anatomy(evaluator.dense.model), amounts)
    parts.post.check_model(Anatomy(evaluator.dense.model), parts.method.cuts)
    if not world.is_main:
        evaluator.dense_losses(console)
        compressed = compress(parts, evaluator, calibrator, id_of_main, world, context.folder, console)
        evaluator.measure_quality(compressed.loaded, console)
        return _helped(summary, context)
    if console.is_live and (seconds := expected_seconds(parts, evaluator, calibrator)) is not None:
        console.expect(seconds)

    with (
        parts.tracking.start_run(parts.settings.name, summary, context) as log,
        explained(config),  # here too, so that the tracker is told the reason that the job is
    ):
        console.enter(DENSE)
        evaluator.dense_losses(console)  # by all processes; what follows is the dense model's figures in one
        dense = evaluator.baseline(context.sweep, console)
        console.enter(COMPRESSION)
        compressed = compress(parts, evaluator, calibrator, id_of_main, world, context.folder, console, log)
        figures, timings, engine = _measure(parts, evaluator, compressed, summary, context.folder, console)
        metrics = compare(parts.method, dense, figures, timings, compressed.pruned)
        metrics |= engine_figures(engine) if engine is not None else {}
        metrics |= compute_figures(evaluator.macs, compressed.macs) | compressed.seconds
        if (scope := summary.model["scope"]) is not None:
            metrics |= {"scope/share": scope["share"]}
        summary.set_metrics(metrics)
        texts = evaluator.samples(dense, figures)
        summary.samples = [asdict(sample) for sample in texts[: samples.SHOWN]]
        told = [*evaluator.dense.warnings, *evaluator.bos.warnings, *compressed.pruned.warnings]
        told += parts.export.notes(compressed.loaded)
        told += bounds.not_kept(bounds.read_bounds(parts.settings.bound), metrics)
        summary.warnings += told + run_warnings.of_run(summary)
        summary.status = "FINISHED"
        if parts.export.is_kept:
            reading = parts.export.reading(compressed.loaded)
            verdicts = parts.export.loads_in(compressed.loaded, parts.method.cuts)
            summary.loads_in = [asdict(verdict) for verdict in verdicts]
            card = model_card(summary, evaluator.dense.name, context.command, reading, parts.export.library)
            write_text(_export_of(context.folder) / CARD, card)
        files = _write_files(context.folder, compressed, evaluator.dense)
        if evaluator.prompts is not None:
            files.append(write_text(context.folder / samples.FILE, samples.markdown(texts, evaluator.prompts.said)))
        log.result(summary, [summary.write(context.folder), *files])  # it is safe before it is tracked
    if summary.unlogged is not None:
        summary.warnings.append(summary.unlogged)
        summary.write(context.folder)
    _remove_checkpoints(summary)
    return summary


def _resolve_device(parts: Parts) -> Device:
    """The device, which must be able to do what the parts ask of it."""
    device = devices.resolve(parts.settings.device, parts.settings.dtype)
    parts.post.check(device)
    check_acceleration(parts.measure.accelerate, device)
    if parts.measure.engine != "none":
        engine_module(parts.measure.engine).build()
    return device


def _open(parts: Parts, context: JobContext, device: Device, console: Console, world: World) -> Evaluator:
    """The dense model and its text."""
    config = parts.model.config()
    parts.method.check(config, [event.amount for event in pruning_events(parts)[0]])
    parts.export.check_config(config, parts.method.cuts)
    console.note("loading model and text")
    seed_of_weights = parts.settings.seed if parts.model.weights == "random" else 0
    evaluator = open_evaluator(parts.model, parts.dataset, parts.measure, device, seed_of_weights, console, world)
    if evaluator.dense.is_low_bit:
        check_low_bit_model(parts, context.choices, evaluator.dense.name)
    parts.export.check_model(evaluator.dense)
    if (layout := Anatomy(evaluator.dense.model).found) is not None:
        checkpointing = bool(getattr(evaluator.dense.model, "supports_gradient_checkpointing", False))
        check_found_layout(parts, context.choices, evaluator.dense.family, layout, checkpointing)
    return evaluator


def _begin(
    parts: Parts, config: dict[str, Any], context: JobContext, evaluator: Evaluator, console: Console
) -> tuple[Summary, Calibrator | None]:
    """The record of the run, with all that makes it what it is; and what its method sees of the calibration text."""
    calibrator, protocol = None, evaluator.protocol
    if parts.method.calibrated:
        calibrator, stamp = evaluator.calibrator(parts.settings.seed, console)
        if parts.method.in_whole_passes:
            stamp = stamp | {"propagate": "dense", "pass": "the whole model"}
        protocol = protocol | {
            "calibration": stamp | {"solved_width": parts.method.solved_width(Anatomy(evaluator.dense.model))}
        }
    if steps := parts.recovery.training_steps:
        protocol = protocol | {"training": evaluator.training_text(steps, parts.recovery.batch_size)}
    hashes = evaluator.hashes | parts.recovery.hashes(evaluator.dense, evaluator.device)
    summary = Summary(
        status="RUNNING",
        choices=context.choices,
        overrides=context.overrides,
        config=config,
        folder=str(context.folder),
        model=evaluator.dense.describe(),
        environment=describe_environment(evaluator.device) | _engine_build(parts),
        protocol=protocol,
        not_applicable=_not_applicable(parts, context),
        fingerprint=fingerprint(config | {"export": parts.export.identity}, protocol=protocol, hashes=hashes),
    )
    return summary, calibrator


def _engine_build(parts: Parts) -> dict[str, str]:
    """An engine's own words on how it was built, for the record of the environment."""
    engine = parts.measure.engine
    return {"engine": engine_module(engine).build()} if engine != "none" else {}


def _not_applicable(parts: Parts, context: JobContext) -> dict[str, list[str]]:
    """Keys of each group that its option does not use, or lacks where another option of the sweep has them."""
    unused = {group: getattr(parts, group).not_applicable for group in ("method", "recovery", "post", "export")}
    groups = dict.fromkeys([*unused, *context.not_applicable])
    return {group: [*unused.get(group, ()), *context.not_applicable.get(group, ())] for group in groups}


def _find_finished(parts: Parts, summary: Summary, context: JobContext) -> Summary | None:
    """Summary of the same run, finished earlier and with its export if one is asked for."""
    settings = parts.settings
    try:
        found = parts.tracking.find_finished(settings.name, summary.fingerprint) if settings.resume else None
    except Unreachable:
        if context.sweep is None:
            raise
        return None  # the store was there when the sweep began: its jobs go on without it
    return None if found is None or (parts.export.is_kept and not _has_export(found, parts.export)) else found


def _has_export(finished: Summary, export: Export) -> bool:
    """True where a finished run's export is still its own: another run may have used its folder since."""
    folder = _export_of(Path(finished.folder))
    return bool(export.files(folder)) and is_card_of(folder / CARD, finished)


def _export_of(run_folder: Path) -> Path:
    return run_folder / EXPORT


def _enter_again(parts: Parts, finished: Summary, asked: Summary, context: JobContext) -> Summary:
    """Records that the run was asked for again, perhaps in other words, here."""
    finished.overrides, finished.not_applicable = asked.overrides, asked.not_applicable
    parts.tracking.enter_again(parts.settings.name, finished, context)
    finished.warnings += [finished.unlogged] if finished.unlogged is not None else []
    finished.warnings += run_warnings.of_elsewhere(finished, asked.environment)
    finished.write(context.folder)
    _remove_checkpoints(finished)  # it may have been killed before it came to that
    return finished


def _remove_checkpoints(finished: Summary) -> None:
    shutil.rmtree(checkpoints(finished.fingerprint), ignore_errors=True)


def _helped(summary: Summary, context: JobContext) -> Summary:
    """Summary of a process that helped: the main one records."""
    summary.status = "FINISHED"
    summary.write(context.folder)
    return summary


def _measure(
    parts: Parts, evaluator: Evaluator, compressed: Compressed, summary: Summary, folder: Path, console: Console
) -> tuple[Measurements, Timings | None, Engine | None]:
    """Measurements of the compressed model, timings beside the dense one, and both models in another engine."""
    loaded, timings, engine, loads = compressed.loaded, None, None, list[float]()
    console.enter(MEASURES)
    with (
        _saved(loaded, folder, parts.export) as saved,
        stopwatch(compressed.seconds, "time/measure_s"),
    ):
        figures = evaluator.evaluate(loaded, saved, parts.export, console)
        if parts.measure.latency:
            models = evaluator.dense.model, loaded.model
            with timing_lock.exclusive(console.note) as load:
                console.enter(TIMING)
                timings = measure_timings(
                    *models, evaluator.prompt, evaluator.grid, parts.measure, evaluator.device, console
                )
            loads.append(load.cores)
        parts.export.check(loaded.model, saved, evaluator.windows[:1].long(), parts.post.own_kernels)
        if parts.measure.engine != "none":
            engine = measure_in_engine(evaluator, saved, parts.export, figures, console)
            loads += [engine.cores] if engine.cores is not None else []
    if loads:
        summary.environment["cores_used_by_others"] = round(max(loads), 2)
    return figures, timings, engine


@contextmanager
def _saved(loaded: Loaded, run_folder: Path, export: Export) -> Iterator[Path]:
    """The folder into which the model is exported: the run's, or a temporary one."""
    beside = run_folder if weights_on_disk(loaded.model) else None  # on the same disk: its files are linked
    with tempfile.TemporaryDirectory(suffix=owner_suffix(), dir=beside) as temporary:
        folder = _export_of(run_folder) if export.is_kept else Path(temporary) / "model"
        with atomic_folder(folder) as half:
            export.write(loaded, half)
        yield folder


def _left_of(name: str, anatomy: Anatomy, blocks: list[int], model: Any) -> int:
    """Weights that are left of a tensor of the dense model, of which these blocks are there; the others have none."""
    block = block_of(anatomy, name)
    if block not in blocks:
        return 0
    prefix = f"{anatomy.family.blocks}."
    now = f"{prefix}{blocks.index(block)}{name.removeprefix(f'{prefix}{block}')}"
    return int(model.get_parameter(now).numel())


def _write_files(folder: Path, compressed: Compressed, dense: Loaded) -> list[Path]:
    """layers.csv, what was removed from each Linear and what was left alone; and the files that the method leaves.

    What was left alone goes with its block all the same.
    """
    pruned, anatomy = compressed.pruned, Anatomy(dense.model)
    left = {} if dense.is_low_bit else scope_of(anatomy).left_alone
    blocks = original_blocks(Anatomy(compressed.loaded.model)) if left else []
    path = folder / "layers.csv"
    with atomic_write(path) as half, half.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, ["layer", "before", "removed", "left_alone"], restval="")
        table.writeheader()
        table.writerows(asdict(row) for row in pruned.rows)
        inside = {row.layer for row in pruned.rows}
        for name, (reason, weights) in left.items():
            if name in inside or name.removesuffix(".weight") in inside:
                continue
            removed = weights - _left_of(name, anatomy, blocks, compressed.loaded.model)
            table.writerow({"layer": name, "before": weights, "removed": removed, "left_alone": reason})
    for name, content in pruned.files.items():
        with atomic_write(folder / name) as half:
            half.write_bytes(content)
    return [path, *(folder / name for name in pruned.files)]
