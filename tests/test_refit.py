"""Refits against worked examples, row-by-row solutions in float64, and the model's own outputs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ALL_FAMILIES, CPU, make_folder, observed
from test_sparsegpt import correlated
from torch import Tensor

from prune_lab.errors import Refused
from prune_lab.methods.depth import Depth
from prune_lab.methods.magnitude import Magnitude
from prune_lab.methods.sparsegpt import SparseGPT
from prune_lab.methods.structured import Structured
from prune_lab.methods.unstructured import Unstructured
from prune_lab.methods.wanda import Wanda
from prune_lab.models.anatomy import Anatomy, out_in
from prune_lab.models.load import HubModel
from prune_lab.models.offload.on_disk import own_copy
from prune_lab.pruning import refit as refits
from prune_lab.pruning.calibration import Calibrator, block_statistics
from prune_lab.pruning.refit import Error, refit_columns, refit_rows

WEIGHT = torch.tensor([[0.5, -1.0, 0.2, 0.8], [-0.3, 0.6, -0.9, 0.1], [0.7, 0.4, 0.3, -0.6]], dtype=torch.float64)
INPUTS = torch.tensor(
    [[1, 0, 2, -1], [0, 1, 1, 0.5], [2, -1, 0, 1], [1, 1, -1, 0], [0, 2, 1, 1], [-1, 0, 1, 2]], dtype=torch.float64
)
GRAM = INPUTS.T @ INPUTS
KEEP = torch.tensor([True, True, False, True])
WANDA = torch.tensor([[0, 1, 0, 1], [0, 1, 1, 0], [1, 0, 0, 1]], dtype=torch.bool)  # its mask at 0.5
WINDOWS = torch.randint(300, (12, 32), generator=torch.Generator().manual_seed(3))


def loss(weight: Tensor, pruned: Tensor, gram: Tensor) -> float:
    """||X (W - W')^T||^2, from X^T X."""
    change = (weight - pruned).double()
    return float(torch.einsum("oi,ij,oj->", change, gram.double(), change))


def padded(columns: Tensor, keep: Tensor) -> Tensor:
    whole = columns.new_zeros(len(columns), len(keep))
    whole[:, keep] = columns
    return whole


# Worked examples: computed by hand from the definitions, in float64.


@pytest.mark.parametrize(
    ("damping", "expected", "error"),
    [
        (0.01, [[0.511801, -0.948575, 0.832044], [-0.353104, 0.368588, -0.044199], [0.717701, 0.477137, -0.551934]],
         6.804146),
        (0.0, None, 6.804082),
        (1e4, [[0.5, -1.0, 0.8], [-0.3, 0.6, 0.1], [0.7, 0.4, -0.6]], 7.52),
    ],
)  # fmt: skip
def test_columns_of_the_worked_example(damping: float, expected: list[list[float]] | None, error: float) -> None:
    found = refit_columns(WEIGHT, GRAM, KEEP, damping=damping)
    if expected is not None:
        torch.testing.assert_close(
            found.weight, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6 if damping < 1 else 1e-3
        )
    assert loss(WEIGHT, padded(found.weight, KEEP), GRAM) == pytest.approx(error, abs=1e-6 if damping < 1 else 1e-2)
    assert found.shift is None
    assert found.damping == damping


def test_columns_of_the_worked_example_with_a_bias() -> None:
    found = refit_columns(WEIGHT, GRAM, KEEP, INPUTS.mean(0), len(INPUTS), damping=0.0)
    expected = [[0.323443, -1.086133, 0.670644], [0.494505, 0.987598, 0.682104], [0.435165, 0.270801, -0.794035]]
    torch.testing.assert_close(found.weight, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6)
    assert found.shift is not None
    assert found.shift.tolist() == pytest.approx([0.340136, -1.530612, 0.510204], abs=1e-6)
    outputs = INPUTS[:, KEEP] @ found.weight.T + found.shift
    assert float((INPUTS @ WEIGHT.T - outputs).square().sum()) == pytest.approx(2.847054, abs=1e-6)


def test_rows_of_the_worked_example() -> None:
    expected = [[0, -1.008725, 0, 0.774476], [0, 0.662764, -0.896969, 0], [0.663005, 0, 0, -0.46167]]
    found = refit_rows(WEIGHT, WEIGHT * WANDA, GRAM, WANDA)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6)
    assert loss(WEIGHT, WEIGHT * WANDA, GRAM) == pytest.approx(5.1525, abs=1e-6)
    assert loss(WEIGHT, found, GRAM) == pytest.approx(4.955939, abs=1e-6)
    first = refit_rows(WEIGHT, WEIGHT * WANDA, GRAM, WANDA, iterations=1)
    assert loss(WEIGHT, first, GRAM) == pytest.approx(4.95922, abs=1e-5)


