"""recovery=reconstruct against a plain loop, in every family, and when it is interrupted."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ALL_FAMILIES, CPU, make_folder
from torch import Tensor
from trainings import Weights, same, step_of, training_of, weights_of

from prune_lab.methods.base import Method
from prune_lab.methods.magnitude import Magnitude
from prune_lab.methods.structured import Structured
from prune_lab.models.anatomy import Anatomy
from prune_lab.models.load import HubModel, Loaded
from prune_lab.recovery.context import TrainingContext
from prune_lab.recovery.optimizer import lr_factor
from prune_lab.recovery.order import WindowOrder
from prune_lab.recovery.reconstruct import Reconstruct
from prune_lab.schedules import OneShot

RECIPE = Reconstruct(steps=6, lr=1e-3, batch_size=2, autocast="none", checkpoint_every=1)
MASKED = Magnitude(amount=0.5)
UNITS = Structured(amount=0.5, physical=True)


def pruned_and_trained(
    dense: Loaded, place: Path, method: Method, recipe: Reconstruct = RECIPE, log: Any = None
) -> tuple[Any, TrainingContext]:
    loaded = Loaded(copy.deepcopy(dense.model), dense.tokenizer, dense.name, dense.family)
    training = training_of(loaded, place, log, method, OneShot(), steps=recipe.steps, dense=dense)
    recipe.recover(loaded.model, training)
    return loaded.model, training


def windows_of(training: TrainingContext, recipe: Reconstruct) -> list[Tensor]:
    order = WindowOrder(training.tokens.enough("train", 32), 32, recipe.batch_size, training.seed)
    return [order.batch(step) for step in range(recipe.steps)]


@torch.no_grad()
def calls(model: Any, names: list[str], tokens: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs and outputs of modules in a stock forward pass."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda _, args, out, name=name: found.update({name: (args[0], out)})
        )
        for name in names
    ]
    model(input_ids=tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Loaded]:
    place = tmp_path_factory.mktemp("reconstruct")
    return {
        family: HubModel(name=str(make_folder(place / family, family))).load(CPU, seed=0) for family in ALL_FAMILIES
    }


def test_it_is_adamw_on_the_outputs_of_each_mlp(models: dict[str, Loaded], tmp_path: Path) -> None:
    """A loop written out: the MLP module of each block of Llama by itself, on what enters it in the dense model."""
    dense, both = models["llama"], Structured(amount=0.5, units=("mlp", "heads"))
    found, training = pruned_and_trained(dense, tmp_path, both)
    plain = copy.deepcopy(dense.model)
    both.prune(Anatomy(plain), 0.5, 0)
    for index in range(2):
        name = f"model.layers.{index}.mlp"
        mlp = plain.get_submodule(name)
        mlp.requires_grad_(True)
        optimizer = torch.optim.AdamW(mlp.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
        for step, tokens in enumerate(windows_of(training, RECIPE)):
            inputs, wanted = calls(dense.model, [name], tokens)[name]
            optimizer.param_groups[0]["lr"] = RECIPE.lr * lr_factor(step, RECIPE.steps, 0.1, 0.1)
            ((mlp(inputs) - wanted).square().sum() / wanted.square().sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
    for name, weight in plain.named_parameters():
        if ".mlp." in name:
            torch.testing.assert_close(found.get_parameter(name), weight.detach(), rtol=1e-3, atol=2e-5)


# Split and fused projections, transposed ones, blocks in parallel, norms behind attention and MLP.
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "gpt_neox", "gemma2"])
@pytest.mark.parametrize(
    "method", [MASKED, Structured(amount=0.5, units=("mlp", "heads"), physical=False)], ids=["weights", "units"]
)
def test_outputs_come_nearer_and_all_else_stays(
    models: dict[str, Loaded], family: str, method: Method, tmp_path: Path
) -> None:
    """Of the first block, on the text; pruned weights stay zero, and what is no Linear of a block stays as it was."""
    dense, recipe = models[family], Reconstruct(steps=40, lr=3e-3, batch_size=2, autocast="none")
    found, training = pruned_and_trained(dense, tmp_path, method, recipe)
    before = copy.deepcopy(dense.model)
    method.prune(Anatomy(before), method.amount, 0)
    anatomy = Anatomy(dense.model)
    inside = {name for name, _ in anatomy.linears()}
    for name, keep in training.pruned.masks.keep.items():
        assert not found.get_submodule(name).weight[~keep].any(), name
    for name, weight in found.named_parameters():
        if name.rpartition(".")[0] not in inside:
            assert torch.equal(weight, dense.model.get_parameter(name)), name
        assert not weight.requires_grad
    writers = [of_block[-1].name for kind in anatomy.family.units for of_block in anatomy.unit_linears(kind)][::2]
    tokens = torch.cat(windows_of(training, recipe))
    wanted = calls(dense.model, writers, tokens)
    errors = [
        [float((calls(model, writers, tokens)[name][1] - wanted[name][1]).norm()) for name in writers]
        for model in (found, before)
    ]
    assert all(after < plain for after, plain in zip(*errors, strict=True)), errors


def test_what_was_not_pruned_does_not_learn(models: dict[str, Loaded], tmp_path: Path) -> None:
    """Rounding would be all there is to learn."""
    found, _ = pruned_and_trained(models["llama"], tmp_path, UNITS)
    for name, weight in found.named_parameters():
        if ".self_attn." in name:
            assert torch.equal(weight, models["llama"].model.get_parameter(name)), name


def test_where_nothing_was_pruned_it_says_so(models: dict[str, Loaded], tmp_path: Path) -> None:
    found, training = pruned_and_trained(models["llama"], tmp_path, Structured(amount=0.0))
    assert same(weights_of(found), weights_of(models["llama"].model))
    assert training.pruned.warnings == ["recovery=reconstruct trained nothing: nothing was pruned"]


@pytest.mark.parametrize("method", [MASKED, UNITS], ids=["weights", "units"])
def test_an_interrupted_reconstruction_goes_on(models: dict[str, Loaded], tmp_path: Path, method: Method) -> None:
    def stop(block: int, values: dict[str, float]) -> None:
        if block == 2:
            raise KeyboardInterrupt

    dense, told = models["llama"], list[int]()
    calm, _ = pruned_and_trained(dense, tmp_path / "calm", method)
    with pytest.raises(KeyboardInterrupt):
        pruned_and_trained(dense, tmp_path / "stopped", method, log=stop)
    assert step_of(tmp_path / "stopped" / "training" / "training.safetensors") == 1
    ended, _ = pruned_and_trained(dense, tmp_path / "stopped", method, log=lambda block, values: told.append(block))
    assert told == [2]
    assert same(weights_of(ended), weights_of(calm))


@pytest.mark.parametrize("autocast", ["none", "bfloat16"])
def test_a_model_in_bfloat16_learns_in_float32(tmp_path: Path, autocast: str) -> None:
    """Steps too small for bfloat16 add up: in it, most would be rounded away."""
    folder = make_folder(tmp_path / "model")
    dense = HubModel(name=str(folder)).load(CPU, seed=0)
    dense.model.to(torch.bfloat16)
    recipe = Reconstruct(steps=60, lr=2e-4, batch_size=2, autocast=autocast)
    found, _ = pruned_and_trained(dense, tmp_path, UNITS, recipe)
    before = copy.deepcopy(dense.model)
    UNITS.prune(Anatomy(before), 0.5, 0)
    weights: list[Weights] = [weights_of(model) for model in (found, before)]
    assert {weight.dtype for weight in weights[0].values()} == {torch.bfloat16}
    name = "model.layers.0.mlp.down_proj.weight"
    assert float((weights[0][name] - weights[1][name]).float().abs().mean()) > 1e-3
