"""SparseGPT's solver against the worked example and a textbook column-by-column loop in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from prune_lab.errors import Refused
from prune_lab.methods.sparsegpt import SparseGPT
from prune_lab.pruning.pruned import Pruned
from prune_lab.pruning.selection import Pattern
from prune_lab.pruning.sparsegpt_solver import factor_of, solve
from prune_lab.pruning.statistics import LinearStatistics, RunningStatistics

WEIGHT = torch.tensor([[0.5, -1.0, 0.2, 0.8], [-0.3, 0.6, -0.9, 0.1]])
INPUTS = torch.tensor(
    [[1, 0, 2, -1], [0, 1, 1, 0.5], [2, -1, 0, 1], [1, 1, -1, 0], [0, 2, 1, 1], [-1, 0, 1, 2]], dtype=torch.float32
)
HALF = [[0, -1.065642, 0, 0.786135], [0, 0.639385, -0.916498, 0]]
ONE_OF_FOUR = [[0, -1.065642, 0, 0], [0, 0, -0.777129, 0]]
GOLDENS = [  # amount, pattern, weights, loss, loss of the mask alone where it is known
    (0.5, None, HALF, 2.828051, 2.8325),
    (0.9, "2:4", HALF, 2.828051, 2.8325),  # a pattern fixes the amount
    (0.5, "1:4", ONE_OF_FOUR, 10.176102, None),
]


def loss(weight: Tensor, pruned: Tensor, gram: Tensor) -> float:
    """||X (W - W')^T||^2, from X^T X."""
    change = (weight - pruned).double()
    return float(torch.einsum("oi,ij,oj->", change, gram.double(), change))


def parsed(pattern: str | None) -> Pattern | None:
    return None if pattern is None else Pattern.parse(pattern)


def correlated(rows: int, columns: int, seed: int, tokens: int | None = None) -> tuple[Tensor, Tensor]:
    """A weight and the gram of inputs that are far from independent and have scales and means of their own."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    mixed = torch.eye(columns) + torch.randn(columns, columns, generator=generator) * 1.5 / columns**0.5
    inputs = torch.randn(tokens or 3 * columns, columns, generator=generator) @ mixed
    inputs = inputs * (0.3 + torch.rand(columns, generator=generator)) + 0.2
    return weight, inputs.T @ inputs


@dataclass(frozen=True)
class Textbook:
    """What the loop below made: weights, which stay, the errors (w - q) / U_ii, and the damped gram; float64."""

    weight: Tensor
    keep: Tensor
    errors: Tensor
    damped: Tensor


def textbook(
    weight: Tensor, gram: Tensor, amount: float, pattern: str | None = None, damping: float = 0.01, by_row: bool = False
) -> Textbook:
    """The definition, one column after the other, each error spread over all columns to come at once.

    by_row: the columns up to the end of a window have lost the amount of every row, rounded half up.
    """
    values, damped = weight.double().clone(), gram.double().clone()
    columns = values.shape[1]
    for j in range(columns):
        if damped[j, j] == 0:
            damped[j, j] = 1
            values[:, j] = 0
    damped += damping * damped.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    keep, errors = torch.ones_like(values, dtype=torch.bool), torch.zeros_like(values)
    for i in range(columns):
        if pattern is None and i % 128 == 0 and by_row:
            last = min(i + 128, columns)
            remove = math.floor(last * amount + 0.5) - math.floor(i * amount + 0.5)
            for row in range(len(values)):
                scores = (values[row, i:last] ** 2 / upper.diagonal()[i:last] ** 2).tolist()
                for j in sorted(range(last - i), key=lambda j: (scores[j], j))[:remove]:
                    keep[row, i + j] = False
        elif pattern is None and i % 128 == 0:
            last = min(i + 128, columns)
            scores = (values[:, i:last] ** 2 / upper.diagonal()[i:last] ** 2).flatten().tolist()
            for index in sorted(range(len(scores)), key=lambda n: (scores[n], n))[
                : math.floor(len(scores) * amount + 0.5)
            ]:
                keep[index // (last - i), i + index % (last - i)] = False
        if pattern is not None and i % (m := int(pattern.split(":")[1])) == 0:
            n = int(pattern.split(":")[0])
            for row in range(len(values)):
                scores = (values[row, i : i + m] ** 2 / upper.diagonal()[i : i + m] ** 2).tolist()
                for j in sorted(range(m), key=lambda j: (scores[j], j))[: m - n]:
                    keep[row, i + j] = False
        stays = values[:, i] * keep[:, i]
        errors[:, i] = (values[:, i] - stays) / upper[i, i]
        values[:, i:] -= errors[:, i : i + 1] * upper[i, i:]
        values[:, i] = stays
    return Textbook(values, keep, errors, damped)


@pytest.mark.parametrize(("amount", "pattern", "expected", "its_loss", "mask_loss"), GOLDENS)
def test_the_worked_example(
    amount: float, pattern: str | None, expected: list[list[float]], its_loss: float, mask_loss: float | None
) -> None:
    """Computed by hand with H = 2 X^T X, damping .01 and one block of 4 columns; 1:4 keeps one."""
    gram = 2 * INPUTS.T @ INPUTS
    solved = solve(WEIGHT, gram, amount, parsed(pattern))
    torch.testing.assert_close(solved.weight, torch.tensor(expected), atol=2e-6, rtol=0)
    assert torch.equal(solved.keep, torch.tensor(expected) != 0)
    assert solved.damping == 0.01
    found, of_mask = loss(WEIGHT, solved.weight, gram / 2), loss(WEIGHT, WEIGHT * solved.keep, gram / 2)
    assert found == pytest.approx(its_loss, abs=2e-5)
    assert found < of_mask
    if mask_loss is not None:
        assert of_mask == pytest.approx(mask_loss, abs=1e-4)
    by_textbook = textbook(WEIGHT, gram, amount, pattern)  # so that the loop below may stand for the paper
    torch.testing.assert_close(by_textbook.weight.float(), torch.tensor(expected), atol=2e-6, rtol=0)


CASES = [
    (24, 256, 0.5, None),  # two windows
    (24, 256, 0.7, None),
    (16, 300, 0.6, None),  # a last window that is smaller, and no multiple of what is updated at a time
    (7, 129, 0.5, None),
    (9, 37, 0.3, None),
    (1, 130, 0.5, None),
    (24, 256, 0.5, "2:4"),
    (16, 256, 0.5, "4:8"),
    (16, 260, 0.5, "1:4"),
    (16, 264, 0.5, "3:6"),  # groups that 128 columns would cut
    (12, 150, 0.5, "2:5"),
    (8, 400, 0.5, "50:200"),  # groups wider than 128 columns
]


@pytest.mark.parametrize(("rows", "columns", "amount", "pattern"), CASES)
def test_the_solver_is_the_textbook_loop(rows: int, columns: int, amount: float, pattern: str | None) -> None:
    weight, gram = correlated(rows, columns, seed=columns)
    expected = textbook(weight, gram, amount, pattern)
    solved = solve(weight, gram, amount, parsed(pattern))
    assert solved.weight.dtype == torch.float32
    assert torch.equal(solved.keep, expected.keep)
    torch.testing.assert_close(solved.weight, expected.weight.float(), atol=2e-4, rtol=1e-3)
    assert torch.equal(solved.weight != 0, solved.keep)


@pytest.mark.parametrize(
    ("rows", "columns", "amount"), [(24, 256, 0.5), (16, 300, 0.6), (7, 129, 0.3), (9, 37, 0.9), (5, 640, 0.05)]
)
def test_by_row_every_row_loses_the_same_number(rows: int, columns: int, amount: float) -> None:
    """Of each 128 columns, and of all: not one more than Wanda takes of a row."""
    weight, gram = correlated(rows, columns, seed=columns)
    expected = textbook(weight, gram, amount, by_row=True)
    solved = solve(weight, gram, amount, by_row=True)
    assert torch.equal(solved.keep, expected.keep)
    torch.testing.assert_close(solved.weight, expected.weight.float(), atol=2e-4, rtol=1e-3)
    assert (~solved.keep).sum(1).tolist() == [math.floor(columns * amount + 0.5)] * rows
    for first in range(0, columns, 128):
        assert len({*(~solved.keep[:, first : first + 128]).sum(1).tolist()}) == 1


def test_by_row_what_is_zero_stays_zero_and_goes_first() -> None:
    weight, gram = correlated(16, 192, seed=7)
    first = solve(weight, gram, 0.3, by_row=True)
    second = solve(first.weight, gram, 0.6, by_row=True)
    assert not (second.keep & ~first.keep).any()
    assert not second.weight[~second.keep].any()
    assert (~second.keep).sum(1).tolist() == [115] * 16


def test_a_pattern_is_the_same_by_row() -> None:
    weight, gram = correlated(16, 256, seed=9)
    one, other = (solve(weight, gram, 0.5, parsed("2:4"), by_row=by_row) for by_row in (False, True))
    assert torch.equal(one.weight, other.weight)
    assert torch.equal(one.keep, other.keep)


@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_the_error_is_half_the_squared_loss_of_the_damped_gram(pattern: str | None) -> None:
    """sum (w - q)^2 / (2 U_ii^2) = 1/2 tr(D H D^T): the errors are the loop's, the change D the solver's."""
    weight, gram = correlated(16, 160, seed=5)
    expected = textbook(weight, gram, 0.5, pattern)
    change = (weight - solve(weight, gram, 0.5, parsed(pattern)).weight).double()
    whole = float(torch.einsum("oi,ij,oj->", change, expected.damped, change)) / 2
    assert whole == pytest.approx(float(expected.errors.square().sum()) / 2, rel=1e-4)


@pytest.mark.parametrize("pattern", [None, "1:4"])
def test_only_weights_that_go_leave_an_error(pattern: str | None) -> None:
    """E = D U^-1, seen from outside: it is zero wherever a weight stays, so nothing changed without cause."""
    weight, gram = correlated(10, 200, seed=6)
    damped = gram.double() + 0.01 * gram.diagonal().double().mean() * torch.eye(200, dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    solved = solve(weight, gram, 0.5, parsed(pattern))
    errors = (weight - solved.weight).double() @ torch.linalg.inv(upper)
    assert errors[solved.keep].abs().max() < 1e-3 * errors.abs().max()
    assert errors[~solved.keep].abs().median() > 1e-2 * errors.abs().max()


@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_what_is_zero_stays_zero_and_goes_first(pattern: str | None) -> None:
    """Else a schedule's second step would regrow what the first one took."""
    weight, gram = correlated(16, 192, seed=7)
    zero = torch.rand(16, 192, generator=torch.Generator().manual_seed(1)) < 0.4
    weight[zero] = 0
    solved = solve(weight, gram, 0.5, parsed(pattern))
    assert not solved.weight[zero].any()
    if pattern is None:
        assert not solved.keep[zero].any()
        for window in (slice(0, 128), slice(128, 192)):
            assert int((~solved.keep[:, window]).sum()) == solved.keep[:, window].numel() // 2
    else:
        groups = zero.view(16, -1, 4).sum(-1), (solved.weight == 0).view(16, -1, 4).sum(-1)
        assert torch.equal(groups[1], groups[0].clamp(min=2))


def test_more_zeros_than_are_asked_for_stay_zeros_and_nothing_else_goes() -> None:
    weight, gram = correlated(8, 128, seed=8)
    weight[:, ::2] = 0
    solved = solve(weight, gram, 0.3)
    assert torch.equal(solved.weight, weight)
    assert torch.equal(solved.keep, weight != 0)  # all of them count as removed, beyond the amount


def test_a_second_step_keeps_the_zeros_of_the_first() -> None:
    weight, gram = correlated(16, 256, seed=9)
    first = solve(weight, gram, 0.3)
    second = solve(first.weight, gram, 0.6)
    assert not (second.keep & ~first.keep).any()
    assert not second.weight[~first.keep].any()


@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_the_scale_of_the_gram_changes_nothing(pattern: str | None) -> None:
    """So 2/n of the paper, or no factor at all, is one and the same. Powers of four are exact in floats."""
    weight, gram = correlated(16, 160, seed=10)
    once = solve(weight, gram, 0.5, parsed(pattern))
    for scale in (4.0, 4.0**-6):
        again = solve(weight, gram * scale, 0.5, parsed(pattern))
        assert torch.equal(again.weight, once.weight)
        assert torch.equal(again.keep, once.keep)
    again = solve(weight, gram * (2 / 128), 0.5, parsed(pattern))
    assert torch.equal(again.keep, once.keep)
    torch.testing.assert_close(again.weight, once.weight, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_permuted_rows_give_a_permuted_result(pattern: str | None) -> None:
    weight, gram = correlated(20, 160, seed=11)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(2))
    straight, permuted = (solve(rows, gram, 0.5, parsed(pattern)) for rows in (weight, weight[order]))
    assert torch.equal(permuted.keep, straight.keep[order])
    torch.testing.assert_close(permuted.weight, straight.weight[order], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("amount", [0.25, 0.5, 0.8])
def test_inputs_alike_and_apart_are_magnitude_in_each_window(amount: float) -> None:
    """With a gram like the identity nothing can be made up for; ties go row by row, left to right."""
    weight = torch.randn(12, 200, generator=torch.Generator().manual_seed(3)).mul(16).round().div(16)
    weight[weight == 0] = 1 / 16
    expected = weight.clone()
    for first, last in ((0, 128), (128, 200)):
        width = last - first
        sizes = weight[:, first:last].abs().flatten().tolist()
        for n in sorted(range(len(sizes)), key=lambda n: (sizes[n], n))[: math.floor(len(sizes) * amount + 0.5)]:
            expected[n // width, first + n % width] = 0
    solved = solve(weight, 3 * torch.eye(200), amount)
    assert torch.equal(solved.weight, expected)
    assert torch.equal(solved.keep, expected != 0)


@pytest.mark.parametrize(("amount", "pattern"), [(0.5, None), (0.8, None), (0.5, "2:4"), (0.5, "1:4")])
def test_what_stays_makes_up_for_what_goes_in_aggregate(amount: float, pattern: str | None) -> None:
    """Not always: the greedy order can lose."""
    with_update, mask_only = 0.0, 0.0
    for seed in range(8):
        weight, gram = correlated(16, 96, seed=100 + seed)
        solved = solve(weight, gram, amount, parsed(pattern))
        with_update += loss(weight, solved.weight, gram)
        mask_only += loss(weight, weight * solved.keep, gram)
    assert with_update < 0.9 * mask_only


@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_dead_inputs_lose_their_weights_and_disturb_nothing(pattern: str | None) -> None:
    weight, gram = correlated(16, 160, seed=12)
    dead = torch.zeros(160, dtype=torch.bool)
    dead[[3, 4, 77, 140]] = True
    gram[dead], gram[:, dead] = 0, 0
    expected = textbook(weight, gram, 0.5, pattern)
    before = weight.clone(), gram.clone()
    solved = solve(weight, gram, 0.5, parsed(pattern))
    assert not solved.weight[:, dead].any()
    assert not solved.keep[:, dead].any()
    assert torch.equal(solved.keep, expected.keep)
    torch.testing.assert_close(solved.weight, expected.weight.float(), atol=2e-4, rtol=1e-3)
    assert torch.equal(weight, before[0])  # neither argument is changed
    assert torch.equal(gram, before[1])


def test_inputs_that_are_all_dead_leave_nothing() -> None:
    solved = solve(WEIGHT, torch.zeros(4, 4), 0.5)
    assert not solved.weight.any()
    assert not solved.keep.any()


def test_fewer_tokens_than_inputs_need_no_more_than_the_usual_damping() -> None:
    weight, gram = correlated(8, 64, seed=13, tokens=5)
    assert torch.linalg.matrix_rank(gram) < 64
    solved = solve(weight, gram, 0.5)
    assert solved.damping == 0.01
    torch.testing.assert_close(solved.weight, textbook(weight, gram, 0.5).weight.float(), atol=2e-3, rtol=1e-2)


def test_the_factor_is_upper_and_gives_the_damped_gram() -> None:
    _, gram = correlated(1, 48, seed=14)
    factor, damping = factor_of(gram)
    assert damping == 0.01
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(
        factor @ factor.T, gram + 0.01 * gram.diagonal().mean() * torch.eye(48), rtol=1e-4, atol=1e-3
    )


INDEFINITE = torch.tensor([[1.0, 1.5, 0.0, 0.0], [1.5, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]])


def test_damping_grows_tenfold_until_the_gram_has_a_factor_and_is_reported() -> None:
    """Its lowest eigenvalue is -1/2 of the mean diagonal: .01 and .1 are too little, 1 is enough."""
    solved = solve(WEIGHT, INDEFINITE, 0.5)
    assert solved.damping == pytest.approx(1.0)
    torch.testing.assert_close(solved.weight, textbook(WEIGHT, INDEFINITE, 0.5, damping=1.0).weight.float())
    pruned, module = Pruned(), nn.Linear(4, 2, bias=False).requires_grad_(False)
    module.weight.copy_(WEIGHT)
    SparseGPT().prune_linear("model.layers.0.x", module, 0.5, LinearStatistics(gram=INDEFINITE), pruned)
    assert pruned.warnings == ["model.layers.0.x: its inputs' gram needed damping 1 instead of 0.01"]
    assert torch.equal(module.weight, solved.weight)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("place", [(0, 0), (1, 2)])
def test_a_gram_that_is_not_finite_is_refused(value: float, place: tuple[int, int]) -> None:
    gram = INPUTS.T @ INPUTS
    gram[place], gram[place[::-1]] = value, value
    with pytest.raises(Refused, match=r"not finite.*dtype=float32"):
        solve(WEIGHT, gram, 0.5)


def gathered(inputs: Tensor) -> LinearStatistics:
    statistics = RunningStatistics()
    for batch in inputs.split(4):
        statistics.add(batch, frozenset({"gram"}))
    return LinearStatistics(**statistics.result())  # type: ignore[arg-type] # tensors alone


@pytest.mark.parametrize("keys", [{"amount": 0.5}, {"pattern": "2:4"}], ids=str)
def test_the_method_prunes_a_linear_and_its_transpose_alike(keys: dict[str, Any]) -> None:
    """GPT-2's Conv1D holds (in, out); its keep-mask is (out, in) as every other."""
    straight, transposed = nn.Linear(4, 2).requires_grad_(False), Conv1D(2, 4).requires_grad_(False)
    straight.weight.copy_(WEIGHT)
    transposed.weight.copy_(WEIGHT.T)
    biases = straight.bias.clone(), transposed.bias.clone()
    method, pruned = SparseGPT(**keys), Pruned()
    keeps = [
        method.prune_linear("x", module, method.amount, gathered(INPUTS), pruned) for module in (straight, transposed)
    ]
    for keep, weight in zip(keeps, (straight.weight, transposed.weight.T), strict=True):
        torch.testing.assert_close(weight, torch.tensor(HALF), atol=2e-6, rtol=0)
        assert torch.equal(keep, torch.tensor(HALF) != 0)
    assert torch.equal(straight.bias, biases[0])
    assert torch.equal(transposed.bias, biases[1])
    assert pruned.warnings == []


def test_the_scope_of_the_method() -> None:
    weight, gram = correlated(12, 200, seed=15)
    for scope, by_row in (("window", False), ("row", True)):
        module = nn.Linear(200, 12, bias=False).requires_grad_(False)
        module.weight.copy_(weight)
        keep = SparseGPT(scope=scope).prune_linear("x", module, 0.5, LinearStatistics(gram=gram), Pruned())
        expected = solve(weight, gram, 0.5, by_row=by_row)
        assert torch.equal(keep, expected.keep)
        assert torch.equal(module.weight, expected.weight)
        assert (len({*keep.sum(1).tolist()}) == 1) == by_row
    for scope in ("layer", "global", "nope"):
        with pytest.raises(ValueError, match=f"scope='{scope}' is not one of window, row"):
            SparseGPT(scope=scope)


def test_an_amount_of_zero_changes_no_bit() -> None:
    """Not even those of dead inputs, nor by a trip through float32."""
    module = nn.Linear(4, 2).to(torch.bfloat16).requires_grad_(False)
    before = module.weight.clone()
    keep = SparseGPT(amount=0.0).prune_linear("x", module, 0.0, LinearStatistics(gram=torch.zeros(4, 4)), Pruned())
    assert keep.all()
    assert torch.equal(module.weight, before)
