"""How an amount is spread over blocks: by worked examples, by brute force, and in whole runs of a method."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from conftest import CPU, make_folder
from torch import Tensor

from prune_lab.methods.sparsegpt import SparseGPT
from prune_lab.methods.wanda import Wanda
from prune_lab.models.anatomy import Anatomy
from prune_lab.models.load import HubModel
from prune_lab.pruning.allocation import by_sensitivity, outlier_ratio, owl, to_mean
from prune_lab.pruning.calibration import Calibrator
from prune_lab.pruning.loss_increase import AMOUNTS
from prune_lab.pruning.pruned import Pruned

WINDOWS = torch.randint(300, (6, 24), generator=torch.Generator().manual_seed(4))


def mean(amounts: list[float], sizes: list[int]) -> float:
    return math.fsum(a * n for a, n in zip(amounts, sizes, strict=True)) / sum(sizes)


# OWL.


def test_owl_of_the_worked_example() -> None:
    found = owl((2, 0.5, 1, 0.5), 0.7, (10, 10, 10, 10), 0.08)
    assert found == pytest.approx([0.593333, 0.753333, 0.700000, 0.753333], abs=1e-6)
    assert owl((2, 0.5, 1, 0.5), 0.7, (10, 10, 10, 10)) == found  # lambda is .08 unless given


@pytest.mark.parametrize("sizes", [(5, 5, 5), (1, 20, 300)])
def test_blocks_with_as_many_outliers_are_pruned_alike(sizes: tuple[int, ...]) -> None:
    assert owl((1.25, 1.25, 1.25), 0.6, sizes) == [0.6] * 3
    assert owl((0.0, 0.0, 0.0), 0.6, sizes) == [0.6] * 3


@pytest.mark.parametrize("amount", [0.0, 0.02, 0.5, 0.93, 0.99])
@pytest.mark.parametrize(("sizes", "spread"), [((10, 10, 10, 10), 0.08), ((1000, 1, 37, 500), 0.3)])
def test_owl_keeps_the_mean_over_weights(amount: float, sizes: tuple[int, ...], spread: float) -> None:
    """At the ends too, where blocks are clamped to 0 or 1 and the others take what that leaves."""
    ratios = (2.0, 0.5, 1.0, 0.7)
    found = owl(ratios, amount, sizes, spread)
    assert mean(found, list(sizes)) == pytest.approx(amount, abs=1e-9)
    assert all(0 <= a <= 1 for a in found)
    by_outliers = [a for _, a in sorted(zip(ratios, found, strict=True))]
    assert by_outliers == sorted(by_outliers, reverse=True)  # more outliers, less pruned
    inside = [(r, a) for r, a in zip(ratios, found, strict=True) if 0 < a < 1]
    for (r, a), (q, b) in itertools.combinations(inside, 2):
        assert b - a == pytest.approx(2 * spread * (r - q) / 1.5, abs=1e-9)


def test_unequal_sizes_shift_all_blocks_alike() -> None:
    """The big block's amount moves the mean: by hand, densities .16, 0 and sizes 3, 1 at .5."""
    assert owl((2.0, 1.0), 0.5, (3, 1)) == pytest.approx([0.46, 0.62], abs=1e-9)


@pytest.mark.parametrize(
    ("values", "amount", "sizes", "expected"),
    [
        ((0.0, -0.4), 0.1, (1, 1), (0.2, 0.0)),  # the second would be -.1
        ((0.0, -0.4), 0.9, (1, 1), (1.0, 0.8)),  # the first would be 1.1
        ((0.0, -0.4), 0.9, (3, 1), (1.0, 0.6)),
        ((5.0, 5.0), 0.3, (1, 9), (0.3, 0.3)),
        ((3.0, 0.0, -3.0), 0.5, (1, 2, 1), (1.0, 0.5, 0.0)),
        ((1.0, 0.0), 0.0, (1, 1), (0.0, 0.0)),
        ((1.0, 0.0), 1.0, (1, 1), (1.0, 1.0)),
    ],
)
def test_what_a_clamp_takes_the_others_share(
    values: tuple[float, ...], amount: float, sizes: tuple[int, ...], expected: tuple[float, ...]
) -> None:
    assert to_mean(values, amount, sizes) == pytest.approx(expected, abs=1e-9)


