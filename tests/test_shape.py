"""method=shape does what its methods do one after the other; method=damage says what each axis costs alone."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CPU, Cli, logits, make_folder
from transformers import AutoModelForCausalLM

from prune_lab.errors import Refused
from prune_lab.methods.damage import FILE, Damage
from prune_lab.methods.depth import Depth
from prune_lab.methods.shape import Shape
from prune_lab.methods.structured import Structured
from prune_lab.models.anatomy import Anatomy
from prune_lab.models.export import save_model
from prune_lab.models.load import HubModel, Loaded
from prune_lab.pruning.calibration import Calibrator
from prune_lab.results import outcome

WINDOWS = torch.randint(1, 300, (8, 24), generator=torch.Generator().manual_seed(4))
CALIBRATOR = Calibrator(WINDOWS)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """A Qwen3 of four blocks, hidden size 32, 48 channels and two KV groups; to be copied."""
    place = tmp_path_factory.mktemp("shape") / "qwen3"
    return HubModel(name=str(make_folder(place, "qwen3", num_hidden_layers=4))).load(CPU, seed=0)


def cut(dense: Loaded, calibrator: Calibrator = CALIBRATOR, **keys: Any) -> tuple[Any, Any]:
    model, method = copy.deepcopy(dense.model), Shape(**keys)
    method.check_model(Anatomy(model), [0.0])
    return model, method.prune(Anatomy(model), 0.0, 0, calibrator)


def test_it_is_its_methods_one_after_the_other(dense: Loaded) -> None:
    found, pruned = cut(dense, blocks=3, mlp=32, heads=1, hidden=24)
    wanted = copy.deepcopy(dense.model)
    for method in (
        Depth(amount=1 / 4, by="angle", refit="residual"),
        Structured(amount=1 / 3, units=("mlp",), score="obs", refit="inputs"),
    ):
        method.prune(Anatomy(wanted), method.amount, 0, CALIBRATOR)
    alone, _ = cut(dense, blocks=3, mlp=32)
    assert all(torch.equal(alone.state_dict()[name], tensor) for name, tensor in wanted.state_dict().items())
    assert found.config.num_hidden_layers == 3
    assert found.config.intermediate_size == 32
    assert found.config.num_key_value_heads == 1
    assert found.config.hidden_size == 24
    before, after = (sum(p.numel() for p in m.parameters()) for m in (dense.model, found))
    matrices = [n for n, p in dense.model.named_parameters() if p.dim() > 1]
    assert sum(row.before for row in pruned.rows) == sum(dense.model.get_parameter(n).numel() for n in matrices)
    left = sum(p.numel() for p in found.parameters() if p.dim() > 1)
    assert sum(row.before - row.removed for row in pruned.rows) == left
    assert before - after > sum(row.removed for row in pruned.rows) > 0.4 * before


def test_its_export_is_a_stock_model(dense: Loaded, tmp_path: Path) -> None:
    model, _ = cut(dense, blocks=2, mlp=40, hidden=16)
    save_model(Loaded(model, dense.tokenizer, dense.name, dense.family), tmp_path / "export")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32)
    assert torch.allclose(logits(stock), logits(model), atol=1e-5)


def test_nothing_that_is_given_leaves_the_model_as_it_is(dense: Loaded) -> None:
    for keys in ({}, {"blocks": 4, "mlp": 48, "heads": 2, "hidden": 32}):
        model, pruned = cut(dense, **keys)
        assert torch.equal(logits(model), logits(dense.model))
        assert pruned.realized == 0


@torch.no_grad()
def divergence(dense: Any, model: Any, windows: torch.Tensor) -> float:
    """Mean KL divergence at every target, by PyTorch's own function."""
    found = []
    for window in windows:
        before, after = (m(input_ids=window[None], use_cache=False).logits[0, :-1] for m in (dense, model))
        each = torch.nn.functional.kl_div(
            after.log_softmax(-1), before.log_softmax(-1), log_target=True, reduction="none"
        )
        found.append(each.sum(-1))
    return float(torch.cat(found).double().mean())


