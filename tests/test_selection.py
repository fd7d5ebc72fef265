"""Selection removes exactly what was asked for, the lowest scores first, ties by the lower index."""

from __future__ import annotations

import itertools

import pytest
import torch

from prune_lab.pruning import thresholds as cutting
from prune_lab.pruning.masks import clear
from prune_lab.pruning.selection import (
    Pattern,
    count_to_remove,
    keep_above,
    keep_global,
    keep_in_fixed_steps,
    keep_layer,
    keep_pattern,
    keep_rows,
)
from prune_lab.pruning.thresholds import ScoreCounts, thresholds


def naive_keep(scores: torch.Tensor, remove: int) -> torch.Tensor:
    """The definition, one element at a time: a stable sort by score drops the first `remove`."""
    flat = scores.flatten().tolist()
    dropped = sorted(range(len(flat)), key=lambda i: (flat[i], i))[:remove]
    keep = torch.ones(len(flat), dtype=torch.bool)
    keep[dropped] = False
    return keep.view(scores.shape)


@pytest.mark.parametrize(
    ("numel", "amount", "expected"),
    [(10, 0.0, 0), (10, 0.24, 2), (10, 0.25, 3), (10, 0.5, 5), (3, 0.5, 2), (7, 0.999, 7), (1000, 0.7, 700)],
)
def test_counts_round_half_up(numel: int, amount: float, expected: int) -> None:
    assert count_to_remove(numel, amount) == expected


