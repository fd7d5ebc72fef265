"""Selection removes exactly what was asked for, the lowest scores first, ties by the lower index."""

from __future__ import annotations

import itertools

import pytest
import torch

from prune_lab.pruning.selection import (
    Pattern,
    count_to_remove,
    keep_global,
    keep_layer,
    keep_pattern,
    keep_rows,
)


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