# Against a solution row by row.


def row_by_row(target: Tensor, gram: Tensor, keep: Tensor, damping: float) -> Tensor:
    damped = gram.double() + damping * gram.double().diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    found = torch.zeros_like(target, dtype=torch.float64)
    for row, (weights, kept) in enumerate(zip(target.double(), keep, strict=True)):
        if kept.any():
            found[row, kept] = torch.linalg.solve(damped[kept][:, kept], damped[kept] @ weights)
    return found


@pytest.mark.parametrize("damping", [0.01, 0.1])
def test_conjugate_gradients_end_at_the_solution_of_each_row(damping: float) -> None:
    weight, gram = correlated(24, 40, seed=1)
    keep = torch.rand(24, 40, generator=torch.Generator().manual_seed(2)) > 0.5
    keep[3] = False  # a row of which nothing stays
    keep[4] = True
    expected = row_by_row(weight, gram, keep, damping)
    found = refit_rows(weight.double(), weight.double() * keep, gram.double(), keep, damping, iterations=60)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
    assert torch.equal(found != 0, keep)
    losses = [
        loss(weight, refit_rows(weight, weight * keep, gram, keep, damping, iterations), gram)
        for iterations in (0, 2, 10)
    ]
    assert losses[0] > losses[1] > losses[2]
    assert losses[2] - loss(weight, expected, gram) < 0.05 * (losses[0] - loss(weight, expected, gram))


@pytest.mark.parametrize("seed", range(5))
def test_a_refit_without_damping_is_never_worse_than_the_cut(seed: int) -> None:
    weight, gram = correlated(20, 32, seed)
    keep = torch.rand(32, generator=torch.Generator().manual_seed(seed)) > 0.4
    rows = torch.rand(20, 32, generator=torch.Generator().manual_seed(seed)) > 0.4
    refitted = refit_columns(weight.double(), gram.double(), keep, damping=0.0)
    assert loss(weight, padded(refitted.weight, keep), gram) <= loss(weight, weight * keep, gram)
    by_row = refit_rows(weight.double(), weight.double() * rows, gram.double(), rows, damping=0.0)
    assert loss(weight, by_row, gram) <= loss(weight, weight * rows, gram)


def test_where_everything_is_kept_nothing_changes() -> None:
    weight, gram = correlated(20, 32, 0)
    assert torch.equal(refit_columns(weight, gram, torch.ones(32, dtype=torch.bool)).weight, weight)
    assert torch.equal(refit_rows(weight, weight, gram, torch.ones(20, 32, dtype=torch.bool)), weight)


def test_the_scale_of_the_gram_does_not_matter() -> None:
    keep = torch.arange(32) % 3 > 0
    weight, gram = (tensor.double() for tensor in correlated(20, 32, 0))
    one, other = (refit_columns(weight, gram * scale, keep).weight for scale in (1, 1e-3))
    torch.testing.assert_close(one, other)


def test_float32_is_as_good_as_float64() -> None:
    weight, gram = correlated(48, 96, 5)
    keep = torch.rand(96, generator=torch.Generator().manual_seed(5)) > 0.5
    rows = torch.rand(48, 96, generator=torch.Generator().manual_seed(5)) > 0.5
    one, other = (
        refit_columns(weight, gram.to(dtype), keep).weight.double() for dtype in (torch.float32, torch.float64)
    )
    assert float((one - other).norm() / other.norm()) < 1e-3
    one, other = (
        refit_rows(weight, weight * rows, gram.to(dtype), rows).double() for dtype in (torch.float32, torch.float64)
    )
    assert float((one - other).norm() / other.norm()) < 1e-3


