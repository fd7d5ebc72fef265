"""Scores of single weights and of units, each against its paper's formula in plain loops or plain autograd."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ALL_FAMILIES, CPU, make_folder, observed
from test_families import BY_HAND, HEAD_DIM, MLP, Parts
from torch import Tensor, nn

from prune_lab.errors import Refused
from prune_lab.methods.ria import Ria
from prune_lab.methods.structured import Structured
from prune_lab.methods.unstructured import Unstructured
from prune_lab.methods.wanda import Wanda
from prune_lab.models.anatomy import Anatomy, UnitLinear, out_in
from prune_lab.models.load import HubModel
from prune_lab.pruning import gradients, scores
from prune_lab.pruning import statistics as gathering
from prune_lab.pruning.calibration import Calibrator
from prune_lab.pruning.pruned import Pruned
from prune_lab.pruning.statistics import BlockObserver, LinearStatistics, RunningStatistics
from prune_lab.pruning.surgery import unit_sums
from prune_lab.pruning.units import unit_scores
from prune_lab.system.console import Console
from prune_lab.system.world import World

QUIET = Console(quiet=True)
# The worked example of algorithms and tests: 2 outputs, 4 inputs, 6 tokens.
GOLDEN_WEIGHT = [[0.5, -1.0, 0.2, 0.8], [-0.3, 0.6, -0.9, 0.1]]
GOLDEN_INPUTS = [[1, 0, 2, -1], [0, 1, 1, 0.5], [2, -1, 0, 1], [1, 1, -1, 0], [0, 2, 1, 1], [-1, 0, 1, 2]]
WINDOWS = torch.randint(300, (4, 20), generator=torch.Generator().manual_seed(3))
ORDERS = {1: "taylor", 2: "taylor2"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One small model of each family, in float32; to be copied, never changed."""
    place = tmp_path_factory.mktemp("scores")
    return {
        family: HubModel(name=str(make_folder(place / family, family))).load(CPU, seed=0).model
        for family in ALL_FAMILIES
    }


def linear(weight: Any) -> nn.Linear:
    values = torch.as_tensor(weight, dtype=torch.float32)
    made = nn.Linear(values.shape[1], values.shape[0], bias=False)
    made.weight = nn.Parameter(values.clone(), requires_grad=False)
    return made


def statistics_of(inputs: Any, *needs: str) -> LinearStatistics:
    """The statistics of these inputs, observed in two batches of different size."""
    rows = torch.as_tensor(inputs, dtype=torch.float32)
    block = nn.Sequential(nn.Linear(rows.shape[1], 1))
    observer = BlockObserver([("x", block[0])], {"x": frozenset(needs)}, stop=False)
    with observer.watch(block):
        for batch in (rows[:4], rows[4:]):
            block(batch)
    return observer.statistics(World())["x"]


