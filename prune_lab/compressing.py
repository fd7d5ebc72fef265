"""The compressed model: a copy of the dense one, pruned as the schedule says while recovery trains it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from prune_lab.cache import cache_folder
from prune_lab.compatibility import pruning_events
from prune_lab.config.parts import Parts
from prune_lab.errors import Refused
from prune_lab.evaluator import Evaluator
from prune_lab.measure.macs import Macs
from prune_lab.models.anatomy import Anatomy
from prune_lab.models.load import Loaded
from prune_lab.pruning.calibration import Calibrator
from prune_lab.pruning.pruned import Pruned
from prune_lab.recovery.context import TrainingContext
from prune_lab.system.console import Console
from prune_lab.system.files import temporary_name
from prune_lab.system.timing_lock import timing_lock
from prune_lab.system.world import World
from prune_lab.tracking.base import RunLog

_DIFFERENT = (
    "the processes have pruned the model to different weights, though each had the statistics of all windows: start "
    "them on equal devices with equal versions of PyTorch, or start one"
)


@dataclass(frozen=True)
class Compressed:
    """The compressed model and what became of it; `seconds` are metrics by name."""

    loaded: Loaded
    pruned: Pruned
    macs: Macs
    seconds: dict[str, float]


def compress(
    parts: Parts,
    evaluator: Evaluator,
    calibrator: Calibrator | None,
    run_id: str,
    world: World,
    folder: Path,
    console: Console,
    log: RunLog | None = None,
) -> Compressed:
    """Prunes a copy of the dense model as the schedule says while recovery trains it, then post-compresses."""
    seconds = {"time/prune_s": 0.0, "time/recover_s": 0.0, "time/post_s": 0.0}
    loaded, seed = evaluator.copy_of_dense(temporary_name(folder / "weights")), parts.settings.seed
    events, rewind = pruning_events(parts)

    def prune(amount: float) -> Pruned:
        with stopwatch(seconds, "time/prune_s"):
            pruned = parts.method.prune(Anatomy(loaded.model, evaluator.dense_cache), amount, seed, calibrator)
            if not world.has_same([*loaded.model.parameters(), *pruned.masks.keep.values()]):
                raise Refused(_DIFFERENT)
            return pruned

    training = TrainingContext(
        dense=evaluator.dense,
        tokens=evaluator.tokens,
        seq_len=evaluator.seq_len,
        events=events,
        prune=prune,
        device=evaluator.device,
        seed=seed,
        bos=evaluator.bos,
        console=console,
        checkpoint=checkpoints(run_id) / "training.safetensors",
        log=log.step_metrics if log is not None else lambda step, values: None,
        rewind=rewind,
        world=world,
    )
    with stopwatch(seconds, "time/recover_s"):
        parts.recovery.recover(loaded.model, training)
    seconds["time/recover_s"] -= seconds["time/prune_s"]
    macs = evaluator.count_macs(loaded)  # here, since post-compression may pack the weights away
    with stopwatch(seconds, "time/post_s"):
        training.pruned.warnings += parts.post.compress(Anatomy(loaded.model))
    return Compressed(loaded, training.pruned, macs, seconds)


def checkpoints(run_id: str) -> Path:
    """Folder of a run's training checkpoints: found again by the same command, kept until the run is finished."""
    return cache_folder() / "training" / run_id


@contextmanager
def stopwatch(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Adds the seconds that the work inside takes, without those in which it waited for other jobs."""
    began, waited = time.perf_counter(), timing_lock.waited
    yield
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - began - (timing_lock.waited - waited)