@pytest.mark.parametrize("outliers", [1.0, 1e3])
@pytest.mark.parametrize("seed", range(3))
def test_products_in_bfloat16_take_off_the_same_error(
    seed: int, outliers: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of weights in bfloat16 alone, also where a few inputs are a thousand times the others."""
    weight, gram = correlated(96, 128, seed)
    scale = torch.ones(128).index_fill_(0, torch.tensor([3, 70]), outliers)
    weight, gram = weight.bfloat16(), gram * scale * scale[:, None]
    keep = torch.rand(96, 128, generator=torch.Generator().manual_seed(seed)) > 0.5
    lost = {}
    for native in (False, True):
        monkeypatch.setattr(refits, "uses_bfloat16", lambda *_, native=native: native)
        lost[native] = loss(weight.float(), refit_rows(weight, weight * keep, gram, keep), gram)
    plain = loss(weight.float(), weight.float() * keep, gram)
    assert lost[False] != lost[True]
    assert plain - lost[True] > 0.99 * (plain - lost[False]) > 0


def test_inputs_that_are_always_zero_or_alike_are_solved_with_damping() -> None:
    weight, gram = correlated(20, 32, 0)
    gram[5] = gram[:, 5] = 0
    gram[7], gram[:, 7] = gram[8].clone(), gram[:, 8].clone()
    gram[7, 7] = gram[8, 8]
    keep = torch.arange(32) % 4 > 0
    found = refit_columns(weight, gram, keep)
    assert found.weight.isfinite().all()
    assert loss(weight, padded(found.weight, keep), gram) < loss(weight, weight * keep, gram)
    with pytest.raises(Refused, match="not finite"):
        refit_columns(weight, gram * float("nan"), keep)


def test_inputs_that_never_change_leave_the_weights_as_they_are() -> None:
    """Zero, or constant before a Linear with a bias, whose shift alone makes up for what goes."""
    weight, _ = correlated(20, 32, 0)
    keep, zero = torch.arange(32) % 4 > 0, torch.zeros(32, 32)
    assert torch.equal(refit_columns(weight, zero, keep).weight, weight[:, keep])
    assert torch.equal(refit_rows(weight, weight * keep, zero, keep.expand(20, 32)), weight * keep)
    inputs = torch.rand(32, generator=torch.Generator().manual_seed(1)).expand(1000, 32)
    found = refit_columns(weight, inputs.T @ inputs, keep, inputs.mean(0), 1000)
    assert torch.equal(found.weight, weight[:, keep])
    torch.testing.assert_close(found.shift, weight[:, ~keep] @ inputs[0, ~keep], rtol=1e-4, atol=1e-4)


# Other targets than the own inputs.

OF_DENSE = INPUTS + torch.linspace(-0.6, 0.8, INPUTS.numel(), dtype=torch.float64).reshape(INPUTS.shape).sin()
WANTED = OF_DENSE @ WEIGHT.T + torch.tensor([0.5, -1.0, 2.0])  # any outputs, (tokens, out)
ERROR = Error(INPUTS.T @ (WANTED - INPUTS @ WEIGHT.T), (WANTED - INPUTS @ WEIGHT.T).mean(0))
RIDGE = 0.01 * float(GRAM.diagonal().mean())


def ridge(inputs: Tensor, wanted: Tensor, towards: Tensor, strength: float) -> Tensor:
    """argmin ||wanted - inputs W'^T||^2 + strength ||W' - towards||^2, by plain least squares."""
    root = strength**0.5
    rows = torch.cat([inputs, root * torch.eye(inputs.shape[1], dtype=torch.float64)])
    return torch.linalg.lstsq(rows, torch.cat([wanted, root * towards.T])).solution.T


def test_columns_for_a_target_are_its_least_squares_solution() -> None:
    found = refit_columns(WEIGHT, GRAM, KEEP, error=ERROR)
    expected = ridge(INPUTS[:, KEEP], WANTED, WEIGHT[:, KEEP], RIDGE)
    torch.testing.assert_close(found.weight, expected)
    assert found.shift is None


def test_columns_and_bias_for_a_target_are_its_least_squares_solution() -> None:
    found = refit_columns(WEIGHT, GRAM, KEEP, INPUTS.mean(0), len(INPUTS), damping=0.0, error=ERROR)
    ones = torch.ones(len(INPUTS), 1, dtype=torch.float64)
    expected = torch.linalg.lstsq(torch.cat([INPUTS[:, KEEP], ones], 1), WANTED).solution.T
    torch.testing.assert_close(found.weight, expected[:, :-1])
    torch.testing.assert_close(found.shift, expected[:, -1])


def test_rows_for_a_target_are_its_least_squares_solution() -> None:
    found = refit_rows(WEIGHT, WEIGHT * WANDA, GRAM, WANDA, error=ERROR)
    assert torch.equal(found != 0, WANDA)
    for row, keep in enumerate(WANDA):
        expected = ridge(INPUTS[:, keep], WANTED[:, row : row + 1], WEIGHT[row : row + 1, keep], RIDGE)
        torch.testing.assert_close(found[row, keep], expected[0])


# Methods.


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    place = tmp_path_factory.mktemp("refit")
    return {
        family: HubModel(name=str(make_folder(place / family, family))).load(CPU, seed=0).model
        for family in ALL_FAMILIES
    }


def pruned(model: Any, method: Any, amount: float = 0.5, propagate: str = "pruned") -> tuple[Any, Any]:
    changed = copy.deepcopy(model)
    result = method.prune(Anatomy(changed), amount, 0, Calibrator(WINDOWS, propagate, 4))
    return changed, result


@torch.no_grad()
def outputs(model: Any, name: str) -> Tensor:
    """Outputs of a module of a stock forward pass, float64."""
    found: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_hook(lambda _, args, out: found.append(out.double()))
    model(input_ids=WINDOWS, use_cache=False)
    hook.remove()
    return found[0]


@torch.no_grad()
def call_of_block(model: Any, index: int, windows: Tensor = WINDOWS) -> dict[str, tuple[Tensor, Tensor]]:
    """Rows of inputs and outputs of a block ("") and of its Linears, in a stock forward pass; float64."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    block = Anatomy(model).blocks[index]
    linears = dict(Anatomy(model).linears_by_block()[index])

    def note(name: str, args: Any, kwargs: Any, out: Any) -> None:
        states = args[0] if args else kwargs["hidden_states"]
        outs = out[0] if isinstance(out, tuple) else out
        found[name] = tuple(tensor.reshape(-1, tensor.shape[-1]).double() for tensor in (states, outs))

    hooks = [
        module.register_forward_hook(lambda _, a, k, out, name=name: note(name, a, k, out), with_kwargs=True)
        for name, module in {"": block, **linears}.items()
    ]
    model(input_ids=windows, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


ADDED = [family for family in ALL_FAMILIES if family not in ("gemma2", "gemma3_text")]


@pytest.mark.parametrize("family", ADDED)
@pytest.mark.parametrize("kinds", [("mlp",), ("heads",), ("heads", "mlp")], ids="+".join)
def test_errors_are_those_of_two_models_side_by_side(
    models: dict[str, Any], family: str, kinds: tuple[str, ...]
) -> None:
    """Of the second block, behind a first one of which half is gone: by hand, from two stock forward passes."""
    dense, model = models[family], copy.deepcopy(models[family])
    anatomy = Anatomy(model)
    writers = {kind: [of_block[-1].name for of_block in anatomy.unit_linears(kind)] for kind in kinds}
    for field in ("dense_error", "residual_error"):
        needs = {name: frozenset({"gram", field}) for names in writers.values() for name in names}
        stream = block_statistics(anatomy, needs, 0, Calibrator(WINDOWS, "pruned", 4))
        first = next(stream)
        for kind in kinds:
            error = first[writers[kind][0]].error
            assert error is not None
            assert not error.product.any()
            assert not error.mean.any()
        with torch.no_grad():
            for _, linear in anatomy.linears_by_block()[0]:
                linear.weight[::2] = 0
        second = next(stream)
        of_dense, of_pruned = call_of_block(dense, 1), call_of_block(model, 1)
        outputs = {name: of_dense[name][1] - of_pruned[name][1] for name in of_dense}
        for kind, names in writers.items():
            wanted = outputs[names[1]]
            if field == "residual_error" and kinds == ("heads",):
                wanted = wanted + of_dense[""][0] - of_pruned[""][0]
            elif field == "residual_error" and kind == "mlp":
                wanted = outputs[""]
                if "heads" in kinds:  # what attention takes on itself
                    wanted = wanted - outputs[writers["heads"][1]]
            expected = of_pruned[names[1]][0].T @ wanted
            error = second[names[1]].error
            assert error is not None
            torch.testing.assert_close(
                error.product.double(), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())
            )
            torch.testing.assert_close(error.mean.double(), wanted.mean(0), rtol=1e-3, atol=1e-4)
        model = copy.deepcopy(dense)
        anatomy = Anatomy(model)


@pytest.mark.parametrize("kept", ["heads", "mlp"])
def test_a_kind_of_which_nothing_goes_takes_on_nothing(models: dict[str, Any], kept: str) -> None:
    """Of both kinds asked for, one rounds to no unit: the other repairs the states as if it were asked for alone."""
    keys = {"score": "wanda", "refit": "residual", "physical": False}
    if kept == "heads":  # 0.2 of 2 groups is none, of 48 channels it is 10
        both, alone = Structured(units=("mlp", "heads"), **keys), Structured(units=("mlp",), **keys)
        amount = 0.2
    else:  # all 48 channels stay, rounded to a multiple of 48, and one of 2 groups goes
        both = Structured(units=("mlp", "heads"), round_to=48, **keys)
        alone, amount = Structured(units=("heads",), **keys), 0.5
    found, expected = (pruned(models["llama"], method, amount)[0] for method in (both, alone))
    for (name, one), (_, other) in zip(Anatomy(found).linears(), Anatomy(expected).linears(), strict=True):
        assert torch.equal(one.weight, other.weight), name


@pytest.mark.parametrize("refit", ["inputs", "dense", "residual"])
def test_nothing_is_refitted_where_nothing_goes(models: dict[str, Any], refit: str) -> None:
    for method in (Structured(refit=refit), Wanda(refit=refit), Magnitude(refit=refit, scope="global")):
        changed, _ = pruned(models["llama"], method, 0.0)
        for (name, one), (_, other) in zip(Anatomy(models["llama"]).linears(), Anatomy(changed).linears(), strict=True):
            assert torch.equal(one.weight, other.weight), (method, name)


@pytest.mark.parametrize("family", ADDED)
@pytest.mark.parametrize("kinds", [("mlp",), ("heads",)], ids="+".join)
def test_a_block_that_repairs_the_states_ends_nearer_to_the_dense_model(
    models: dict[str, Any], family: str, kinds: tuple[str, ...]
) -> None:
    """On the calibration text: the states after the last block, by the target of the refit."""
    dense = call_of_block(models[family], 1)[""][1]
    errors = {}
    for refit in ("none", "inputs", "residual"):
        changed, _ = pruned(models[family], Structured(units=kinds, score="wanda", refit=refit, physical=False), 0.25)
        errors[refit] = float((call_of_block(changed, 1)[""][1] - dense).square().sum())
    assert errors["residual"] < 0.999 * errors["inputs"] < errors["none"]


@pytest.mark.parametrize(
    "method",
    [Structured(refit="residual"), Structured(refit="residual", units=("heads",), physical=False),
     Wanda(refit="residual")],
    ids=repr,
)  # fmt: skip
@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "opt"])
def test_a_model_that_norms_what_is_added_repairs_no_states(
    models: dict[str, Any], family: str, method: Any, tmp_path: Path
) -> None:
    """Gemma 2 and 3, and an OPT whose norms stand behind the blocks: refused before anything is changed."""
    model = models[family]
    if family == "opt":
        folder = make_folder(tmp_path / "opt", "opt", do_layer_norm_before=False)
        model = HubModel(name=str(folder)).load(CPU, seed=0).model
    with pytest.raises(Refused, match="not added to the states as they are"):
        pruned(model, method)


