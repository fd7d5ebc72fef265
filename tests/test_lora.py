"""LoRA: the updates are plain low-rank algebra, pass through the masks, and leave nothing behind."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CPU, Cli, make_folder, story
from safetensors.torch import load_file
from torch import Tensor, nn
from trainings import IDS, half_masks, linears, training_of, weights_of

from prune_lab.methods.magnitude import Magnitude
from prune_lab.methods.structured import Structured
from prune_lab.models.anatomy import Anatomy
from prune_lab.models.load import HubModel, Loaded
from prune_lab.pruning.masks import Masks
from prune_lab.pruning.pruned import Pruned
from prune_lab.recovery import adapters
from prune_lab.recovery import train as loop
from prune_lab.recovery.lora import Lora
from prune_lab.schedules import Gradual, Iterative, OneShot, Schedule

RANK, SCALE = 4, 1.5
RECIPE = Lora(
    steps=24, lr=0.01, batch_size=4, warmup=0.1, autocast="none", validate_every=0, checkpoint_every=4,
    weight_decay=0.5, rank=RANK, scale=SCALE,
)  # fmt: skip


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    was = model.training
    logits: Tensor = model.eval()(input_ids=IDS).logits
    model.train(was)
    return logits


@torch.no_grad()
def computed_weight(linear: Any) -> Tensor:
    """What a Linear multiplies by, shape (out, in), found by giving it the unit vectors."""
    inputs = linear.weight.shape[1] if isinstance(linear, nn.Linear) else linear.weight.shape[0]
    zero = linear(torch.zeros(1, inputs))
    return (linear(torch.eye(inputs)) - zero).T


def update_of(parameters: dict[str, Tensor], name: str, linear: Any, masks: Masks) -> Tensor:
    """SCALE * B A by plain sums, as the weight of a Linear is stored, with zeros where a mask prunes."""
    a, b = parameters[f"{name}.lora_a"], parameters[f"{name}.lora_b"]
    update = SCALE * sum(torch.outer(b[:, i], a[i]) for i in range(RANK))
    stored: Tensor = update if isinstance(linear, nn.Linear) else update.T
    return stored * masks.keep[name] if name in masks.keep else stored


CASES = [("llama", True), ("llama", False), ("gpt2", True), ("gpt2", False), ("qwen2", True)]


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{'masked' if case[1] else 'dense'}")
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Loaded, Masks]:
    """A model, and the masks that it is pruned by, or none."""
    family, masked = request.param
    loaded = HubModel(name=str(make_folder(tmp_path / family, family))).load(CPU, 0)
    masks = half_masks(loaded.model) if masked else Masks()
    masks.hold(loaded.model)
    return loaded, masks


def test_new_adapters_change_nothing(case: tuple[Loaded, Masks]) -> None:
    """B is zero; A is within 1/sqrt(in), fills that range, and depends on the seed alone."""
    loaded, masks = case
    model, expected = loaded.model, logits_of(loaded.model)
    adapters.attach(Anatomy(model), masks, RANK, SCALE, seed=3)
    if "Conv1D" in {type(linear).__name__ for linear in linears(model).values()}:
        torch.testing.assert_close(logits_of(model), expected, rtol=0, atol=1e-5)  # the same sums in another order
    else:
        assert torch.equal(logits_of(model), expected)
    first = {name: linear.lora_a.detach().clone() for name, linear in linears(model).items()}
    for name, linear in linears(model).items():
        assert not linear.lora_b.any()
        bound = 1 / math.sqrt(linear.lora_a.shape[1])
        assert 0.9 * bound < linear.lora_a.abs().max() <= bound, name
    adapters.merge(Anatomy(model), masks, SCALE)
    assert torch.equal(logits_of(model), expected)
    adapters.attach(Anatomy(model), masks, RANK, SCALE, seed=3)
    assert all(torch.equal(linear.lora_a, first[name]) for name, linear in linears(model).items())
    adapters.merge(Anatomy(model), masks, SCALE)
    adapters.attach(Anatomy(model), masks, RANK, SCALE, seed=4)
    assert not any(torch.equal(linear.lora_a, first[name]) for name, linear in linears(model).items())


def test_adapters_and_their_merge_are_the_sum_by_hand(case: tuple[Loaded, Masks]) -> None:
    """Compared with an untouched copy whose weights have scale * B A added, outer product by outer product."""
    loaded, masks = case
    model, by_hand = loaded.model, copy.deepcopy(loaded.model)
    untouched = logits_of(model)
    adapters.attach(Anatomy(model), masks, RANK, SCALE, seed=0)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for linear in linears(model).values():
            linear.lora_b.copy_(torch.randn(linear.lora_b.shape, generator=generator) * 0.1)
        for name, linear in linears(by_hand).items():
            linear.weight += update_of(weights_of(model), name, linear, masks)
    expected = logits_of(by_hand)
    assert (expected - untouched).abs().max() > 0.1
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-5, atol=1e-5)
    adapters.merge(Anatomy(model), masks, SCALE)
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-5, atol=1e-5)
    for name, weight in weights_of(by_hand).items():
        torch.testing.assert_close(weights_of(model)[name], weight, rtol=1e-6, atol=1e-6)
    for name, keep in masks.keep.items():
        assert (model.get_submodule(name).weight[~keep] == 0).all()


def test_the_gradients_of_the_adapters_are_those_of_the_weights_by_the_chain_rule(case: tuple[Loaded, Masks]) -> None:
    """dB = scale (dW * mask) A^T and dA = scale B^T (dW * mask), with dW of the summed weights from plain autograd."""
    loaded, masks = case
    model, by_hand = loaded.model, copy.deepcopy(loaded.model).requires_grad_(True)
    adapters.attach(Anatomy(model), masks, RANK, SCALE, seed=0)
    with torch.no_grad():
        for linear in linears(model).values():
            linear.lora_b.normal_(0, 0.05, generator=torch.Generator().manual_seed(3))
        for name, linear in linears(by_hand).items():
            linear.weight += update_of(weights_of(model), name, linear, masks)
    model(input_ids=IDS, labels=IDS).loss.backward()
    by_hand(input_ids=IDS, labels=IDS).loss.backward()
    for name, linear in linears(model).items():
        stock = by_hand.get_submodule(name)
        grad = stock.weight.grad * masks.keep[name] if name in masks.keep else stock.weight.grad
        grad = grad if isinstance(stock, nn.Linear) else grad.T
        torch.testing.assert_close(linear.lora_b.grad, SCALE * grad @ linear.lora_a.T, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(linear.lora_a.grad, SCALE * linear.lora_b.T @ grad, rtol=1e-3, atol=1e-5)
        assert linear.weight.grad is None


def test_a_training_merges_what_it_trained(case: tuple[Loaded, Masks], tmp_path: Path) -> None:
    """The logits and weights are those that the adapters of the last step give; all else is as it was."""
    loaded, masks = case
    model, start, last = loaded.model, weights_of(loaded.model), dict[str, Any]()

    def look(step: int, values: dict[str, float]) -> None:
        last.update(step=step, logits=logits_of(model), weights=weights_of(model))

    RECIPE.recover(model, training_of(loaded, tmp_path, look, masks=masks))
    assert last["step"] == 24
    torch.testing.assert_close(logits_of(model), last["logits"], rtol=1e-5, atol=1e-5)
    adapted = {
        f"{name}.weight": update_of(last["weights"], name, linear, masks) for name, linear in linears(model).items()
    }
    for name, weight in weights_of(model).items():
        if name in adapted:
            assert adapted[name].abs().max() > 1e-3, f"{name} has not been trained"
            torch.testing.assert_close(weight, start[name] + adapted[name], rtol=1e-6, atol=1e-6)
        else:  # embeddings, norms, biases
            assert torch.equal(weight, start[name]), name
    for name, keep in masks.keep.items():
        weight = model.get_submodule(name).weight
        assert (weight[~keep] == 0).all()
        assert (weight[keep] != 0).float().mean() > 0.99


def test_nothing_is_left_of_the_adapters(case: tuple[Loaded, Masks], tmp_path: Path) -> None:
    """The model is stock again: its keys, its classes' own forward; transformers writes and reads it."""
    loaded, masks = case
    model, keys = loaded.model, list(loaded.model.state_dict())
    replace(RECIPE, steps=3).recover(model, training_of(loaded, tmp_path, masks=masks))
    assert list(model.state_dict()) == keys
    assert not [name for name, _ in model.named_parameters() if "lora" in name]
    for module in model.modules():
        assert "forward" not in vars(module)
        assert module.forward.__func__ is type(module).forward
    assert not any(module.training for module in model.modules())
    assert not any(weight.requires_grad for weight in model.parameters())
    model.save_pretrained(tmp_path / "saved")
    stored = load_file(tmp_path / "saved" / "model.safetensors")
    assert not [name for name in stored if "lora" in name]
    again = type(model).from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert torch.equal(logits_of(again), logits_of(model))


