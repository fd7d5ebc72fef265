"""One run from beginning to end: the story of the whole project, top to bottom."""

from __future__ import annotations

import csv
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prune_lab.bench import Bench, open_bench
from prune_lab.cache import cache_folder
from prune_lab.config.parts import Parts
from prune_lab.errors import Refused
from prune_lab.figures import compare, compute_figures
from prune_lab.fingerprint import fingerprint
from prune_lab.measure.accelerate import check_acceleration
from prune_lab.measure.macs import Macs
from prune_lab.measure.timing import measure_timings
from prune_lab.methods.base import Pruned
from prune_lab.models.anatomy import Anatomy
from prune_lab.models.export import check_reload, save_model
from prune_lab.models.load import Loaded
from prune_lab.models.on_disk import weights_on_disk
from prune_lab.out_of_memory import explained
from prune_lab.place import Place
from prune_lab.pruning.calibration import Calibrator
from prune_lab.recovery.base import Training
from prune_lab.results import notes, outcome
from prune_lab.results.card import model_card
from prune_lab.results.summary import Summary
from prune_lab.schedules import Event, Rewind
from prune_lab.streaming import check_streaming
from prune_lab.system import device as devices
from prune_lab.system.console import Console
from prune_lab.system.environment import describe_environment
from prune_lab.system.files import mark, whole_file, write_text
from prune_lab.system.turns import machine
from prune_lab.system.world import World, join
from prune_lab.tracking.base import RunLog, Unreachable


def run(parts: Parts, config: dict[str, Any], place: Place, console: Console) -> Summary:
    """Runs one experiment, or finds it finished, and returns its summary, written and tracked."""
    settings = parts.settings
    _plan(parts)  # what does not fit together is refused before anything is loaded
    check_streaming(parts)
    device = devices.resolve(settings.device, settings.dtype)
    parts.post.check(device)
    check_acceleration(parts.measure.accelerate, device)
    devices.seed_all(settings.seed)
    world = join(device)
    console.note("loading model and text")
    seed_of_weights = settings.seed if parts.model.weights == "random" else 0
    bench = open_bench(parts.model, parts.dataset, parts.measure, device, seed_of_weights, console)
    if bench.dense.is_low_bit and any(place.choices.get(group) != "none" for group in ("method", "recovery", "post")):
        raise Refused(
            f"model.name={bench.dense.name!r} has its weights in few bits already: it can be measured (method=none "
            "recovery=none post=none); to compress it further, give the model that it was made from"
        )
    calibrator, protocol = None, bench.protocol
    if parts.method.calibrated:
        calibrator, stamp = bench.calibrator(settings.seed, console)
        protocol = protocol | {"calibration": stamp}
    summary = Summary(
        status="RUNNING",
        choices=place.choices,
        overrides=place.overrides,
        config=config,
        folder=str(place.folder),
        model=bench.dense.facts(),
        environment=describe_environment(device),
        protocol=protocol,
        not_applicable={group: list(getattr(parts, group).not_applicable) for group in ("method", "recovery", "post")},
        fingerprint=fingerprint(
            config, protocol=protocol, hashes=bench.hashes | parts.recovery.hashes(bench.dense, device)
        ),
    )
    outcome.header(summary, console)
    run_id = world.from_main(summary.fingerprint)
    finished = _find_finished(parts, summary, place) if world.is_main else None
    is_finished = world.from_main(finished is not None)
    if not world.is_main:
        if not is_finished:
            _compress(parts, bench, calibrator, run_id, world, place.folder, console)
        return _helped(summary, place)
    if finished is not None:
        finished.overrides = place.overrides  # the same run may have been asked for in other words
        parts.tracking.enter_again(settings.name, finished, place)
        finished.warnings += [finished.unlogged] if finished.unlogged is not None else []
        finished.write(place.folder)
        return finished

    with parts.tracking.start_run(settings.name, summary, place) as log, explained(config):
        dense = bench.baseline(place.sweep, console)
        loaded, pruned, macs, seconds = _compress(parts, bench, calibrator, run_id, world, place.folder, console, log)
        with (
            _saved(loaded, place.folder, settings.export, parts.post.storage) as folder,
            _stopwatch(seconds, "time/measure_s"),
        ):
            figures = bench.figures(loaded, folder, console)
            timings = None
            if parts.measure.latency:
                models = bench.dense.model, loaded.model
                with machine.alone(console.note) as load:
                    timings = measure_timings(*models, bench.prompt, bench.grid, parts.measure, device, console)
                summary.environment["cores_used_by_others"] = round(load.cores, 2)
            check_reload(loaded.model, folder, bench.windows[:1].long(), parts.post.exact)
        summary.warnings += pruned.notes + notes.of_calibration(protocol)
        metrics = compare(parts.method, dense, figures, timings, pruned)
        metrics |= compute_figures(bench.macs, macs) | seconds
        summary.set_metrics(metrics)
        summary.warnings += notes.of_figures(summary.metrics) + notes.of_energy(protocol, summary.metrics)
        summary.warnings += notes.of_load(summary.environment)
        summary.status = "FINISHED"
        if settings.export:
            card = model_card(summary, bench.dense.name, place.command, parts.post.reading)
            write_text(place.folder / "export" / "README.md", card)
        files = _write_files(place.folder, pruned)
        log.result(summary, [summary.write(place.folder), *files])  # it is safe before it is tracked
    if summary.unlogged is not None:
        summary.warnings.append(summary.unlogged)
        summary.write(place.folder)
    shutil.rmtree(_checkpoints(summary.fingerprint), ignore_errors=True)
    return summary