@pytest.mark.parametrize(
    "method", [Structured(refit="inputs", physical=False), Structured(refit="dense", physical=False),
               Structured(refit="residual", physical=False),
               Wanda(refit="inputs"), Wanda(refit="dense"), Wanda(refit="residual")], ids=repr,
)  # fmt: skip
def test_a_model_on_disk_is_refitted_as_one_in_memory(tmp_path: Path, method: Any) -> None:
    folder = make_folder(tmp_path / "llama")
    loaded = [HubModel(name=str(folder), stream=stream).load(CPU, seed=0) for stream in (False, True)]
    weights = []
    for number, model in enumerate(one.model for one in loaded):
        anatomy = Anatomy(own_copy(model, tmp_path / f"own{number}"))
        method.prune(anatomy, 0.5, 0, Calibrator(WINDOWS, "pruned", 4))
        of_model = {}
        for index in range(len(anatomy.blocks)):
            with anatomy.at_hand(index):
                of_model |= {name: linear.weight.clone() for name, linear in anatomy.linears_by_block()[index]}
        weights.append(of_model)
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name]), name


@pytest.mark.parametrize(
    "method", [Magnitude(refit="inputs"), Structured(refit="inputs"), Structured(refit="bias")], ids=repr
)
def test_activations_that_overflow_are_refused(models: dict[str, Any], method: Any) -> None:
    """No weight is quietly set to NaN: they are finite, and so are scores by the weights alone."""
    model = copy.deepcopy(models["gpt2"])
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.bias.fill_(3e38)
        model.transformer.h[0].mlp.c_fc.weight.mul_(1e38)
    with pytest.raises(Refused, match="not finite"):
        method.prune(Anatomy(model), 0.5, 0, Calibrator(WINDOWS, "dense", 4))


