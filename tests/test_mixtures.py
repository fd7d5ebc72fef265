"""Mixtures of experts in training, whose load balance is stock transformers'; and the mixture that is shipped."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CPU
from model_types import tiny_folder
from torch import Tensor
from trainings import training_of, weights_of

from prune_lab.errors import Refused
from prune_lab.models.load import HubModel, Loaded
from prune_lab.recovery.context import TrainingContext
from prune_lab.recovery.distill import Distill
from prune_lab.recovery.finetune import Finetune
from prune_lab.recovery.losses import coefficient_of_balance, distillation_loss, next_token_loss
from prune_lab.recovery.optimizer import lr_factor
from prune_lab.recovery.order import WindowOrder

BATCH = torch.randint(4, 300, (3, 24), generator=torch.Generator().manual_seed(5))
# Of each way to a load balance: experts in every block, in some, with shared ones, with scaled logits, with the
# coefficient in a part of the config, under another name.
TYPES = {
    "mixtral": {"router_aux_loss_coef": 0.05},
    "jamba": {},
    "qwen2_moe": {},
    "granitemoe": {},
    "dbrx": {"ffn_config": {"moe_loss_weight": 0.05}},
    "jetmoe": {},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mixtures")


def loaded_of(place: Path, model_type: str) -> Loaded:
    """A small model of a type, to be changed."""
    folder = place / model_type
    made = folder if folder.exists() else tiny_folder(folder, model_type, **TYPES.get(model_type, {}))
    return HubModel(name=str(made)).load(CPU, seed=0)


def gradients(model: Any, total: Tensor) -> dict[str, Tensor]:
    """Gradients of a loss by every weight that has one."""
    model.zero_grad()
    total.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        largest = float(gradient.abs().max())
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6 * largest, msg=name)


def stock_loss(model: Any, batch: Tensor) -> Any:
    """Output of stock transformers, with the loss that has the routers' in it."""
    return model(input_ids=batch, labels=batch, output_router_logits=True)


@pytest.mark.parametrize("model_type", TYPES)
def test_the_loss_of_a_mixture_is_stocks(model_type: str, place: Path, tmp_path: Path) -> None:
    loaded = loaded_of(place, model_type)
    coefficient = coefficient_of_balance(None, training_of(loaded, tmp_path))
    model = loaded.model.train().requires_grad_(True)
    stock, found = stock_loss(model, BATCH), next_token_loss(0, coefficient)(model, BATCH)
    assert found.balance is not None
    assert float(found.balance) == pytest.approx(stock.aux_loss.item())
    assert coefficient * stock.aux_loss.item() > 1e-3  # so that it would be missed
    assert found.total.item() == pytest.approx(stock.loss.item(), abs=1e-5)
    same(gradients(model, found.total), gradients(model, stock.loss))


def test_under_autocast_the_load_balance_is_that_of_the_float32_model(place: Path) -> None:
    model = loaded_of(place, "mixtral").model.train().requires_grad_(True)
    wanted = next_token_loss(0, 1.0)(model, BATCH)
    of_wanted = gradients(model, wanted.total)
    with torch.autocast("cpu", torch.bfloat16):
        found = next_token_loss(0, 1.0)(model, BATCH)
    assert found.balance is not None
    assert wanted.balance is not None
    assert float(found.balance) == pytest.approx(float(wanted.balance), rel=0.02)
    of_found = gradients(model, found.total)
    for name in (f"model.layers.{block}.mlp.gate.weight" for block in range(3)):
        assert float(torch.cosine_similarity(of_found[name].flatten(), of_wanted[name].flatten(), 0)) > 0.9, name