@pytest.mark.parametrize("keys", [{"mlp": 24}, {"blocks": 3}, {"hidden": 16}, {"blocks": 3, "mlp": 32, "hidden": 24}])
def test_windows_that_are_held_out_measure_and_do_not_calibrate(dense: Loaded, keys: dict[str, int]) -> None:
    model, pruned = cut(dense, held_out=3, **keys)
    other, _ = cut(dense, Calibrator(WINDOWS[:-3]), **keys)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in other.state_dict().items())
    assert pruned.metrics["shape/kl"] == pytest.approx(divergence(dense.model, model, WINDOWS[-3:]), rel=1e-4)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"blocks": 5}, "method.blocks=5: the model has 4 blocks"),
        ({"mlp": 49}, "method.mlp=49: the model has 48 MLP channels"),
        ({"heads": 3}, "method.heads=3: the model has 2 KV groups"),
        ({"hidden": 33}, "method.hidden=33: the model has 32 hidden channels"),
        ({"experts": 2}, "method.experts: experts of this qwen3 model are not known or none"),
        ({"mlp": 24, "held_out": 8}, "leaves no window of dataset.calibration.n_samples=8"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(dense: Loaded, keys: dict[str, int], says: str) -> None:
    with pytest.raises(Refused, match=says):
        cut(dense, **keys)


def test_the_damage_of_an_axis_is_the_divergence_of_its_cut(dense: Loaded) -> None:
    method, model = Damage(axes=("blocks", "mlp", "hidden"), amounts=(0.25, 0.5), round_to=8, held_out=3), dense.model
    before = copy.deepcopy(model.state_dict())
    pruned = method.prune(Anatomy(model), 0.0, 0, CALIBRATOR)
    found = json.loads(pruned.files[FILE])
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert pruned.realized == 0
    axes = found["axes"]
    assert {name: of["counts"] for name, of in axes.items()} == {"blocks": [3, 2], "mlp": [32, 24], "hidden": [24, 16]}
    assert axes["mlp"]["possible"] == [40, 32, 24]
    assert axes["blocks"]["possible"] == axes["blocks"]["counts"]  # other blocks go at other counts
    for axis, of in axes.items():
        for count, kl in zip(of["counts"], of["kl"], strict=True):
            behind_dense = Calibrator(WINDOWS[:-3], propagate="dense")
            other, _ = cut(dense, behind_dense, **{axis: count})
            assert kl == pytest.approx(divergence(model, other, WINDOWS[-3:]), rel=1e-4), (axis, count)


def test_an_axis_that_a_model_has_not_is_said(folder: Path) -> None:
    """A Llama of four heads in two groups: its config holds each count; of experts it has none."""
    model = HubModel(name=str(folder)).load(CPU, seed=0).model
    pruned = Damage(amounts=(0.5,), round_to=8, held_out=2).prune(Anatomy(model), 0.0, 0, CALIBRATOR)
    found = json.loads(pruned.files[FILE])
    assert "experts" in found["left_out"]
    assert any("experts stay as they are" in warning for warning in pruned.warnings)
    with pytest.raises(Refused, match="no axis of the model can be cut"):
        Damage(axes=("experts",), held_out=2).prune(Anatomy(model), 0.0, 0, CALIBRATOR)


def test_a_shape_is_taken_at_once(cli: Cli, small: list[str]) -> None:
    done = cli(*small, "method=shape", "method.mlp=16", "schedule=iterative", "recovery=finetune", "tracking=none")
    assert done.returncode == 2
    assert "method=shape" in done.stderr
    assert "schedule=one_shot" in done.stderr


def test_a_shape_was_asked_for_no_amount() -> None:
    """Of an amount that was asked for, and of nothing, it is said."""
    lines = {(0.185, 0.0): "0.1850 of the pruned scope", (0.4, 0.4): "0.4000 of the pruned scope (0.4 requested)"}
    lines[0.0, 0.0] = "0.0000 of the pruned scope (0 requested)"
    for (realized, requested), line in lines.items():
        found = outcome.removed({"amount/realized": realized, "amount/requested": requested})
        assert found == f"amount    {line}"