def random_weight(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def test_input_norms_of_the_worked_example() -> None:
    norms = statistics_of(GOLDEN_INPUTS, "input_norm").input_norm
    assert norms is not None
    assert norms.tolist() == pytest.approx([2.645751, 2.645751, 2.828427, 2.692582], abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_input_norms_are_sums_in_float32(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of narrow numbers too, a few rows at a time."""
    monkeypatch.setattr(gathering, "IN_CACHE", 21)
    rows, gathered = random_weight(400, 7).to(dtype), RunningStatistics()
    for batch in rows.split(150):
        gathered.add(batch, frozenset({"norm"}))
    norms = gathered.result()["norm"]
    assert norms.dtype == torch.float32
    torch.testing.assert_close(norms.double(), rows.double().norm(dim=0), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("keys", "kept"),
    [
        ({"amount": 0.5}, [[1, 3], [1, 2]]),
        ({"pattern": "2:4"}, [[1, 3], [1, 2]]),
        ({"pattern": "1:4"}, [[1], [2]]),
        ({"amount": 0.0}, [[0, 1, 2, 3], [0, 1, 2, 3]]),
    ],
)
def test_wanda_keeps_what_the_worked_example_says(keys: dict[str, Any], kept: list[list[int]]) -> None:
    """1:4 tells the conventions apart: one is kept."""
    module = linear(GOLDEN_WEIGHT)
    method = Wanda(**keys)
    keep = method.prune_linear("x", module, method.amount, statistics_of(GOLDEN_INPUTS, "input_norm"), Pruned())
    assert [row.nonzero().flatten().tolist() for row in keep] == kept
    assert torch.equal(module.weight, torch.tensor(GOLDEN_WEIGHT) * keep)  # nothing else is changed


@pytest.mark.parametrize("amount", [0.1, 0.5, 0.73])
def test_wanda_with_inputs_of_one_is_magnitude_in_each_row(amount: float) -> None:
    """With heavy ties: these go by the lower index."""
    weight = random_weight(24, 40).mul(8).round().div(8)
    module = linear(weight)
    Wanda(amount=amount).prune_linear("x", module, amount, statistics_of(torch.ones(9, 40), "input_norm"), Pruned())
    expected = weight.clone()
    for row, values in enumerate(weight.abs().tolist()):
        gone = sorted(range(40), key=lambda i: (values[i], i))[: math.floor(40 * amount + 0.5)]
        expected[row, gone] = 0
    assert torch.equal(module.weight, expected)


def test_wanda_is_weight_times_norm() -> None:
    weight, norms = random_weight(5, 7), random_weight(1, 7, seed=1).abs()[0]
    found = scores.wanda(weight, LinearStatistics(input_norm=norms))
    for i in range(5):
        for j in range(7):
            assert float(found[i, j]) == pytest.approx(abs(float(weight[i, j])) * float(norms[j]), rel=1e-6)


def ria_by_hand(weight: Tensor, norms: Tensor) -> Tensor:
    sizes = [[abs(value) for value in row] for row in weight.tolist()]
    found = []
    for i, row in enumerate(sizes):
        found.append([])
        for j, value in enumerate(row):
            of_column, of_row = sum(other[j] for other in sizes), sum(sizes[i])
            shares = (value / of_column if of_column else 0.0) + (value / of_row if of_row else 0.0)
            found[-1].append(shares * math.sqrt(float(norms[j])))
    return torch.tensor(found)


def test_ria_is_that_of_a_double_loop() -> None:
    weight, norms = random_weight(6, 9), random_weight(1, 9, seed=1).abs()[0] * 5
    expected = ria_by_hand(weight, norms)
    torch.testing.assert_close(scores.ria(weight, LinearStatistics(input_norm=norms)), expected, rtol=1e-5, atol=0)
    module = linear(weight)
    Ria(amount=0.5).prune_linear("x", module, 0.5, LinearStatistics(input_norm=norms), Pruned())
    flat = expected.flatten().tolist()
    gone = sorted(range(54), key=lambda i: flat[i])[:27]
    assert sorted((module.weight.flatten() == 0).nonzero().flatten().tolist()) == sorted(gone)


def test_ria_of_rows_and_columns_of_zeros_is_zero_not_undefined() -> None:
    """They are there after an earlier step of a schedule, or behind a dead input."""
    weight = random_weight(4, 5)
    weight[1], weight[:, 2] = 0, 0
    norms = torch.ones(5)
    torch.testing.assert_close(scores.ria(weight, LinearStatistics(input_norm=norms)), ria_by_hand(weight, norms))


def test_wifv_is_squared_weight_times_unbiased_variance() -> None:
    """On inputs with a mean, which a norm would count and a variance must not."""
    inputs = torch.tensor(GOLDEN_INPUTS) + torch.tensor([100.0, 0.0, -3.0, 0.5])
    found = scores.wifv(torch.tensor(GOLDEN_WEIGHT), statistics_of(inputs, "variance"))
    for i in range(2):
        for j in range(4):
            variance = statistics.variance(inputs[:, j].tolist())
            assert float(found[i, j]) == pytest.approx(GOLDEN_WEIGHT[i][j] ** 2 * variance, rel=1e-4)


# Gradients.


def blocks_of(model: Any) -> str:
    return Anatomy(model).family.blocks


def matrices(model: Any) -> dict[str, nn.Parameter]:
    """The two-dimensional weights inside the blocks, by the name of their module."""
    prefix = blocks_of(model)
    return {
        name.removesuffix(".weight"): weight
        for name, weight in model.named_parameters()
        if name.startswith(prefix) and weight.ndim == 2
    }


def plain_saliency(model: Any, order: int) -> dict[str, Tensor]:
    """|w g| or (w g)^2 by plain autograd, one window after the other, in the weight's own layout."""
    model = copy.deepcopy(model).requires_grad_(True)
    sums = {name: torch.zeros_like(weight) for name, weight in matrices(model).items()}
    for window in WINDOWS:
        model.zero_grad()
        model(input_ids=window[None], labels=window[None], use_cache=False).loss.backward()
        for name, weight in matrices(model).items():
            assert weight.grad is not None
            sums[name] += (weight.detach() * weight.grad).abs() ** order
    return {name: value / len(WINDOWS) for name, value in sums.items()}


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("family", "order"),
    [*((family, 1) for family in ("llama", "qwen2", "gemma2", "phi3", "gpt2", "opt", "gpt_neox")), ("gpt2", 2)],
)
def test_saliency_is_that_of_plain_autograd(models: dict[str, Any], family: str, order: int) -> None:
    """Fused and transposed matrices, biases, capped logits: every weight of every Linear in the blocks."""
    model = copy.deepcopy(models[family])
    expected = plain_saliency(model, order)
    found = gradients.saliency(Anatomy(model), WINDOWS, order, QUIET)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.dtype == torch.float32
        close(value, out_in(model.get_submodule(name), expected[name]))


def test_second_order_is_not_the_square_of_the_first(models: dict[str, Any]) -> None:
    """The mean of squares over windows, not the square of a mean."""
    first, second = (gradients.saliency(Anatomy(copy.deepcopy(models["llama"])), WINDOWS, n, QUIET) for n in (1, 2))
    for name, value in first.items():
        assert (second[name] >= value.square() * (1 - 1e-3)).all()
        assert (second[name].sum() > 1.05 * value.square().sum()).all()


@pytest.mark.parametrize("only", [None, {"model.layers.1.mlp.down_proj"}], ids=str)
def test_no_gradient_and_no_hook_is_left_behind(models: dict[str, Any], only: set[str] | None) -> None:
    """Not of embeddings, norms and heads either: they would hold memory, and a recovery would begin with them."""
    model = copy.deepcopy(models["llama"])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = gradients.saliency(Anatomy(model), WINDOWS, 1, QUIET, only=only)
    assert only is None or found.keys() == only
    assert [name for name, weight in model.named_parameters() if weight.grad is not None] == []
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for weight in model.parameters():
        assert not weight._post_accumulate_grad_hooks


def test_a_frozen_model_is_frozen_afterwards(models: dict[str, Any]) -> None:
    model = copy.deepcopy(models["opt"]).requires_grad_(False)
    gradients.saliency(Anatomy(model), WINDOWS[:1], 1, QUIET)
    assert not any(weight.requires_grad for weight in model.parameters())
    assert all(weight.grad is None for weight in model.parameters())


def test_gradients_are_found_where_none_are_recorded(models: dict[str, Any]) -> None:
    """Methods prune without recording gradients."""
    model = copy.deepcopy(models["llama"]).requires_grad_(False)
    with torch.no_grad():
        found = gradients.saliency(Anatomy(model), WINDOWS, 1, QUIET)
    for name, value in plain_saliency(model, 1).items():
        close(found[name], value)


def ranks(values: Tensor) -> Tensor:
    return values.flatten().argsort().argsort().double()


@pytest.mark.parametrize("order", ORDERS)
def test_float16_ranks_about_as_float32_does(models: dict[str, Any], order: int) -> None:
    """Gradients of a mean loss are small: in float16 they must not vanish into zeros, which all tie."""
    full = gradients.saliency(Anatomy(copy.deepcopy(models["llama"])), WINDOWS, order, QUIET)
    half = gradients.saliency(Anatomy(copy.deepcopy(models["llama"]).half()), WINDOWS, order, QUIET)
    for name, value in half.items():
        assert value.dtype == torch.float32
        both = torch.stack([ranks(value), ranks(full[name])])
        assert torch.corrcoef(both)[0, 1] > 0.98
        assert float(value.sum()) == pytest.approx(float(full[name].sum()), rel=0.05)  # in the same unit


def test_a_gradient_that_is_not_finite_is_refused(models: dict[str, Any]) -> None:
    model = copy.deepcopy(models["llama"])
    model.model.norm.weight.data.fill_(1e30)
    model.lm_head.weight.data.mul_(1e30)
    with pytest.raises(Refused, match=r"gradient of model\.layers\.\S+ is not finite: give dtype="):
        gradients.saliency(Anatomy(model), WINDOWS, 1, QUIET)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_unstructured_taylor_drops_the_least_salient(models: dict[str, Any], family: str, order: int) -> None:
    model = copy.deepcopy(models[family])
    expected = plain_saliency(model, order)
    Unstructured(amount=0.5, score=ORDERS[order]).prune(Anatomy(model), 0.5, 0, Calibrator(WINDOWS))
    for name, weight in matrices(model).items():
        gone = weight == 0
        assert int(gone.sum()) == weight.numel() // 2
        assert expected[name][gone].max() <= expected[name][~gone].min() * 1.001


# Units: sums of the saliency of their weights, whose places are read by hand.


def llama_mlp(block: Any, i: int) -> Parts:
    mlp = block.mlp
    return [mlp.gate_proj.weight[i], mlp.up_proj.weight[i], mlp.down_proj.weight[:, i]], []


def llama_group(block: Any, g: int) -> Parts:
    """Two query heads for each key and value head."""
    attention, query = block.self_attn, slice(2 * g * HEAD_DIM, (2 * g + 2) * HEAD_DIM)
    one = slice(g * HEAD_DIM, (g + 1) * HEAD_DIM)
    rows = [attention.q_proj.weight[query], attention.k_proj.weight[one], attention.v_proj.weight[one]]
    return [*rows, attention.o_proj.weight[:, query]], []


READERS = {**BY_HAND, "llama": ("model.layers", llama_mlp, llama_group, 2)}
READERS["qwen2"] = READERS["llama"]


def units_by_hand(model: Any, family: str, kind: str, order: int) -> list[Tensor]:
    """For each block the summed saliency of each unit: weights are replaced by their saliency, then read."""
    blocks, channel, group, groups = READERS[family]
    values, holder = plain_saliency(model, order), copy.deepcopy(model)
    for name, weight in matrices(holder).items():
        weight.data.copy_(values[name])
    read: Callable[[Any, int], Parts] = channel if kind == "mlp" else group
    count = MLP if kind == "mlp" else groups
    return [
        torch.stack([torch.stack([part.detach().sum() for part in read(block, i)[0]]).sum() for i in range(count)])
        for block in holder.get_submodule(blocks)
    ]


def summed(anatomy: Anatomy, kind: str, order: int) -> list[Tensor]:
    """For each block the summed saliency of each unit, reduced to units as the gradients come."""
    of_blocks = anatomy.unit_linears(kind)
    parts: dict[str, UnitLinear] = {part.name: part for of_block in of_blocks for part in of_block}
    found = gradients.saliency(
        anatomy, WINDOWS, order, QUIET, lambda name, values: unit_sums(parts[name], values), set(parts)
    )
    return [torch.stack([found[part.name] for part in of_block]).sum(0) for of_block in of_blocks]


@pytest.mark.parametrize(
    ("family", "kind", "order"),
    [*((family, kind, 1) for family in READERS for kind in ("mlp", "heads")), ("llama", "heads", 2)],
)
def test_the_saliency_of_units_is_the_sum_over_their_weights(
    models: dict[str, Any], family: str, kind: str, order: int
) -> None:
    """Gate and up, and queries, keys and values, also where they are fused."""
    found = summed(Anatomy(copy.deepcopy(models[family])), kind, order)
    for of_block, expected in zip(found, units_by_hand(models[family], family, kind, order), strict=True):
        torch.testing.assert_close(of_block, expected, rtol=1e-3, atol=1e-6 * float(expected.max()))


@pytest.mark.parametrize(("family", "kind"), [("llama", "mlp"), ("llama", "heads"), ("phi3", "heads"), ("gpt2", "mlp")])
def test_structured_taylor_zeroes_the_units_of_least_saliency(models: dict[str, Any], family: str, kind: str) -> None:
    """Saliency is the dense model's, in later blocks too."""
    model = copy.deepcopy(models[family])
    method = Structured(amount=0.5, units=(kind,), score="taylor", physical=False)
    method.prune(Anatomy(model), 0.5, 0, Calibrator(WINDOWS))
    blocks, channel, group, _ = READERS[family]
    read = channel if kind == "mlp" else group
    expected = units_by_hand(models[family], family, kind, 1)
    for block, values in zip(model.get_submodule(blocks), expected, strict=True):
        zeroed = [i for i in range(len(values)) if all(not part.any() for part in read(block, i)[0])]
        assert zeroed == sorted(values.argsort()[: len(values) // 2].tolist())


@pytest.mark.parametrize("score", ["wanda", "wifv"])
def test_activation_scores_of_units_look_at_what_reads_them(models: dict[str, Any], score: str) -> None:
    """A channel's own activation stands at the entrance of the down projection, and nowhere else."""
    model, rows = copy.deepcopy(models["llama"]), []
    down = model.model.layers[0].mlp.down_proj
    hook = down.register_forward_pre_hook(lambda _, args: rows.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        model(input_ids=WINDOWS, use_cache=False)
    hook.remove()
    weight = down.weight.detach()
    by_formula = {
        "wanda": (weight.abs() * rows[0].norm(dim=0)).sum(0),
        "wifv": (weight.square() * rows[0].var(dim=0)).sum(0),
    }
    anatomy = Anatomy(model)
    statistics = next(iter(observed(Calibrator(WINDOWS), anatomy, scores.SCORES[score].needs)))
    found = unit_scores(score, anatomy.unit_linears("mlp")[0], statistics)
    torch.testing.assert_close(found, by_formula[score], rtol=1e-4, atol=1e-6)


def test_a_model_loaded_from_disk_is_ranked_alike_twice(models: dict[str, Any], tmp_path: Path) -> None:
    """One pass leaves nothing that a second one would add to."""
    model = HubModel(name=str(make_folder(tmp_path / "again"))).load(CPU, seed=0).model
    first, second = (gradients.saliency(Anatomy(model), WINDOWS, 1, QUIET) for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