def test_distillation_of_a_mixture_has_its_balance_too(place: Path, tmp_path: Path) -> None:
    student, teacher = loaded_of(place, "mixtral").model.requires_grad_(True), loaded_of(place, "mixtral").model
    of_text = gradients(student, distillation_loss(teacher, 2.0, 0.3)(student, BATCH).total)
    of_routers = gradients(student, stock_loss(student, BATCH).aux_loss)
    found = gradients(student, distillation_loss(teacher, 2.0, 0.3, balance=0.5)(student, BATCH).total)
    same(found, {name: of_text[name] + 0.5 * of_routers.get(name, torch.zeros(())) for name in of_text})
    training = training_of(loaded_of(place, "mixtral"), tmp_path)
    assert float(Distill().loss(training)(student, BATCH).balance) == stock_loss(student, BATCH).aux_loss.item()  # type: ignore[arg-type]


def test_the_loop_trains_a_mixture_as_a_plain_loop_does(place: Path, tmp_path: Path) -> None:
    """Stock's loss with labels in two parts of a batch, of unequal size, and torch's AdamW."""
    ours, bare = loaded_of(place, "mixtral"), loaded_of(place, "mixtral").model
    told: dict[int, dict[str, float]] = {}
    training = training_of(ours, tmp_path, told.__setitem__)
    recipe = Finetune(steps=3, lr=0.002, batch_size=3, accumulate=2, clip_norm=100.0, autocast="none", validate_every=0)
    recipe.recover(ours.model, training)

    bare.train().requires_grad_(True)
    matrices, others = ([w for w in bare.parameters() if (w.ndim > 1) == wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer, order = (
        torch.optim.AdamW(groups, betas=(0.9, 0.95)),
        WindowOrder(training.tokens.stream("train"), 32, 3, 0),
    )
    for step in range(3):
        for group in optimizer.param_groups:
            group["lr"] = 0.002 * lr_factor(step, 3, recipe.warmup, recipe.final_lr)
        optimizer.zero_grad()
        batch, losses, balances = order.batch(step), 0.0, 0.0
        for part, share in ((batch[:2], 2 / 3), (batch[2:], 1 / 3)):
            output = stock_loss(bare, part)
            (output.loss * share).backward()
            losses, balances = losses + share * output.loss.item(), balances + share * output.aux_loss.item()
        optimizer.step()
    assert told[3]["train/loss"] == pytest.approx(losses, rel=1e-5)
    assert told[3]["train/router_aux_loss"] == pytest.approx(balances, rel=1e-5)
    for name, weight in weights_of(bare).items():
        torch.testing.assert_close(weights_of(ours.model)[name], weight, rtol=0, atol=1e-6, msg=name)


def coefficient_in(training: TrainingContext, asked: float | None) -> tuple[float, list[str]]:
    return coefficient_of_balance(asked, training), training.pruned.warnings


def test_where_there_is_no_load_balance_to_train_on(place: Path, folder: Path, tmp_path: Path) -> None:
    """A dense model has none, and Llama 4's class computes none whatever its config says; which is told."""
    mixtral, llama4 = (training_of(loaded_of(place, name), tmp_path) for name in ("mixtral", "llama4_text"))
    dense = training_of(HubModel(name=str(folder)).load(CPU, 0), tmp_path)
    assert coefficient_in(mixtral, None) == (0.05, [])
    assert coefficient_in(mixtral, 0.5) == (0.5, [])
    assert coefficient_in(mixtral, 0.0) == (0.0, [])
    assert coefficient_in(dense, None) == coefficient_in(dense, 0.0) == (0.0, [])
    coefficient, (note,) = coefficient_in(llama4, None)
    assert coefficient == 0
    assert "coefficient 0.001" in note
    assert "llama4_text" in note
    for training in (dense, llama4):
        with pytest.raises(Refused, match=r"recovery\.router_aux_loss=0\.1 .* type llama.*: give null"):
            coefficient_of_balance(0.1, training)
    student = mixtral.dense.model
    without = Finetune(router_aux_loss=0.0).loss(mixtral)(student, BATCH)
    assert without.balance is None
    assert math.isclose(
        without.total.item(),
        stock_loss(student, BATCH).loss.item() - 0.05 * stock_loss(student, BATCH).aux_loss.item(),
        rel_tol=1e-6,
    )