def test_the_solved_width_is_that_of_what_is_solved(models: dict[str, Any]) -> None:
    anatomy = Anatomy(models["llama"])  # hidden 32, 48 MLP channels
    for method, expected in (
        (Wanda(), None), (Wanda(refit="inputs"), 48), (SparseGPT(), 48), (Structured(), None),
        (Structured(refit="bias"), None), (Structured(refit="inputs"), 48),
        (Structured(refit="inputs", units=("heads",)), 32), (Structured(score="obs"), 48),
        (Structured(score="obs", units=("heads",)), 32), (Depth(), None), (Depth(refit="residual"), 48),
    ):  # fmt: skip
        assert method.solved_width(anatomy) == expected, method


@pytest.mark.parametrize("family", ALL_FAMILIES)
@pytest.mark.parametrize("kind", ["mlp", "heads"])
def test_a_refit_of_units_brings_the_outputs_of_the_first_block_nearer(
    models: dict[str, Any], family: str, kind: str
) -> None:
    """In every family: of matrices that are fused, transposed, or have a bias. Cut or masked, it is the same model."""
    model = models[family]
    reader = Anatomy(model).unit_linears(kind)[0][-1].name
    dense, errors = outputs(model, reader), {}
    for refit in ("none", "bias", "inputs"):
        changed, _ = pruned(model, Structured(units=(kind,), score="wanda", refit=refit, physical=False))
        errors[refit] = float((outputs(changed, reader) - dense).square().sum())
    assert errors["inputs"] < 0.98 * errors["none"]
    assert errors["inputs"] < 1.001 * errors["bias"]
    if family not in ("gpt2", "opt", "gpt_neox", "phi3"):  # counts of heads that their configs can hold
        masked, cut = (
            pruned(model, Structured(units=(kind,), score="wanda", refit="inputs", physical=physical))[0]
            for physical in (False, True)
        )
        logits = [changed(input_ids=WINDOWS, use_cache=False).logits for changed in (masked, cut)]
        torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "method",
    [
        Wanda(refit="inputs"), Magnitude(refit="inputs"), SparseGPT(refit="inputs"),
        Wanda(refit="inputs", pattern="2:4"),
        Unstructured(score="random", refit="inputs"), Magnitude(refit="inputs", scope="global"),
        Wanda(refit="inputs", allocation="owl"),
    ],
    ids=lambda method: f"{type(method).__name__} {method.scope} {method.pattern} {method.allocation}",
)  # fmt: skip
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_refit_of_rows_keeps_zeros_and_lowers_the_error(models: dict[str, Any], family: str, method: Any) -> None:
    model = models[family]
    plain, without = pruned(model, type(method)(**{**vars(method), "refit": "none"}), propagate="dense")
    refitted, result = pruned(model, method, propagate="dense")
    grams = {
        name: statistics.gram
        for of_block in observed(Calibrator(WINDOWS, "dense", 4), Anatomy(model), frozenset({"gram"}))
        for name, statistics in of_block.items()
    }
    dense = dict(Anatomy(model).linears())
    errors = {"plain": 0.0, "refitted": 0.0}
    for (name, one), (_, other) in zip(Anatomy(plain).linears(), Anatomy(refitted).linears(), strict=True):
        weights = [out_in(linear, linear.weight.detach()) for linear in (dense[name], one, other)]
        assert torch.equal(weights[1] != 0, weights[2] != 0), name
        errors["plain"] += loss(weights[0], weights[1], grams[name])
        errors["refitted"] += loss(weights[0], weights[2], grams[name])
    assert errors["refitted"] < (0.9999 if isinstance(method, SparseGPT) else 0.95) * errors["plain"]
    assert [row.removed for row in result.rows] == [row.removed for row in without.rows]
    for name, keep in result.masks.keep.items():
        assert not refitted.get_submodule(name).weight[~keep].any()