def test_ties_go_by_the_lower_index_first() -> None:
    scores = torch.tensor([[2.0, 1.0, 1.0, 1.0, 3.0]])
    assert keep_rows(scores, 2).tolist() == [[True, False, False, True, True]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("amount", [0.0, 0.1, 0.5, 0.7, 0.999])
def test_layer_selection_is_exact_with_heavy_ties(dtype: torch.dtype, amount: float) -> None:
    """In 16 bits thousands of weights share a magnitude: a threshold alone would take them all."""
    scores = torch.randn(48, 64, generator=torch.Generator().manual_seed(1)).mul(4).round().div(4).to(dtype).abs()
    assert scores.unique().numel() < 30
    keep = keep_layer(scores, amount)
    assert torch.equal(keep, naive_keep(scores, count_to_remove(scores.numel(), amount)))


def signed_scores(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Few different numbers of either sign, both zeros and both infinities among them."""
    scores = torch.randn(rows, columns, generator=torch.Generator().manual_seed(2)).mul(4).round().div(4).to(dtype)
    scores[scores.abs() > 2] *= torch.inf
    assert {torch.inf, -torch.inf} <= set(scores.unique().tolist())
    assert (scores[scores == 0].signbit()).any()
    assert not (scores[scores == 0].signbit()).all()
    return scores


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_signs_zeros_and_infinities_rank_as_numbers(dtype: torch.dtype) -> None:
    scores = signed_scores(24, 40, dtype)
    for amount in (0.0, 0.02, 0.3, 0.5, 0.55, 0.98):
        remove = count_to_remove(scores.numel(), amount)
        assert torch.equal(keep_layer(scores, amount), naive_keep(scores, remove))
        assert torch.equal(keep_in_fixed_steps(scores, remove), naive_keep(scores, remove))
        of_row = count_to_remove(40, amount)
        assert torch.equal(keep_rows(scores, of_row), torch.stack([naive_keep(row, of_row) for row in scores]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps", [3, 400])
def test_a_matrix_is_cut_alike_however_much_is_looked_at_together(
    dtype: torch.dtype, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ties lie in several parts of it."""
    monkeypatch.setattr(cutting, "AT_ONCE", 100)
    scores = torch.rand(30, 40, generator=torch.Generator().manual_seed(3)).mul(steps).ceil().to(dtype)
    for amount in (0.001, 0.45, 0.9):
        expected, of_row = naive_keep(scores, count_to_remove(scores.numel(), amount)), count_to_remove(40, amount)
        assert torch.equal(keep_layer(scores, amount), expected)
        assert torch.equal(torch.cat(keep_global(list(scores.split(7)), amount)), expected)
        assert torch.equal(keep_rows(scores, of_row), torch.stack([naive_keep(row, of_row) for row in scores]))
    expected = torch.stack([naive_keep(group, 2) for group in scores.view(-1, 4)]).view(scores.shape)
    assert torch.equal(keep_pattern(scores, Pattern(2, 4)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_one_pass_gives_the_cuts_of_many_amounts(dtype: torch.dtype) -> None:
    """In the order in which they were asked for, nothing and everything among them."""
    matrices = [signed_scores(16, 32, dtype), signed_scores(8, 32, dtype).T]
    flat, removals = torch.cat([matrix.flatten() for matrix in matrices]), [300, 0, 17, 768, 300]
    for remove, cut in zip(removals, thresholds(matrices, removals), strict=True):
        assert torch.equal(torch.cat([k.flatten() for k in keep_above(matrices, cut)]), naive_keep(flat, remove))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["magnitudes", "ties", "signed"])
def test_counts_that_are_kept_cut_at_every_amount(
    dtype: torch.dtype, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One pass over the scores; with ties beyond a matrix, weights that were gone before (-1), and both zeros."""
    passes = []
    real = cutting._number_of_each
    monkeypatch.setattr(cutting, "_number_of_each", lambda scores: passes.append(1) or real(scores))
    generator = torch.Generator().manual_seed(1)
    scores = [torch.randn(shape, generator=generator).abs() for shape in ((40, 30), (7, 11), (64, 5))]
    scores = [(s.mul(3).round() if kind == "ties" else s).masked_fill(s < 0.1, -1).to(dtype) for s in scores]
    if kind == "signed":
        scores = [signed_scores(16, 32, dtype), signed_scores(8, 32, dtype).T]
    flat, counts = torch.cat([matrix.flatten() for matrix in scores]), ScoreCounts()
    for amount in (0.5, 0.0, 0.001, 0.04, 0.3, 0.55, 0.77, 0.9999, 0.5):
        found = torch.cat([kept.flatten() for kept in keep_global(scores, amount, counts)])
        assert torch.equal(found, naive_keep(flat, count_to_remove(flat.numel(), amount)))
    assert passes == [1]


def test_global_selection_ranks_all_matrices_together() -> None:
    small, large = torch.full((2, 3), 0.1), torch.full((2, 2), 5.0)
    keep = keep_global([large, small], 0.5)
    assert keep[0].all()
    assert keep[1].flatten().tolist() == [False, False, False, False, False, True]
    flat = torch.cat([large.flatten(), small.flatten()])
    assert torch.equal(torch.cat([k.flatten() for k in keep]), naive_keep(flat, 5))


def test_n_of_m_are_kept_not_removed() -> None:
    """1:4 tells the conventions apart: one kept (NVIDIA's), not three."""
    scores = torch.tensor([[0.5, 1.0, 0.2, 0.8, 9.0, 7.0, 8.0, 6.0], [0.3, 0.6, 0.9, 0.1, 1.0, 2.0, 3.0, 4.0]])
    kept = keep_pattern(scores, Pattern.parse("1:4"))
    assert kept.nonzero().tolist() == [[0, 1], [0, 4], [1, 2], [1, 7]]
    kept = keep_pattern(scores, Pattern.parse("2:4"))
    assert kept.nonzero().tolist() == [[0, 1], [0, 3], [0, 4], [0, 6], [1, 1], [1, 2], [1, 6], [1, 7]]


@pytest.mark.parametrize("text", ["2:4", "3:8", "8:8", "5:16"])
def test_ties_within_a_pattern_go_by_the_lower_index_first(text: str) -> None:
    pattern, scores = Pattern.parse(text), signed_scores(12, 48, torch.bfloat16)
    groups = scores.reshape(-1, pattern.m)
    expected = torch.stack([naive_keep(group, pattern.m - pattern.n) for group in groups]).view(scores.shape)
    assert torch.equal(keep_pattern(scores, pattern), expected)


def test_masks_nest_across_amounts() -> None:
    scores = torch.randn(32, 32, generator=torch.Generator().manual_seed(0)).abs()
    masks = [keep_layer(scores, amount) for amount in (0.1, 0.3, 0.6, 0.9)]
    for lower, higher in itertools.pairwise(masks):
        assert not (higher & ~lower).any()


@pytest.mark.parametrize(
    ("text", "says"),
    [("124", "quote"), ("2-4", "N:M"), ("5:4", "from 1 to M"), ("0:4", "from 1 to M"), ("", "N:M")],
)
def test_a_wrong_pattern_is_refused(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Pattern.parse(text)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [False, True])
def test_what_is_cleared_is_plus_zero_whatever_stood_there(dtype: torch.dtype, transposed: bool) -> None:
    """And what is kept stays to the bit: NaN, infinities, negative zero."""
    odd = torch.tensor([[1.5, -2.0, float("nan")], [float("inf"), -float("inf"), -0.0]], dtype=dtype)
    for keep in (torch.tensor([[True, False, True], [False, True, True]]), torch.zeros(2, 3, dtype=torch.bool)):
        weight = odd.T.contiguous().T if transposed else odd.clone()
        clear(weight, keep)
        bits, before = weight.contiguous().view(torch.uint8).view(2, 3, -1), odd.view(torch.uint8).view(2, 3, -1)
        assert torch.equal(bits[keep], before[keep])
        assert not bits[~keep].any()