def test_outliers_by_hand() -> None:
    """24 ones and one 100 in two matrices: the mean is 4.96, only the 100 is above 5 times that."""
    large, small = torch.ones(4, 5), torch.tensor([[1.0, 1.0, 100.0, 1.0, 1.0]])
    assert outlier_ratio([large, small]) == pytest.approx(100 / 25)
    assert outlier_ratio([large]) == 0
    alike = [torch.full((3, 3), 7.0), torch.full((1, 3), 7.0)]
    assert outlier_ratio(alike) == 0
    assert outlier_ratio([torch.zeros(2, 2)]) == 0


def test_outliers_are_those_of_the_whole_block() -> None:
    """5 times the mean of all matrices together, not of each by itself."""
    quiet, loud = torch.full((1, 95), 0.1), torch.full((1, 5), 10.0)
    assert outlier_ratio([quiet, loud]) == pytest.approx(5.0)  # mean .595; within itself `loud` has none
    exact = [torch.tensor([[1.0] * 5 + [5.0]])]  # the limit is 8.33
    assert outlier_ratio(exact) == 0
    assert outlier_ratio([s * 1e-20 for s in (quiet, loud)]) == pytest.approx(5.0)


# By sensitivity.

SCANNED = (0.25, 0.5, 0.75)
RISES = {
    "convex": [[0.1, 0.4, 1.0], [0.05, 0.3, 2.0], [0.5, 1.2, 2.5]],
    "not convex": [[0.6, 0.7, 0.8], [0.1, 0.9, 1.0], [0.3, 0.35, 2.0]],
    "falling": [[-0.1, 0.2, 1.0], [0.0, 0.0, 0.5], [0.4, 0.3, 0.9]],  # noise may make a pruned block better
    "alike": [[0.1, 0.2, 0.3]] * 3,
}


def damage(x: float, rises: list[float]) -> float:
    """The least damage at x that mixing two measured points can give: the lower convex hull by brute force."""
    points = [(0.0, 0.0), *zip(SCANNED, rises, strict=True)]
    found = [y for at, y in points if abs(at - x) < 1e-9]
    for (x0, y0), (x1, y1) in itertools.combinations(points, 2):
        if x0 <= x <= x1:
            found.append(y0 + (y1 - y0) * (x - x0) / (x1 - x0))
    return min(found)


@pytest.mark.parametrize(
    ("amount", "sizes"), [(0.05, (1, 2, 5)), (0.25, (4, 4, 4)), (0.4, (1, 2, 5)), (0.7, (1, 2, 5))]
)
@pytest.mark.parametrize("case", RISES)
def test_no_other_spread_of_the_same_mean_does_less_damage(case: str, sizes: tuple[int, ...], amount: float) -> None:
    """All spreads of two blocks on a fine grid; the third makes up the mean."""
    rises = RISES[case]
    found = by_sensitivity(rises, SCANNED, amount, sizes)
    assert mean(found, list(sizes)) == pytest.approx(amount, abs=1e-9)
    assert all(-1e-12 <= a <= SCANNED[-1] + 1e-9 for a in found)
    total = sum(damage(min(SCANNED[-1], a), of) for a, of in zip(found, rises, strict=True))
    best = math.inf
    for a, b in itertools.product([n / 40 for n in range(31)], repeat=2):
        c = (amount * sum(sizes) - a * sizes[0] - b * sizes[1]) / sizes[2]
        if 0 <= c <= SCANNED[-1]:
            best = min(best, sum(damage(x, of) for x, of in zip((a, b, c), rises, strict=True)))
    assert total <= best + 1e-9