def _find_finished(parts: Parts, summary: Summary, place: Place) -> Summary | None:
    """The same run, finished earlier and with its export if one is asked for."""
    settings = parts.settings
    try:
        found = parts.tracking.find_finished(settings.name, summary.fingerprint) if settings.resume else None
    except Unreachable:
        if place.sweep is None:
            raise
        return None  # the store was there when the sweep began: its jobs go on without it
    return None if found is None or (settings.export and not (Path(found.folder) / "export").is_dir()) else found


def _helped(summary: Summary, place: Place) -> Summary:
    """What a process leaves that only helped to train: the main one measures and records."""
    summary.status = "FINISHED"
    summary.write(place.folder)
    return summary


def _compress(
    parts: Parts,
    bench: Bench,
    calibrator: Calibrator | None,
    run_id: str,
    world: World,
    folder: Path,
    console: Console,
    log: RunLog | None = None,
) -> tuple[Loaded, Pruned, Macs, dict[str, float]]:
    """Prunes a copy of the dense model as the schedule says while recovery trains it, then post-compresses."""
    seconds = {"time/prune_s": 0.0, "time/recover_s": 0.0, "time/post_s": 0.0}
    loaded, seed = bench.copy_of_dense(folder / ".weights"), parts.settings.seed
    events, rewind = _plan(parts)

    def prune(amount: float) -> Pruned:
        with _stopwatch(seconds, "time/prune_s"):
            return parts.method.prune(Anatomy(loaded.model, bench.facts), amount, seed, calibrator)

    training = Training(
        dense=bench.dense,
        tokens=bench.tokens,
        seq_len=bench.seq_len,
        events=events,
        prune=prune,
        device=bench.device,
        seed=seed,
        console=console,
        checkpoint=_checkpoints(run_id) / "training.safetensors",
        log=log.figures if log is not None else lambda step, values: None,
        rewind=rewind,
        world=world,
    )
    with _stopwatch(seconds, "time/recover_s"):
        parts.recovery.recover(loaded.model, training)
    seconds["time/recover_s"] -= seconds["time/prune_s"]
    macs = bench.count_macs(loaded)  # here, since post-compression may pack the weights away
    with _stopwatch(seconds, "time/post_s"):
        training.pruned.notes += parts.post.compress(Anatomy(loaded.model))
    return loaded, training.pruned, macs, seconds


def _plan(parts: Parts) -> tuple[list[Event], Rewind | None]:
    """When to prune how much, and what to go back to, in the training that recovery does."""
    method, steps = parts.method, parts.recovery.training_steps
    events = parts.schedule.events(method.amount, steps)
    pattern = None if "pattern" in method.not_applicable else getattr(method, "pattern", None)
    if pattern is not None and len(events) > 1:
        raise Refused(
            f"method.pattern={pattern} fixes the amount, which leaves nothing to spread over {len(events)} prunings: "
            "give schedule=one_shot, whose schedule.start says when, or method.pattern=null"
        )
    return events, parts.schedule.rewinding(steps)


def _checkpoints(run_id: str) -> Path:
    """Where a run's training checkpoints lie: found again by the same command, kept until the run is finished."""
    return cache_folder() / "training" / run_id


@contextmanager
def _saved(loaded: Loaded, run_folder: Path, keep: bool, storage: str) -> Iterator[Path]:
    """The model saved as a Hugging Face folder: the run's export, or a temporary one."""
    beside = run_folder if weights_on_disk(loaded.model) else None  # on the same disk: its files are linked
    with tempfile.TemporaryDirectory(suffix=mark(), dir=beside) as temporary:
        folder = run_folder / "export" if keep else Path(temporary) / "model"
        save_model(loaded, folder, storage=storage)
        yield folder


@contextmanager
def _stopwatch(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Adds the seconds that the work inside takes, without those in which it waited for other jobs."""
    began, waited = time.perf_counter(), machine.waited
    yield
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - began - (machine.waited - waited)


def _write_files(folder: Path, pruned: Pruned) -> list[Path]:
    """layers.csv, what was removed from each Linear; and the files that the method leaves."""
    path = folder / "layers.csv"
    with whole_file(path) as half, half.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, ["layer", "before", "removed"])
        table.writeheader()
        table.writerows(asdict(row) for row in pruned.rows)
    for name, content in pruned.files.items():
        with whole_file(folder / name) as half:
            half.write_bytes(content)
    return [path, *(folder / name for name in pruned.files)]
