"""Training a pruned mixture: LoRA of experts by plain algebra and stock gradients, and routers that stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CPU
from model_types import tiny_folder
from torch import Tensor
from trainings import IDS, interrupted, same, training_of, weights_of

from prune_lab.errors import Refused
from prune_lab.methods.experts import Experts
from prune_lab.methods.magnitude import Magnitude
from prune_lab.models.anatomy import Anatomy, routers_of
from prune_lab.models.load import HubModel, Loaded
from prune_lab.models.resize import shape_of
from prune_lab.pruning.masks import Masks
from prune_lab.recovery import adapters
from prune_lab.recovery.finetune import Finetune
from prune_lab.recovery.lora import Lora
from prune_lab.schedules import OneShot

RANK, SCALE = 3, 1.5
# Matrices as (out, in), as (in, out), and with no gate.
TYPES = ["mixtral", "gpt_oss", "nemotron_h"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("expert_adapters")


def load(place: Path, model_type: str) -> Loaded:
    folder = place / model_type
    return HubModel(name=str(folder if folder.exists() else tiny_folder(folder, model_type))).load(CPU, seed=0)


def loss_of(model: Any) -> Tensor:
    loss: Tensor = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    return loss


def fused(model: Any) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if ".experts." in name and p.dim() == 3}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("model_type", TYPES)
def test_updates_and_their_gradients_by_hand(model_type: str, masked: bool, place: Path) -> None:
    """dL/dB = scale G A^T and dL/dA = scale B^T G of each expert, with the gradient G that stock autograd has."""
    loaded, plain = load(place, model_type), load(place, model_type)
    masks = Masks()
    if masked:
        for of in (loaded, plain):
            masks = Magnitude(amount=0.5).prune(Anatomy(of.model), 0.5, 0).masks
    model, before = loaded.model, weights_of(loaded.model)
    adapters.attach(Anatomy(model), masks, RANK, SCALE, seed=3)
    torch.testing.assert_close(loss_of(model), loss_of(plain.model))
    generator = torch.Generator().manual_seed(1)
    updates = dict[str, Tensor]()
    keep = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in fused(plain.model).items()}
    for name in keep:
        for expert in range(len(keep[name])):
            if masked:
                mask = masks.keep[f"{name}.{expert}"]
                keep[name][expert] = mask if mask.shape == keep[name][expert].shape else mask.T
        a, b = (model.get_parameter(f"{name}_lora_{part}") for part in "ab")
        with torch.no_grad():
            b.copy_(torch.randn(b.shape, generator=generator) / 10)
        update = SCALE * torch.einsum("eor,eri->eoi", b, a).detach()
        updates[name] = (update if update.shape == keep[name].shape else update.mT) * keep[name]
        with torch.no_grad():
            plain.model.get_parameter(name).add_(updates[name])
    plain.model.requires_grad_(True)
    loss_of(plain.model).backward()
    found = loss_of(model)
    torch.testing.assert_close(found, loss_of(plain.model))
    found.backward()
    for name in keep:
        gradient = plain.model.get_parameter(name).grad * keep[name]
        a, b = (model.get_parameter(f"{name}_lora_{part}") for part in "ab")
        gradient = gradient if gradient.shape[1:] == (b.shape[1], a.shape[2]) else gradient.mT
        torch.testing.assert_close(b.grad, SCALE * torch.einsum("eoi,eri->eor", gradient, a), rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(a.grad, SCALE * torch.einsum("eor,eoi->eri", b, gradient), rtol=1e-3, atol=1e-6)
    expected = {name: before[name] + update for name, update in updates.items()}
    would = adapters.merged(Anatomy(model), masks, SCALE)
    adapters.merge(Anatomy(model), masks, SCALE)
    assert weights_of(model).keys() == before.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(model.get_parameter(name).detach(), weight)
        assert torch.equal(would[name], model.get_parameter(name))
    torch.testing.assert_close(loss_of(model), found)


def test_gradient_checkpointing_trains_the_same(place: Path, tmp_path: Path) -> None:
    ends = list[dict[str, Tensor]]()
    for checkpointed in (False, True):
        loaded = load(place, "mixtral")
        keys: dict[str, Any] = {"steps": 4, "validate_every": 0, "gradient_checkpointing": checkpointed}
        recipe = Lora(batch_size=2, lr=0.01, rank=RANK, scale=SCALE, **keys)
        recipe.recover(loaded.model, training_of(loaded, tmp_path / str(checkpointed), steps=4))
        ends.append(weights_of(loaded.model))
    for name, weight in ends[0].items():
        torch.testing.assert_close(ends[1][name], weight)


def test_lora_trains_a_pruned_mixture_and_goes_on_after_an_interruption(place: Path, tmp_path: Path) -> None:
    loaded = load(place, "mixtral")
    recipe = Lora(steps=24, batch_size=2, lr=0.01, checkpoint_every=9, validate_every=0, rank=RANK, scale=SCALE)
    # With updates at work the experts would not be found anew: a checkpoint asks for what is known.
    keys: dict[str, Any] = {"method": Experts(amount=0.5, score="random"), "schedule": OneShot()}
    whole, cut, gone_on = interrupted(recipe, place / "mixtral", tmp_path, 20, **keys)
    assert cut.saved == 18
    after = weights_of(whole.loaded.model)
    assert same(after, weights_of(gone_on.loaded.model))
    assert not [name for name in after if "lora" in name]
    moved = [name for name in fused(whole.loaded.model) if after[name].shape[0] == 2]
    assert len(moved) == 2 * loaded.model.config.num_hidden_layers
    before = weights_of(loaded.model)
    assert all(not torch.isin(after[name], before[name]).all() for name in moved)
    assert all(torch.isin(after[name], before[name]).all() for name in after if name.endswith("gate.weight"))


def test_what_was_cut_is_known_while_updates_are_at_work(place: Path) -> None:
    """A checkpoint asks for it; with updates the experts would not be found anew."""
    loaded = load(place, "mixtral")
    Experts(amount=0.5, score="aimer").prune(Anatomy(loaded.model), 0.5, 0)
    adapters.attach(Anatomy(loaded.model), Masks(), RANK, SCALE, seed=3)
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if name.endswith("lora_b"):
                parameter.normal_()
    assert shape_of(Anatomy(loaded.model)).units == {"experts": 2}


def test_masked_experts_stay_zero(place: Path, tmp_path: Path) -> None:
    loaded = load(place, "gpt_oss")
    recipe = Lora(steps=6, batch_size=2, lr=0.01, validate_every=0, rank=RANK, scale=SCALE)
    training = training_of(loaded, tmp_path, method=Magnitude(amount=0.5), schedule=OneShot(), steps=6)
    recipe.recover(loaded.model, training)
    for name, matrix in Anatomy(loaded.model).linears():
        keep = training.pruned.masks.keep[name]
        assert not matrix.weight[~keep].any()
        assert matrix.weight[keep].all()


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "qwen2_moe"])
def test_routers_stay_as_they_are_if_asked_to(model_type: str, place: Path, tmp_path: Path) -> None:
    loaded = load(place, model_type)
    names = {id(p): name for name, p in loaded.model.named_parameters()}
    routers = [names[id(p)] for module in routers_of(loaded.model) for p in module.parameters()]
    assert len(routers) >= loaded.model.config.num_hidden_layers
    for trained in (False, True):
        loaded = load(place, model_type)
        before = {name: weight.clone() for name, weight in weights_of(loaded.model).items()}
        recipe = Finetune(steps=3, batch_size=2, lr=0.01, validate_every=0, train_router=trained)
        recipe.recover(loaded.model, training_of(loaded, tmp_path / f"{trained}", steps=3))
        after = weights_of(loaded.model)
        changed = {name for name in after if not torch.equal(after[name], before[name])}
        assert any(".experts." in name for name in changed)
        assert bool(changed & set(routers)) == trained


def test_routers_of_a_model_without_experts_are_refused(folder: Path) -> None:
    dense = HubModel(name=str(folder)).load(CPU, seed=0)
    with pytest.raises(Refused, match=r"recovery\.train_router=false: models of the type llama have no routers"):
        Finetune(train_router=False).hashes(dense, CPU)


def test_linears_that_are_not_called_are_left_out_and_named(place: Path, tmp_path: Path) -> None:
    """Jamba's recurrent core uses the weight of dt_proj, which an update would not reach."""
    loaded = load(place, "jamba")
    before = {name: weight.clone() for name, weight in weights_of(loaded.model).items()}
    training = training_of(loaded, tmp_path, steps=3)
    Lora(steps=3, batch_size=2, lr=0.01, validate_every=0, rank=RANK, scale=SCALE).recover(loaded.model, training)
    assert any("dt_proj" in warning and "not trained" in warning for warning in training.pruned.warnings)
    for name, weight in weights_of(loaded.model).items():
        if name.endswith("dt_proj.weight"):
            assert torch.equal(weight, before[name])
        if name.endswith("mamba.in_proj.weight"):
            assert not torch.equal(weight, before[name])