def test_the_cheapest_step_for_each_weight_goes_first() -> None:
    """By hand: both blocks lose .1 nats for a step, but one block's step takes twice the weights."""
    assert by_sensitivity([[0.1], [0.1]], (0.5,), 1 / 3, (1, 2)) == pytest.approx([0.0, 0.5])
    assert by_sensitivity([[0.1], [0.1]], (0.5,), 1 / 3, (2, 1)) == pytest.approx([0.5, 0.0])
    assert by_sensitivity([[0.3], [0.1]], (0.5,), 1 / 3, (2, 1)) == pytest.approx([0.25, 0.5])


def test_equal_blocks_at_a_measured_amount_lose_that_amount() -> None:
    assert by_sensitivity([[0.1, 0.5, 2.0]] * 4, SCANNED, 0.5, (7,) * 4) == pytest.approx([0.5] * 4)


@pytest.mark.parametrize("amount", [0.75, 0.8, 0.99])
def test_beyond_the_largest_measured_amount_all_rise_alike(amount: float) -> None:
    assert by_sensitivity(RISES["convex"], SCANNED, amount, (1, 2, 5)) == pytest.approx([amount] * 3, abs=1e-9)


def test_nothing_asked_for_takes_nothing() -> None:
    """Even where a pruned block seemed better."""
    assert by_sensitivity(RISES["falling"], SCANNED, 0.0, (1, 2, 5)) == [0.0] * 3


# Whole runs.


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Four blocks that differ in scale and outliers; to be copied, never changed."""
    place = tmp_path_factory.mktemp("allocation")
    made = {}
    for family, keys in (("llama", {"num_hidden_layers": 4}), ("gpt2", {"n_layer": 4})):
        model = HubModel(name=str(make_folder(place / family, family, **keys))).load(CPU, seed=0).model
        generator = torch.Generator().manual_seed(9)
        with torch.no_grad():
            for index, linears in enumerate(Anatomy(model).linears_by_block()):
                for _, linear in linears:
                    large = torch.rand(linear.weight.shape, generator=generator) < 0.01 * (3 - index)
                    linear.weight[large] *= 12
        made[family] = model
    return made


def note_amounts(pruned: Pruned, allocation: str) -> list[float]:
    """The amounts of the blocks, as the run's note lists them."""
    (note,) = (note for note in pruned.warnings if note.startswith(f"{allocation} gives the blocks "))
    return [float(part) for part in note.removeprefix(f"{allocation} gives the blocks ").split(", ")]


def zeros_by_block(model: Any) -> list[float]:
    found = []
    for linears in Anatomy(model).linears_by_block():
        zeros = sum(int((linear.weight == 0).sum()) for _, linear in linears)
        found.append(zeros / sum(linear.weight.numel() for _, linear in linears))
    return found


