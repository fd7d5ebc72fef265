"""A training that is interrupted and gone on with ends as one that was not: whatever it trains, prunes and rewinds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from trainings import Ended, interrupted, same, train, weights_of

from prune_lab.methods.base import Method
from prune_lab.methods.depth import Depth
from prune_lab.methods.magnitude import Magnitude
from prune_lab.methods.structured import Structured
from prune_lab.recovery.finetune import Finetune
from prune_lab.recovery.lora import Lora
from prune_lab.schedules import Gradual, Iterative, OneShot, Schedule

SHORT = Finetune(steps=24, lr=0.003, batch_size=4, warmup=0.1, autocast="none", checkpoint_every=4)
DECAYING = replace(SHORT, weight_decay=0.5)
FINETUNE = replace(DECAYING, warmup=0.25, final_lr=0.2, validate_every=0)
LORA = Lora(
    steps=24, lr=0.01, batch_size=4, warmup=0.1, autocast="none", validate_every=0, checkpoint_every=4,
    weight_decay=0.5, rank=4, scale=1.5, dropout=0.1,
)  # fmt: skip
BACK_TO_4 = Iterative(rounds=2, start=8, rewind="weights", rewind_to=4)  # prunes before the steps 8 and 16
BOTH = ("mlp", "heads")
Case = tuple[Finetune, Method | None, Schedule | None]
CASES: dict[str, Case] = {
    "finetune": (SHORT, None, None),
    "finetune with dropout": (replace(SHORT, dropout=0.2), None, None),
    "finetune, gradual": (DECAYING, Magnitude(amount=0.6), Gradual(end=0.9, interval=3)),
    "finetune, units in rounds": (DECAYING, Structured(amount=0.5, score="wanda"), Iterative(rounds=4)),
    "finetune, units at once": (DECAYING, Structured(amount=0.5, units=BOTH), OneShot(start=0.25)),
    "finetune, blocks": (DECAYING, Depth(amount=0.5), OneShot(start=0.25)),
    "lora": (LORA, None, None),
    "lora, gradual": (LORA, Magnitude(amount=0.6), Gradual(end=0.9, interval=3)),
    "lora, units in rounds": (LORA, Structured(amount=0.5), Iterative(rounds=4)),
    "lora, units zeroed": (LORA, Structured(amount=0.5, units=BOTH, physical=False), OneShot(start=0.25)),
    "lora, blocks": (LORA, Depth(amount=0.5), OneShot(start=0.25)),
    "weights to step 4": (FINETUNE, Magnitude(amount=0.6), BACK_TO_4),
    "weights to the start": (FINETUNE, Magnitude(amount=0.6), Iterative(rounds=3, rewind="weights")),
    "weights to just before": (
        FINETUNE, Magnitude(amount=0.6), Iterative(rounds=2, start=12, rewind="weights", rewind_to=11)
    ),
    "learning rate to step 4": (FINETUNE, Magnitude(amount=0.6), replace(BACK_TO_4, rewind="lr")),
    "random weights": (FINETUNE, Magnitude(amount=0.6), Iterative(rounds=2, start=8, rewind="random")),
    "weights of units to step 4": (FINETUNE, Structured(amount=0.5), BACK_TO_4),
    "weights of units to the start": (
        FINETUNE, Structured(amount=0.5, units=BOTH), Iterative(rounds=2, rewind="weights")
    ),
    "random weights of units": (FINETUNE, Structured(amount=0.5), Iterative(rounds=2, start=8, rewind="random")),
    "weights of blocks to step 4": (FINETUNE, Depth(amount=0.5), BACK_TO_4),
}  # fmt: skip


def check(whole: Ended, cut: Ended, again: Ended, at: int) -> None:
    """Weights and their names and shapes, config, masks, table and notes, bit for bit; only what was left is done."""
    assert cut.saved == {10: 8, 20: 16}[at], "interrupted elsewhere than meant"
    assert not same(weights_of(whole.loaded.model), weights_of(cut.loaded.model))
    assert whole.steps == [10, 20, 24]
    assert again.steps == [step for step in whole.steps if step >= at]
    assert same(again.loaded.model.state_dict(), whole.loaded.model.state_dict())
    assert again.loaded.model.config.to_dict() == whole.loaded.model.config.to_dict()
    assert same(again.training.pruned.masks.keep, whole.training.pruned.masks.keep)
    assert again.training.pruned.rows == whole.training.pruned.rows
    assert again.training.pruned.warnings == whole.training.pruned.warnings


@pytest.mark.parametrize(("case", "at"), [(case, 10 if number % 2 else 20) for number, case in enumerate(CASES)])
def test_an_interrupted_training_ends_in_the_same_model(folder: Path, tmp_path: Path, case: str, at: int) -> None:
    """Whether the checkpoint is of before, between or after the prunings."""
    recipe, method, schedule = CASES[case]
    keys: dict[str, Any] = {"method": method, "schedule": schedule}
    check(*interrupted(recipe, folder, tmp_path, at, **keys), at)


def test_the_weights_that_are_pruned_before_it_stay_so(folder: Path, tmp_path: Path) -> None:
    whole, cut, again = interrupted(SHORT, folder, tmp_path, 10, masked=True)
    check(whole, cut, again, 10)
    keep = whole.training.pruned.masks.keep
    assert len(keep) == 14
    for name, mask in keep.items():
        assert (again.loaded.model.get_submodule(name).weight[~mask] == 0).all()


def test_dropout_was_on(folder: Path, tmp_path: Path) -> None:
    """Or the cases with dropout would show nothing of it."""
    for recipe in (replace(SHORT, dropout=0.2), LORA):
        ends = [
            weights_of(train(replace(recipe, dropout=dropout), folder, tmp_path / f"{recipe.lr}{dropout}").loaded.model)
            for dropout in (recipe.dropout, 0.0)
        ]
        assert not same(*ends)
        assert all(torch.isfinite(weight).all() for weight in ends[0].values())
