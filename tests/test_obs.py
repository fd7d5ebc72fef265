"""Removal of groups of inputs against worked examples, and against trying every group with a refit behind it."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from conftest import ALL_FAMILIES, CPU, make_folder
from test_refit import GRAM, WEIGHT, WINDOWS, loss, outputs, padded
from test_sparsegpt import correlated
from torch import Tensor

from prune_lab.errors import Refused
from prune_lab.methods.structured import Structured
from prune_lab.models.anatomy import Anatomy, out_in
from prune_lab.models.load import HubModel
from prune_lab.pruning.calibration import Calibrator
from prune_lab.pruning.obs import STEPS, per_step, remove_inputs
from prune_lab.pruning.pruned import Pruned
from prune_lab.pruning.refit import refit_columns

# Worked examples: computed by hand from the definitions, in float64.


def singles(columns: int) -> Tensor:
    return torch.arange(columns)[:, None]


def test_columns_of_the_worked_example() -> None:
    found = remove_inputs(WEIGHT, GRAM, singles(4), 2)
    assert found.order.tolist() == [0, 3]
    assert found.kept.tolist() == [1, 2]
    assert found.costs.tolist() == pytest.approx([2.830679, 3.542675], abs=1e-6)
    expected = [[-0.938775, 0.333474], [0.662764, -0.896969], [0.190649, 0.240383]]
    torch.testing.assert_close(found.weight, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6)
    assert found.damping == 0.01
    every = remove_inputs(WEIGHT, GRAM, singles(4), 4, at_once=4)  # all in one step: their costs before any went
    assert every.order.tolist() == [0, 3, 2, 1]
    assert every.costs.tolist() == pytest.approx([2.830679, 3.409599, 3.439716, 4.784312], abs=1e-6)


def test_groups_of_the_worked_example() -> None:
    found = remove_inputs(WEIGHT, GRAM, torch.tensor([[0, 1], [2, 3]]), 1)
    assert found.kept.tolist() == [0]
    assert found.costs.tolist() == pytest.approx([6.893578], abs=1e-6)
    torch.testing.assert_close(
        found.weight, refit_columns(WEIGHT, GRAM, torch.tensor([True, True, False, False])).weight
    )


# Against a refit behind every group that could go.


def tried(
    weight: Tensor, gram: Tensor, groups: Tensor, remove: int, at_once: int, damping: float = 0.01, parts: int = 1
) -> tuple[list[int], list[float]]:
    """Order and costs, from the loss of the damped gram after a closed-form refit without each group in turn.

    parts: of each of which the same number goes.
    """
    damped = gram.double() + damping * gram.double().diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)

    def half_loss(gone: list[int]) -> float:
        keep = torch.ones(len(gram), dtype=torch.bool)
        keep[groups[gone].flatten()] = False
        refitted = refit_columns(weight.double(), gram.double(), keep, damping=damping)
        return loss(weight, padded(refitted.weight, keep), damped) / 2

    order, costs = list[int](), list[float]()
    while len(order) < remove:
        before = half_loss(order)
        size = len(groups) // parts
        full = [part for part in range(parts) if sum(g // size == part for g in order) == remove // parts]
        open_ = [g for g in range(len(groups)) if g not in order and g // size not in full]
        cost = {g: half_loss([*order, g]) - before for g in open_}
        step = sorted(cost, key=lambda g: (cost[g], g))[: min(at_once, remove - len(order))]
        order += step
        costs += [cost[g] for g in step]
    return order, costs


CASES = [  # outputs, groups, width, how many go, at once
    (20, 24, 1, 12, 1),
    (20, 24, 1, 23, 1),
    (6, 24, 1, 17, 5),
    (20, 8, 4, 5, 1),
    (3, 6, 5, 4, 1),
    (20, 6, 3, 5, 2),
]


@pytest.mark.parametrize(("outs", "count", "width", "remove", "at_once"), CASES)
def test_what_goes_is_what_costs_least(outs: int, count: int, width: int, remove: int, at_once: int) -> None:
    """Columns of a group need not lie side by side."""
    weight, gram = (tensor.double() for tensor in correlated(outs, count * width, seed=count + remove))
    groups = torch.randperm(count * width, generator=torch.Generator().manual_seed(1)).view(count, width)
    order, costs = tried(weight, gram, groups, remove, at_once)
    found = remove_inputs(weight, gram, groups, remove, at_once=at_once)
    assert found.order.tolist() == order
    assert found.costs.tolist() == pytest.approx(costs, rel=1e-5)
    assert found.kept.tolist() == sorted(set(range(count)) - set(order))
    keep = torch.ones(count * width, dtype=torch.bool)
    keep[groups[order].flatten()] = False
    whole = padded(refit_columns(weight, gram, keep).weight, keep)
    torch.testing.assert_close(found.weight, whole[:, groups[found.kept].flatten()])


@pytest.mark.parametrize(
    ("count", "width", "remove", "parts"), [(9, 4, 3, 3), (12, 1, 8, 2), (10, 3, 6, 2), (6, 2, 5, 1)]
)
def test_of_each_part_as_many_go(count: int, width: int, remove: int, parts: int) -> None:
    """As query heads of KV groups: the cheapest of those parts that have not lost their number yet."""
    weight, gram = (tensor.double() for tensor in correlated(20, count * width, seed=count))
    groups = torch.arange(count * width).view(count, width)
    order, costs = tried(weight, gram, groups, remove, 1, parts=parts)
    found = remove_inputs(weight, gram, groups, remove, parts=parts)
    assert found.order.tolist() == order
    assert found.costs.tolist() == pytest.approx(costs, rel=1e-5)
    assert torch.bincount(found.order // (count // parts), minlength=parts).tolist() == [remove // parts] * parts
    assert parts == 1 or order != tried(weight, gram, groups, remove, 1)[0]
    still = remove_inputs(weight, torch.zeros_like(gram), groups, remove, parts=parts)
    assert torch.bincount(still.order // (count // parts), minlength=parts).tolist() == [remove // parts] * parts
    assert sorted([*still.order.tolist(), *still.kept.tolist()]) == list(range(count))
    torch.testing.assert_close(still.weight, weight[:, groups[still.kept].flatten()])


@pytest.mark.parametrize("width", [1, 4])
def test_with_a_bias_the_gram_is_centred(width: int) -> None:
    weight, inputs = correlated(12, 32, 3)[0].double(), torch.randn(200, 32, dtype=torch.float64)
    inputs[:, ::4] += 3 * torch.arange(8)  # a mean that costs nothing where the bias makes up for it
    centred, groups = inputs - inputs.mean(0), torch.arange(32).view(-1, width)
    expected = remove_inputs(weight, centred.T @ centred, groups, 4)
    found = remove_inputs(weight, inputs.T @ inputs, groups, 4, inputs.mean(0), len(inputs))
    assert found.order.tolist() == expected.order.tolist()
    assert found.costs.tolist() == pytest.approx(expected.costs.tolist())
    assert found.costs.sum() < 0.9 * remove_inputs(weight, inputs.T @ inputs, groups, 4).costs.sum()


@pytest.mark.parametrize(("count", "width"), [(192, 1), (12, 16)])
@pytest.mark.parametrize("tokens", [40, 3000])
def test_float32_chooses_as_float64(count: int, width: int, tokens: int) -> None:
    """Also with outliers a thousand times as large as the rest, and with fewer tokens than inputs."""
    generator = torch.Generator().manual_seed(tokens)
    columns = count * width
    inputs = torch.randn(tokens, columns, generator=generator) @ (
        torch.eye(columns) + torch.randn(columns, columns, generator=generator) * 1.5 / columns**0.5
    )
    inputs[:, 5] *= 1000
    weight, gram = torch.randn(48, columns, generator=generator), inputs.T @ inputs
    groups = torch.arange(columns).view(count, width)
    one, other = (remove_inputs(weight, gram.to(dtype), groups, count // 2) for dtype in (torch.float32, torch.float64))
    assert one.costs.dtype == one.weight.dtype == torch.float32
    assert len({*one.kept.tolist()} & {*other.kept.tolist()}) >= 0.97 * (count // 2)
    assert one.costs.sum().item() == pytest.approx(other.costs.sum().item(), rel=1e-3)


def test_costs_add_up_to_the_loss_of_the_damped_gram() -> None:
    weight, gram = (tensor.double() for tensor in correlated(20, 40, 4))
    found, keep = remove_inputs(weight, gram, singles(40), 25), torch.zeros(40, dtype=torch.bool)
    keep[found.kept] = True
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(40, dtype=torch.float64)
    assert loss(weight, padded(found.weight, keep), damped) / 2 == pytest.approx(float(found.costs.sum()))


def test_the_scale_of_the_gram_does_not_matter() -> None:
    weight, gram = correlated(20, 40, 4)
    orders = [remove_inputs(weight, gram * scale, singles(40), 25).order.tolist() for scale in (1, 2.0**-20, 2.0**20)]
    assert orders[0] == orders[1] == orders[2]


# Edges.


def test_dead_inputs_and_those_without_weights_go_first_in_order() -> None:
    weight, gram = correlated(20, 32, 0)
    gram[[29, 3]], gram[:, [29, 3]], weight[:, [17, 8]] = 0, 0, 0
    found = remove_inputs(weight, gram, singles(32), 6)
    assert found.order[:4].tolist() == [3, 8, 17, 29]
    assert found.costs[:4].tolist() == [0, 0, 0, 0]
    assert found.costs[4] > 0


def test_of_two_inputs_alike_one_goes_and_the_other_takes_its_place() -> None:
    weight, gram = (tensor.double() for tensor in correlated(20, 32, 0))
    gram[7], gram[:, 7] = gram[8].clone(), gram[:, 8].clone()
    gram[7, 7] = gram[8, 8]
    weight[:, 7:9] *= 4
    found = remove_inputs(weight, gram, singles(32), 12)
    (stays,) = {7, 8} & {*found.kept.tolist()}
    column = found.weight[:, found.kept.tolist().index(stays)]
    assert float((column - weight[:, 7:9].sum(1)).norm()) < 0.3 * float(column.norm())


def test_inputs_that_never_change_cost_nothing() -> None:
    """Zero, or constant before a Linear whose bias makes up for them."""
    weight, groups = correlated(20, 32, 0)[0], torch.arange(32).view(16, 2)
    nothing = remove_inputs(weight, torch.zeros(32, 32), groups, 5)
    inputs = torch.rand(32, generator=torch.Generator().manual_seed(1)).expand(1000, 32)
    constant = remove_inputs(weight, inputs.T @ inputs, groups, 5, inputs.mean(0), 1000)
    for found in (nothing, constant):
        assert found.order.tolist() == [0, 1, 2, 3, 4]
        assert found.costs.tolist() == [0] * 5
        assert torch.equal(found.weight, weight[:, 10:])
    mixed = inputs.clone()
    mixed[:, 5:] += torch.randn(1000, 27, generator=torch.Generator().manual_seed(2))
    found = remove_inputs(weight, mixed.T @ mixed, singles(32), 6, mixed.mean(0), 1000)
    assert found.order[:5].tolist() == [0, 1, 2, 3, 4]
    assert found.costs[:5].tolist() == [0] * 5
    assert found.costs[5] > 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_refused(value: float) -> None:
    weight, gram = correlated(20, 32, 0)
    with pytest.raises(Refused, match="not finite"):
        remove_inputs(weight, gram.index_fill(0, torch.tensor([3]), value), singles(32), 4)
    weight[2, 3] = value
    with pytest.raises(Refused, match=r"removing inputs of x are not finite"):
        remove_inputs(weight, gram, singles(32), 4, name="x")


def test_nothing_is_removed_and_everything() -> None:
    weight, gram = correlated(20, 32, 0)
    none, every = (remove_inputs(weight, gram, singles(32), remove) for remove in (0, 32))
    assert none.order.tolist() == []
    torch.testing.assert_close(none.weight, weight)
    assert sorted(every.order.tolist()) == list(range(32))
    assert every.weight.shape == (20, 0)


def test_the_number_of_steps_is_bounded_for_channels_and_wide_groups_go_one_by_one() -> None:
    assert [per_step(1, remove) for remove in (1, 32, 33, 768, 7168)] == [1, 1, 2, 24, 224]
    assert all(math.ceil(remove / per_step(1, remove)) <= STEPS for remove in range(1, 3000))
    assert [per_step(64, remove) for remove in (1, 40)] == [1, 1]


# The method.


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    place = tmp_path_factory.mktemp("obs")
    return {
        family: HubModel(name=str(make_folder(place / family, family))).load(CPU, seed=0).model
        for family in ALL_FAMILIES
    }


def pruned(model: Any, propagate: str = "pruned", amount: float = 0.5, **keys: Any) -> tuple[Any, Pruned]:
    changed = copy.deepcopy(model)
    method = Structured(**{"score": "obs", "physical": False, **keys})
    return changed, method.prune(Anatomy(changed), amount, 0, Calibrator(WINDOWS, propagate, 4))


@torch.no_grad()
def inputs_of(model: Any, name: str) -> Tensor:
    found: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(
        lambda _, args: found.append(args[0].reshape(-1, args[0].shape[-1]))
    )
    model(input_ids=WINDOWS, use_cache=False)
    hook.remove()
    return found[0].double()


def kept_units(pruned: Pruned, model: Any, kind: str, block: int = 0) -> Tensor:
    reader = Anatomy(model).unit_linears(kind)[block][-1]
    columns = out_in(reader.linear, pruned.masks.keep[reader.name]).all(0)
    return columns.view(-1, reader.widths[0]).all(1)


@pytest.mark.parametrize("refit", ["none", "bias", "inputs"])
@pytest.mark.parametrize("kind", ["mlp", "heads"])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_units_go_as_their_loss_was_tried(models: dict[str, Any], family: str, kind: str, refit: str) -> None:
    """From inputs of a stock forward pass; centred where the refit moves a bias."""
    model = models[family]
    reader = Anatomy(model).unit_linears(kind)[0][-1]
    count = Anatomy(model).unit_count(kind)
    _, result = pruned(model, units=(kind,), amount=2 / 48 if kind == "mlp" else 0.5, refit=refit)
    inputs = inputs_of(model, reader.name)
    if refit != "none" and reader.linear.bias is not None:
        inputs = inputs - inputs.mean(0)
    groups = torch.arange(inputs.shape[1]).view(count, -1)
    weight = reader.weight.detach() * inputs.any(0)  # those of dead inputs (of ReLU, in OPT) cost nothing
    order, _ = tried(weight, inputs.T @ inputs, groups, 2 if kind == "mlp" else count // 2, 1)
    gone = (~kept_units(result, model, kind)).nonzero().flatten().tolist()
    assert gone == sorted(order)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_the_outputs_stay_nearer_than_with_scores(models: dict[str, Any], family: str) -> None:
    model = models[family]
    reader = Anatomy(model).unit_linears("mlp")[0][-1].name
    dense, errors = outputs(model, reader), {}
    for score in ("random", "l2", "wanda", "obs"):
        changed, _ = pruned(model, score=score, refit="inputs")
        errors[score] = float((outputs(changed, reader) - dense).square().sum())
    assert errors["obs"] < min(errors[score] for score in ("random", "l2", "wanda"))


def test_what_a_schedule_removed_stays_removed(models: dict[str, Any]) -> None:
    """In steps, with zeros and with cuts."""
    for physical in (False, True):
        model = copy.deepcopy(models["llama"])
        counts, removed = [], []
        for amount in (0.25, 0.5, 0.5, 0.75):
            method = Structured(score="obs", refit="inputs", units=("mlp", "heads"), physical=physical)
            amount = min(amount, 0.5) if physical else amount
            result = method.prune(Anatomy(model), amount, 0, Calibrator(WINDOWS, "pruned", 4))
            down = model.model.layers[1].mlp.down_proj.weight
            counts.append(int((down != 0).any(0).sum()))
            removed.append(result.realized)
        assert counts == ([36, 24, 24, 24] if physical else [36, 24, 24, 12])
        assert removed == sorted(removed)


def test_a_scan_prunes_one_block_at_a_time(models: dict[str, Any]) -> None:
    """The loss increase of each block is that of a copy in which it alone was pruned."""
    model, calibrator = models["gpt2"], Calibrator(WINDOWS, "dense", 4)
    method = Structured(score="obs", physical=False)
    whole, _ = pruned(model, "dense", 0.25)
    found = method.loss_increases(Anatomy(copy.deepcopy(model)), 0, calibrator, (0.25,), "mlp")
    for block, (increase,) in enumerate(found):
        alone = copy.deepcopy(model)
        alone.transformer.h[block].load_state_dict(whole.transformer.h[block].state_dict())
        assert increase == pytest.approx(calibrator.loss(alone) - calibrator.loss(model), abs=1e-5)


def test_a_gram_that_needs_more_damping_is_reported(models: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prune_lab.pruning.gram.DAMPING", 0.001)
    _, result = pruned(models["llama"])
    assert any("model.layers.0.mlp.down_proj: score=obs needed damping 0.01, not 0.001" in w for w in result.warnings)