@torch.no_grad()
def naive_outliers(model: Any) -> list[float]:
    """OWL's D of each block, with inputs caught in one stock forward pass."""
    inputs: dict[str, Tensor] = {}
    names = [name for name, _ in Anatomy(model).linears()]
    hooks = []
    for name in names:
        hook = lambda _, args, name=name: inputs.update({name: args[0].reshape(-1, args[0].shape[-1])})  # noqa: E731
        hooks.append(model.get_submodule(name).register_forward_pre_hook(hook))
    model(input_ids=WINDOWS, use_cache=False)
    for hook in hooks:
        hook.remove()
    found = []
    for linears in Anatomy(model).linears_by_block():
        flat = []
        for name, linear in linears:
            weight = linear.weight if isinstance(linear, torch.nn.Linear) else linear.weight.T
            flat.append((weight.abs() * inputs[name].norm(dim=0)).flatten())
        scores = torch.cat(flat).double()
        found.append(100 * float((scores > 5 * scores.mean()).double().mean()))
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("allocation", ["owl", "sensitivity"])
@pytest.mark.parametrize("scope", ["layer", "row"])
def test_the_realised_mean_is_the_amount_and_the_note_says_how_it_is_spread(
    models: dict[str, Any], family: str, allocation: str, scope: str
) -> None:
    """To the weight within a matrix; within a row of 32 or 48 inputs to half a weight of each row."""
    model = copy.deepcopy(models[family])
    pruned = Wanda(amount=0.6, allocation=allocation, scope=scope).prune(Anatomy(model), 0.6, 0, Calibrator(WINDOWS))
    amounts, zeros = note_amounts(pruned, allocation), zeros_by_block(model)
    room = 0.001 if scope == "layer" else 0.5 / 32
    assert len(amounts) == 4
    assert max(amounts) - min(amounts) > 0.01
    assert sum(amounts) / 4 == pytest.approx(0.6, abs=6e-4)  # as printed, to three places
    assert zeros == pytest.approx(amounts, abs=room + 6e-4)
    assert pruned.realized == pytest.approx(0.6, abs=room)
    assert pruned.realized == pytest.approx(sum(zeros) / 4, abs=1e-9)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_owl_goes_by_the_outliers_of_the_dense_model(models: dict[str, Any], family: str) -> None:
    """Though blocks are calibrated behind pruned ones."""
    ratios = naive_outliers(models[family])
    low, high = min(ratios), max(ratios)
    raw = [-0.16 * (ratio - low) / (high - low) for ratio in ratios]
    expected = [0.6 + value - sum(raw) / 4 for value in raw]  # equal blocks, none at an end
    model = copy.deepcopy(models[family])
    pruned = Wanda(amount=0.6, allocation="owl").prune(Anatomy(model), 0.6, 0, Calibrator(WINDOWS, "pruned"))
    assert note_amounts(pruned, "owl") == pytest.approx(expected, abs=6e-4)


def test_sensitivity_goes_by_a_scan_of_the_method_itself(models: dict[str, Any]) -> None:
    """Each block of a fresh copy pruned alone by the same method, measured by the stock model's own loss."""

    @torch.no_grad()
    def loss(model: Any) -> float:
        losses = [float(model(input_ids=w[None], labels=w[None], use_cache=False).loss) for w in WINDOWS]
        return sum(losses) / len(losses)

    dense = models["llama"]
    rises: list[list[float]] = [[] for _ in range(4)]
    for amount in AMOUNTS:
        whole = copy.deepcopy(dense)  # dense propagation: each block's pruned weights do not depend on the others
        Wanda(amount=amount).prune(Anatomy(whole), amount, 0, Calibrator(WINDOWS, "dense"))
        for index in range(4):
            alone = copy.deepcopy(dense)
            alone.model.layers[index].load_state_dict(whole.model.layers[index].state_dict())
            rises[index].append(loss(alone) - loss(dense))
    expected = by_sensitivity(rises, AMOUNTS, 0.6, [1, 1, 1, 1])
    pruned = Wanda(amount=0.6, allocation="sensitivity").prune(
        Anatomy(copy.deepcopy(dense)), 0.6, 0, Calibrator(WINDOWS)
    )
    assert note_amounts(pruned, "sensitivity") == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("allocation", ["owl", "sensitivity"])
def test_solvers_are_spread_too(models: dict[str, Any], allocation: str) -> None:
    model = copy.deepcopy(models["llama"])
    pruned = SparseGPT(amount=0.6, allocation=allocation).prune(Anatomy(model), 0.6, 0, Calibrator(WINDOWS))
    assert pruned.realized == pytest.approx(0.6, abs=0.001)
    assert zeros_by_block(model) == pytest.approx(note_amounts(pruned, allocation), abs=0.002)


def test_uniform_says_nothing_and_treats_blocks_alike(models: dict[str, Any]) -> None:
    model = copy.deepcopy(models["llama"])
    pruned = Wanda(amount=0.5).prune(Anatomy(model), 0.5, 0, Calibrator(WINDOWS))
    assert not any("gives the blocks" in note for note in pruned.warnings)
    assert zeros_by_block(model) == [0.5] * 4