def test_only_adapters_are_trained_and_have_optimizer_state(loaded: Loaded, tmp_path: Path) -> None:
    """AdamW's two moments, each as large as the adapters: rank * (in + out) for every Linear in the blocks."""
    seen: list[set[str]] = []

    def look(step: int, values: dict[str, float]) -> None:
        seen.append({name for name, weight in loaded.model.named_parameters() if weight.requires_grad})

    expected = {f"{name}.lora_{part}" for name in linears(loaded.model) for part in "ab"}
    size = sum(RANK * sum(linear.weight.shape) for linear in linears(loaded.model).values())
    replace(RECIPE, steps=4).recover(loaded.model, training_of(loaded, tmp_path, look))
    assert seen == [expected]
    saved = load_file(tmp_path / "training/training.safetensors")
    for moment in ("exp_avg", "exp_avg_sq"):
        prefix = f"optimizer/{moment}/"
        of = {key.removeprefix(prefix): value for key, value in saved.items() if key.startswith(prefix)}
        assert of.keys() == expected
        assert sum(value.numel() for value in of.values()) == size


def test_pruned_weights_take_no_part_after_any_step(
    loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the frozen weights nor what the adapted Linears compute, which the unit vectors show."""
    monkeypatch.setattr(loop, "LOG_EVERY", 1)
    masks, checked = half_masks(loaded.model), list[int]()
    masks.hold(loaded.model)

    def check(step: int, values: dict[str, float]) -> None:
        for name, keep in masks.keep.items():
            linear = loaded.model.get_submodule(name)
            assert (linear.weight[~keep] == 0).all()
            assert (computed_weight(linear)[~keep] == 0).all(), f"{name} at step {step}"
        checked.append(step)

    replace(RECIPE, steps=8).recover(loaded.model, training_of(loaded, tmp_path, check, masks=masks))
    assert checked == list(range(1, 9))


@pytest.mark.parametrize("schedule", [Gradual(end=0.75, interval=2), Iterative(rounds=3, start=0.25)], ids=str)
def test_zeros_grow_as_scheduled_nest_and_stay_at_every_step(
    loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schedule: Schedule
) -> None:
    """Counted in what the Linears compute, adapters and all."""
    monkeypatch.setattr(loop, "LOG_EVERY", 1)
    events, seen = {e.step: e.amount for e in schedule.events(0.7, 24)}, dict[int, dict[str, Tensor]]()

    def look(step: int, values: dict[str, float]) -> None:
        seen[step] = {name: computed_weight(linear) == 0 for name, linear in linears(loaded.model).items()}

    training = training_of(loaded, tmp_path, look, method=Magnitude(amount=0.7), schedule=schedule)
    RECIPE.recover(loaded.model, training)
    assert list(seen) == list(range(1, 25))
    amount = 0.0
    before = {name: torch.zeros_like(zero) for name, zero in seen[1].items()}
    for step, zeros in seen.items():
        amount = events.get(step - 1, amount)  # pruned before the step that `step` counts
        for name, zero in zeros.items():
            assert int(zero.sum()) == int(zero.numel() * amount + 0.5), f"{name} after step {step}"
            assert not (before[name] & ~zero).any()
        before = zeros
    assert amount == 0.7
    for name, linear in linears(loaded.model).items():
        assert torch.equal(linear.weight == 0, before[name])
    assert training.pruned.realized == pytest.approx(0.7, abs=1e-3)


def test_a_pruning_sees_the_trained_weights_and_training_goes_on_from_them(loaded: Loaded, tmp_path: Path) -> None:
    """What is there when a round prunes has been merged, and is what the adapters before computed."""
    model, during, at_pruning = loaded.model, dict[int, dict[str, Tensor]](), list[dict[str, Tensor]]()
    start = {name: linear.weight.clone() for name, linear in linears(model).items()}

    def look(step: int, values: dict[str, float]) -> None:
        during[step] = {name: computed_weight(linear) for name, linear in linears(model).items()}

    training = training_of(loaded, tmp_path, look, method=Magnitude(amount=0.5), schedule=OneShot(start=10), steps=20)
    prune = training.prune

    def watching(amount: float) -> Pruned:
        at_pruning.append({name: linear.weight.clone() for name, linear in linears(model).items()})
        assert not [name for name, _ in model.named_parameters() if "lora" in name]
        return prune(amount)

    training.prune = watching
    replace(RECIPE, steps=20).recover(model, training)
    (merged,) = at_pruning
    for name, weight in merged.items():
        torch.testing.assert_close(weight, during[10][name], rtol=0, atol=1e-5)
        assert (weight - start[name]).abs().max() > 1e-3
        keep = training.pruned.masks.keep[name]
        change = model.get_submodule(name).weight - weight * keep
        assert (change[~keep] == 0).all()
        assert change.abs().max() > 1e-4, f"{name} has not been trained since"


def test_structured_rounds_cut_units_and_train_what_is_left(loaded: Loaded, tmp_path: Path) -> None:
    widths: list[int] = []
    training = training_of(loaded, tmp_path, method=Structured(amount=0.5), schedule=Iterative(rounds=4))
    prune = training.prune

    def counting(amount: float) -> Pruned:
        pruned = prune(amount)
        widths.append(loaded.model.config.intermediate_size)
        return pruned

    training.prune = counting
    RECIPE.recover(loaded.model, training)
    assert widths == [42, 36, 30, 24]
    assert training.pruned.realized == 0.5
    mlp = loaded.model.model.layers[0].mlp
    assert (mlp.up_proj.weight.shape, mlp.down_proj.weight.shape) == ((24, 32), (32, 24))
    loaded.model.save_pretrained(tmp_path / "saved")
    again = type(loaded.model).from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert torch.equal(logits_of(again), logits_of(loaded.model))


def test_the_loss_falls_and_a_pruned_model_recovers(loaded: Loaded, tmp_path: Path) -> None:
    unseen = torch.tensor(loaded.tokenizer(story(99))["input_ids"])[:512].view(16, 32)

    @torch.no_grad()
    def loss() -> float:
        """What transformers itself says of unseen text."""
        return float(loaded.model(input_ids=unseen, labels=unseen).loss)

    masks = half_masks(loaded.model)
    masks.hold(loaded.model)
    before, seen = loss(), dict[int, float]()
    training = training_of(
        loaded, tmp_path, lambda step, values: seen.update({step: values["train/loss"]}), masks=masks
    )
    replace(RECIPE, steps=60, weight_decay=0.0).recover(loaded.model, training)
    assert loss() < 0.9 * before  # embeddings of random values stay as they are, so less than by finetune
    assert list(seen) == [10, 20, 30, 40, 50, 60]
    assert seen[60] < seen[10]


def test_the_number_type_of_the_model_comes_back(folder: Path, tmp_path: Path) -> None:
    """The adapters are float32 while they train, and the merged weights bfloat16, zeros included."""
    device = replace(CPU, dtype=torch.bfloat16)
    loaded = HubModel(name=str(folder)).load(device, 0)
    masks, during = half_masks(loaded.model), set[torch.dtype]()
    masks.hold(loaded.model)

    def look(step: int, values: dict[str, float]) -> None:
        during.update(weight.dtype for weight in loaded.model.parameters())

    replace(RECIPE, steps=2).recover(loaded.model, training_of(loaded, tmp_path, look, masks=masks, device=device))
    assert during == {torch.float32}
    assert {weight.dtype for weight in loaded.model.parameters()} == {torch.bfloat16}
    for name, keep in masks.keep.items():
        assert (loaded.model.get_submodule(name).weight[~keep] == 0).all()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rank", 0), ("rank", -1), ("scale", 0.0), ("scale", -2.0), ("scale", math.nan), ("steps", 0),
        ("dropout", 1.0), ("validate_every", -1),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_refused_by_its_name(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{key}=") as refused:
        Lora(**{key: value})
    assert len(str(refused.value)) < 120


def test_the_command_line_exports_a_plain_pruned_model(small: list[str], cli: Cli, tmp_path: Path) -> None:
    done = cli(
        *small, "measure=quality_only", "tracking=none", "export=hf", "hydra.run.dir=run", "recovery=lora",
        "recovery.steps=10", "recovery.batch_size=4", "recovery.rank=2", "schedule=iterative", "amount=0.5",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    stored = load_file(tmp_path / "run/export/model.safetensors")
    assert not [name for name in stored if "lora" in name]
    pruned = {name: weight for name, weight in stored.items() if name.endswith("_proj.weight")}
    assert len(pruned) == 14
    for name, weight in pruned.items():
        assert int((weight == 0).sum()) == weight.numel() // 2, name
