"""What tests of trainings share: a training on short stories, one that is interrupted, and weights to compare."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CPU, story
from safetensors import safe_open
from torch import Tensor

from prune_lab.methods.base import Method
from prune_lab.models.anatomy import Anatomy
from prune_lab.models.load import HubModel, Loaded
from prune_lab.pruning.calibration import Calibrator
from prune_lab.pruning.masks import Masks
from prune_lab.pruning.pruned import Pruned
from prune_lab.recovery.context import TrainingContext
from prune_lab.recovery.finetune import Finetune
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
) -> TrainingContext:  # fmt: skip
    """A training in windows of 32 tokens of a model that `masks` have pruned, or that `method` prunes by `schedule`."""
    calibrator = Calibrator(IDS, propagate="dense")

    def prune(amount: float) -> Pruned:
        assert method is not None, "no schedule asked for it"
        return method.prune(Anatomy(loaded.model), amount, 0, calibrator)

    training = TrainingContext(
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


def linears(model: Any) -> dict[str, Any]:
    """The Linears inside the blocks, and GPT-2's Conv1Ds, by name."""
    kinds = ("Linear", "Conv1D")
    return {n: m for n, m in model.named_modules() if type(m).__name__ in kinds and (".layers." in n or ".h." in n)}


def half_masks(model: Any) -> Masks:
    """Random masks of half of every Linear inside the blocks, in the shape of its weight."""
    generator = torch.Generator().manual_seed(5)
    of = linears(model).items()
    return Masks({name: torch.rand(linear.weight.shape, generator=generator) < 0.5 for name, linear in of})


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint is of."""
    with safe_open(checkpoint, framework="pt") as file:
        return int(json.loads(file.metadata()["training"])["step"])


@dataclass(frozen=True)
class Ended:
    """A training that came to its end, or was interrupted.

    steps: those whose loss it told. saved: the step of the checkpoint that it left.
    """

    loaded: Loaded
    training: TrainingContext
    steps: list[int]
    saved: int


def train(
    recipe: Finetune, folder: Path, place: Path, stop_at: int | None = None, *, masked: bool = False,
    watch: Callable[[Any], Log] | None = None, **keys: Any,
) -> Ended:  # fmt: skip
    """Trains the model of a folder, with half of it masked if asked for; interrupts itself at a step.

    watch: makes a log callback of the model. keys: of training_of.
    """
    loaded, steps = HubModel(name=str(folder)).load(CPU, 0), list[int]()
    masks = half_masks(loaded.model) if masked else Masks()
    masks.hold(loaded.model)
    told = watch(loaded.model) if watch else None

    def log(step: int, values: dict[str, float]) -> None:
        if told:
            told(step, values)
        if "train/loss" in values:
            steps.append(step)
            if step == stop_at:
                raise KeyboardInterrupt

    training = training_of(loaded, place, log, masks=masks, steps=recipe.steps, **keys)
    if stop_at is None:
        recipe.recover(loaded.model, training)
    else:
        with pytest.raises(KeyboardInterrupt):
            recipe.recover(loaded.model, training)
    return Ended(loaded, training, steps, step_of(place / "training" / "training.safetensors"))


def interrupted(recipe: Finetune, folder: Path, place: Path, at: int, **keys: Any) -> tuple[Ended, Ended, Ended]:
    """A training that nothing happens to, one cut off at a step, and what went on."""
    torch.manual_seed(1)
    whole = train(recipe, folder, place / "whole", **keys)
    torch.manual_seed(1)
    cut = train(recipe, folder, place / "cut", at, **keys)
    torch.manual_seed(77)  # another process has drawn other numbers
    return whole, cut, train(recipe, folder, place / "cut", **keys)
