"""Schedules: when how much is pruned, and that training and pruning go together."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CPU, Cli, make_folder
from torch import Tensor, nn
from trainings import Log, training_of

from prune_lab.errors import Refused
from prune_lab.methods.depth import Depth
from prune_lab.methods.magnitude import Magnitude
from prune_lab.methods.structured import Structured
from prune_lab.models.anatomy import Anatomy
from prune_lab.models.load import HubModel, Loaded
from prune_lab.pruning.pruned import Pruned
from prune_lab.recovery import train as loop
from prune_lab.recovery.finetune import Finetune
from prune_lab.recovery.none import NoRecovery
from prune_lab.recovery.optimizer import follow
from prune_lab.schedules import Gradual, Iterative, OneShot, Schedule

RECIPE = Finetune(steps=24, lr=0.003, batch_size=4, warmup=0.1, autocast="none", checkpoint_every=4, weight_decay=0.5)
WINDOWS = torch.randint(300, (4, 16), generator=torch.Generator().manual_seed(1))


def plan(schedule: Schedule, final: float, steps: int) -> list[tuple[int, float]]:
    return [(event.step, round(event.amount, 9)) for event in schedule.events(final, steps)]


@pytest.mark.parametrize(
    ("schedule", "final", "steps", "expected"),
    [
        (OneShot(), 0.5, 100, [(0, 0.5)]),
        (OneShot(start=0.5), 0.5, 101, [(50, 0.5)]),
        (OneShot(start=30), 0.5, 100, [(30, 0.5)]),
        (OneShot(start=1), 0.5, 100, [(100, 0.5)]),  # after the training
        (OneShot(start=0.5), 0.5, 0, [(0, 0.5)]),  # there is none
        (Iterative(rounds=4), 0.8, 100, [(0, 0.2), (25, 0.4), (50, 0.6), (75, 0.8)]),
        (Iterative(rounds=2, start=0.5), 0.8, 100, [(50, 0.4), (75, 0.8)]),
        (Iterative(rounds=3, spacing="geometric"), 0.875, 90, [(0, 0.5), (30, 0.75), (60, 0.875)]),
        (Iterative(rounds=3), 0.6, 0, [(0, 0.2), (0, 0.4), (0, 0.6)]),
        # 1 - (1 - x)^3 at x = 1/4, 1/2, 3/4
        (Gradual(end=0.4, interval=0.1), 0.64, 100, [(10, 0.37), (20, 0.56), (30, 0.63), (40, 0.64)]),
        (Gradual(start=20, end=40, interval=10), 0.8, 100, [(30, 0.7), (40, 0.8)]),
        (Gradual(start=20, end=40, interval=15), 0.8, 100, [(35, 0.7875), (40, 0.8)]),
    ],
)
def test_the_amounts_by_hand(schedule: Schedule, final: float, steps: int, expected: list[tuple[int, float]]) -> None:
    assert plan(schedule, final, steps) == expected


@pytest.mark.parametrize(
    ("schedule", "steps", "says"),
    [
        (Gradual(), 0, "schedule=gradual prunes while the model trains.*recovery=finetune"),
        (Gradual(start=0.8, end=0.5), 100, r"schedule\.start=0\.8 \(step 80\) is not before schedule\.end=0\.5"),
        (Gradual(end=200), 100, r"schedule\.end=200 is beyond the training of 100 steps"),
        (OneShot(start=101), 100, r"schedule\.start=101 is beyond"),
        (Iterative(rounds=11), 10, r"schedule\.rounds=11 is more than the 10 steps"),
    ],
)
def test_what_does_not_fit_the_training_is_refused(schedule: Schedule, steps: int, says: str) -> None:
    with pytest.raises(Refused, match=says):
        schedule.events(0.5, steps)


@pytest.mark.parametrize(
    ("cls", "keys", "says"),
    [
        (OneShot, {"start": -1}, "start=-1"), (OneShot, {"start": float("nan")}, "start=nan"),
        (Iterative, {"rounds": 0}, "rounds=0"), (Iterative, {"spacing": "cubic"}, "spacing='cubic' is not one of"),
        (Gradual, {"interval": 0}, "interval=0"), (Gradual, {"end": 0}, "end=0"),
    ],
)  # fmt: skip
def test_wrong_keys_are_refused_when_built(cls: Any, keys: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        cls(**keys)


# With a real training.


def linears(model: Any) -> dict[str, Tensor]:
    return {n: m.weight for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in n}


@pytest.mark.parametrize("schedule", [Gradual(end=0.75, interval=2), Iterative(rounds=3, start=0.25)], ids=str)
def test_zeros_grow_as_scheduled_nest_and_stay_at_every_step(
    loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schedule: Schedule
) -> None:
    """AdamW with weight decay and momentum, looked at after each of its steps."""
    monkeypatch.setattr(loop, "LOG_EVERY", 1)
    events, seen = {e.step: e.amount for e in schedule.events(0.7, 24)}, dict[int, dict[str, Tensor]]()

    def look(step: int, values: dict[str, float]) -> None:
        if "train/loss" in values:
            seen[step] = {name: (weight == 0).clone() for name, weight in linears(loaded.model).items()}

    training = training_of(loaded, tmp_path, look, Magnitude(amount=0.7), schedule)
    RECIPE.recover(loaded.model, training)
    assert list(seen) == list(range(1, 25))
    amount, before = (
        0.0,
        {name: torch.zeros_like(weight, dtype=torch.bool) for name, weight in linears(loaded.model).items()},
    )
    for step, zeros in seen.items():
        amount = events.get(step - 1, amount)  # pruned before the step that `step` counts
        for name, zero in zeros.items():
            assert int(zero.sum()) == int(zero.numel() * amount + 0.5), f"{name} after step {step}"
            assert not (before[name] & ~zero).any()
        before = zeros
    assert amount == 0.7
    assert training.pruned.realized == pytest.approx(0.7, abs=1e-3)


def test_structured_rounds_cut_again_and_end_at_the_amount_of_the_dense_model(loaded: Loaded, tmp_path: Path) -> None:
    """48 channels: 42, 36, 30, 24. Counted from what was left, 0.5 in four rounds would leave fewer."""
    widths: list[int] = []
    method = Structured(amount=0.5)
    training = training_of(loaded, tmp_path, None, method, Iterative(rounds=4))
    prune = training.prune

    def counting(amount: float) -> Pruned:
        pruned = prune(amount)
        widths.append(loaded.model.config.intermediate_size)
        return pruned

    training.prune = counting
    RECIPE.recover(loaded.model, training)
    assert widths == [42, 36, 30, 24]
    assert training.pruned.realized == 0.5
    at_once = Structured(amount=0.5)
    other = HubModel(name=loaded.name).load(CPU, 0)
    rows = at_once.prune(Anatomy(other.model), 0.5, 0).rows
    assert training.pruned.rows == rows


def test_blocks_go_in_rounds(tmp_path: Path) -> None:
    loaded = HubModel(name=str(make_folder(tmp_path / "deep", num_hidden_layers=4))).load(CPU, 0)
    training = training_of(loaded, tmp_path, None, Depth(amount=0.75), Iterative(rounds=3))
    RECIPE.recover(loaded.model, training)
    assert len(loaded.model.model.layers) == loaded.model.config.num_hidden_layers == 1
    assert training.pruned.realized == 0.75
    assert len(training.pruned.rows) == 4 * 7


def test_the_optimizer_goes_on_with_the_state_of_what_stays(loaded: Loaded) -> None:
    """Compared with the rows and columns of the old state, picked by hand."""
    model = loaded.model.float().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model(input_ids=WINDOWS, labels=WINDOWS).loss.backward()
    optimizer.step()
    mlp = model.model.layers[1].mlp
    old = {name: getattr(mlp, name).weight for name in ("gate_proj", "up_proj", "down_proj")}
    state = {name: {k: v.clone() for k, v in optimizer.state[weight].items()} for name, weight in old.items()}
    untouched = optimizer.state[model.model.norm.weight]
    pruned = Structured(amount=0.25).prune(Anatomy(model), 0.25, 0)
    mlp = model.model.layers[1].mlp
    kept = [i for i in range(48) if (mlp.gate_proj.weight[:, None] == old["gate_proj"][i]).all(-1).any()]
    assert len(kept) == 36
    follow(optimizer, model, pruned.cuts)
    assert {id(w) for group in optimizer.param_groups for w in group["params"]} == {id(w) for w in model.parameters()}
    for name in ("gate_proj", "up_proj"):
        assert torch.equal(optimizer.state[getattr(mlp, name).weight]["exp_avg"], state[name]["exp_avg"][kept])
    assert torch.equal(optimizer.state[mlp.down_proj.weight]["exp_avg_sq"], state["down_proj"]["exp_avg_sq"][:, kept])
    assert optimizer.state[model.model.norm.weight] is untouched
    assert len(optimizer.state) == len(list(model.parameters()))


def test_parts_of_a_batch_make_the_same_training(folder: Path, tmp_path: Path) -> None:
    """Gradient accumulation: equal but for rounding. Weights alone would not tell: AdamW forgets a gradient's scale."""
    one, parts = (HubModel(name=str(folder)).load(CPU, 0) for _ in range(2))
    losses: dict[str, dict[int, float]] = {"one": {}, "parts": {}}

    def told(who: str) -> Log:
        return lambda step, values: losses[who].update({step: values["train/loss"]})

    RECIPE.recover(one.model, training_of(one, tmp_path / "one", told("one"), Magnitude(), OneShot()))
    replace(RECIPE, accumulate=3).recover(
        parts.model, training_of(parts, tmp_path / "parts", told("parts"), Magnitude(), OneShot())
    )
    assert losses["parts"] == pytest.approx(losses["one"], rel=1e-4)
    assert len(losses["one"]) > 1
    for name, weight in one.model.state_dict().items():
        torch.testing.assert_close(parts.model.state_dict()[name], weight, atol=2e-4, rtol=2e-3)


def test_rounds_without_training_are_one_pruning(loaded: Loaded, tmp_path: Path) -> None:
    at_once = copy.deepcopy(loaded.model)
    Magnitude().prune(Anatomy(at_once), 0.6, 0)
    NoRecovery().recover(loaded.model, training_of(loaded, tmp_path, None, Magnitude(amount=0.6), Iterative(), steps=0))
    assert all(
        torch.equal(a, b)
        for a, b in zip(loaded.model.state_dict().values(), at_once.state_dict().values(), strict=True)
    )


def test_gradual_needs_a_training_and_runs_with_one(small: list[str], cli: Cli, tmp_path: Path) -> None:
    quality = ["measure=quality_only", "tracking=none", "schedule=gradual", "hydra.run.dir=run"]
    refused = cli(*small, *quality)
    assert refused.returncode == 2
    assert "schedule=gradual prunes while the model trains" in refused.stderr
    done = cli(*small, *quality, "model.weights=random", "recovery=finetune", "recovery.steps=20", "amount=0.5")
    assert done.returncode == 0, done.stderr
    assert "0.5000 of the pruned scope" in done.stdout or "0.4999" in done.stdout or "0.5001" in done.stdout
