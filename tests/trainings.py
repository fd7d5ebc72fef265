"""What tests of trainings share: a training on short stories, and weights to compare."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from conftest import CPU, story
from torch import Tensor

from prune_lab.methods.base import Method, Pruned
from prune_lab.models.anatomy import Anatomy
from prune_lab.models.load import Loaded
from prune_lab.pruning.calibration import Calibrator
from prune_lab.pruning.masks import Masks
from prune_lab.recovery.training import Training
from prune_lab.schedules import Schedule
from prune_lab.system.console import Console
from prune_lab.text.corpus import Documents
from prune_lab.text.tokens import Tokens

STORIES = tuple(story(seed) for seed in range(8))
IDS = torch.randint(300, (4, 16), generator=torch.Generator().manual_seed(1))  # to calibrate on
Log = Callable[[int, dict[str, float]], None]
Weights = dict[str, Tensor]


def training_of(
    loaded: Loaded, place: Path, log: Log | None = None, method: Method | None = None,
    schedule: Schedule | None = None, *, steps: int = 24, masks: Masks | None = None,
    text: tuple[str, ...] = STORIES, validation: tuple[str, ...] = (), **changes: Any,
) -> Training:  # fmt: skip
    """A training in windows of 32 tokens of a model that `masks` have pruned, or that `method` prunes by `schedule`."""
    calibrator = Calibrator(IDS, propagate="dense")

    def prune(amount: float) -> Pruned:
        assert method is not None, "no schedule asked for it"
        return method.prune(Anatomy(loaded.model), amount, 0, calibrator)

    training = Training(
        dense=loaded,
        tokens=Tokens(Documents("stories", text, (), validation, ()), loaded.tokenizer),
        seq_len=32,
        events=schedule.events(method.amount, steps) if schedule and method else [],
        prune=prune,
        device=CPU,
        seed=0,
        console=Console(quiet=True),
        checkpoint=place / "training" / "training.safetensors",
        log=log or (lambda step, values: None),
        pruned=Pruned(masks=masks or Masks()),
        rewind=schedule.rewinding(steps) if schedule else None,
    )
    return replace(training, **changes)


def weights_of(model: Any) -> Weights:
    """Copies of a model's parameters."""
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def same(left: Weights, right: Weights) -> bool:
    """Whether two sets of tensors are equal bit for bit."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
