"""Losses with gradients, the head over some positions at a time: those of whole logits, which are never held."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CPU, make_folder
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from prune_lab.models import loss
from prune_lab.models.anatomy import Anatomy
from prune_lab.models.export import check_logits
from prune_lab.models.load import HubModel
from prune_lab.pruning.gradients import saliency
from prune_lab.recovery.losses import distillation_loss, next_token_loss
from prune_lab.system.console import Console

VOCABULARY, ROWS, PREFIX = 300, 7, 2
BATCH = torch.randint(VOCABULARY, (3, 20), generator=torch.Generator().manual_seed(4))
TARGETS = BATCH[:, PREFIX + 1 :].flatten()
FAMILIES = ("llama", "gemma2", "gpt2", "opt")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    place = tmp_path_factory.mktemp("losses")
    found = {name: HubModel(name=str(make_folder(place / name, name))).load(CPU, 0).model for name in FAMILIES}
    untied = make_folder(place / "untied", tie_word_embeddings=False)
    other = make_folder(place / "other", seed=1)
    return found | {name.name: HubModel(name=str(name)).load(CPU, 0).model for name in (untied, other)}


@pytest.fixture(autouse=True)
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 51 positions 7 at a time: 2 are left over."""
    monkeypatch.setattr(loss, "LEAST", ROWS)
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", 1)


def whole(model: Any) -> Tensor:
    """All logits that predict the text, by stock transformers, shape (tokens, vocabulary)."""
    logits: Tensor = model(input_ids=BATCH, use_cache=False).logits[:, PREFIX:-1].flatten(0, 1).float()
    return logits


def gradients(model: Any, loss_of: Callable[[Any], Tensor]) -> tuple[float, dict[str, Tensor]]:
    """A loss, and its gradient by every weight, the head's and the embedding's too."""
    model = copy.deepcopy(model).requires_grad_(True)
    value = loss_of(model)
    value.backward()
    return float(value.detach()), {name: weight.grad for name, weight in model.named_parameters()}


def same(found: tuple[float, dict[str, Tensor]], expected: tuple[float, dict[str, Tensor]]) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    largest = max(float(gradient.abs().max()) for gradient in expected[1].values())
    for name, gradient in expected[1].items():  # a key's bias has none but for rounding
        near = 1e-6 * float(gradient.abs().max()) + 1e-8 * largest
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=near, msg=name)


@pytest.mark.parametrize("family", [*FAMILIES, "untied"])
def test_training_has_the_gradients_of_whole_logits(models: dict[str, Any], family: str) -> None:
    found = gradients(models[family], lambda model: next_token_loss(PREFIX)(model, BATCH).total)
    same(found, gradients(models[family], lambda model: cross_entropy(whole(model), TARGETS)))


@pytest.mark.parametrize("family", ["llama", "gemma2", "untied"])
def test_distillation_has_the_gradients_of_whole_logits(models: dict[str, Any], family: str) -> None:
    """Gemma 2's logits are capped, the teacher's are not; temperature and alpha as in the paper's formula."""
    teacher, temperature, alpha = models["other"], 2.0, 0.3

    def expected(model: Any) -> Tensor:
        logits = whole(model)
        with torch.no_grad():
            wanted = log_softmax(whole(teacher) / temperature, -1)
        soft = kl_div(log_softmax(logits / temperature, -1), wanted, reduction="batchmean", log_target=True)
        return alpha * temperature**2 * soft + (1 - alpha) * cross_entropy(logits, TARGETS)

    found = gradients(models[family], lambda m: distillation_loss(teacher, temperature, alpha, PREFIX)(m, BATCH).total)
    same(found, gradients(models[family], expected))
    assert all(weight.grad is None for weight in teacher.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_saliency_does_not_depend_on_the_chunks(
    models: dict[str, Any], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = saliency(Anatomy(copy.deepcopy(models[family])), BATCH, 1, Console(quiet=True), prefix=PREFIX)
    monkeypatch.setattr(loss, "LEAST", 1000)
    expected = saliency(Anatomy(copy.deepcopy(models[family])), BATCH, 1, Console(quiet=True), prefix=PREFIX)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6 * float(value.abs().max()))


@pytest.mark.parametrize("what", ["train", "distil", "saliency", "check"])
def test_the_logits_of_a_window_are_never_held(models: dict[str, Any], what: str, tmp_path: Path) -> None:
    """Neither made at once, forward or backward, nor kept in parts for the backward pass."""
    model, made, kept = copy.deepcopy(models["untied"]), list[int](), list[tuple[int, ...]]()
    teacher = copy.deepcopy(models["other"])
    for each in (model, teacher):
        each.lm_head.register_forward_hook(lambda module, inputs, output: made.append(output.numel() // VOCABULARY))

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        if what == "saliency":
            saliency(Anatomy(model), BATCH, 1, Console(quiet=True))
        elif what == "check":
            check_logits(model, copy.deepcopy(model), tmp_path, BATCH[:1])
        else:
            loss_of = distillation_loss(teacher, 1.0, 0.5) if what == "distil" else next_token_loss()
            model.requires_grad_(True)
            loss_of(model, BATCH).total.backward()
    assert made
    assert max(made) == ROWS
    assert [shape for shape in kept if shape[-1:] == (VOCABULARY,)] == []
