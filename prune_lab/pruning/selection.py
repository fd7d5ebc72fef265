"""Selection: keep-masks from scores, with exact counts, ties broken by the index, and N:M patterns. Pure functions."""

from __future__ import annotations

import math
from itertools import combinations

import torch
from torch import Tensor

from prune_lab.pruning.pattern import Pattern
from prune_lab.pruning.thresholds import ScoreCounts, Threshold, at_once, kth_lowest, row_thresholds, thresholds

RANKED_BY_PAIRS = 8  # entries at most whose pairs are fewer than the steps of a selection


def count_to_remove(numel: int, amount: float) -> int:
    """floor(numel * amount + 1/2): the exact number to remove of a group, rounded half up."""
    return math.floor(numel * amount + 0.5)


def keep_rows(scores: Tensor, remove: int) -> Tensor:
    """Keep-mask that drops exactly `remove` lowest scores of every row, ties by the lower index first.

    `scores` has shape (rows, columns); so has the mask (bool, True: kept).
    """
    keep = torch.ones_like(scores, dtype=torch.bool, memory_format=torch.contiguous_format)
    if remove == 0:
        return keep
    rows = max(1, at_once(scores) // scores.shape[1])
    for chunk, kept in zip(scores.split(rows), keep.split(rows), strict=True):
        threshold, ties = row_thresholds(chunk, remove)
        torch.gt(chunk, threshold, out=kept)
        row, column = (chunk == threshold).nonzero(as_tuple=True)  # in the order of rows, then columns
        first = torch.searchsorted(row, torch.arange(len(chunk), device=row.device))
        rank = torch.arange(len(row), device=row.device) - first[row]
        kept[row, column] = rank >= ties[row, 0]
    return keep


def keep_layer(scores: Tensor, amount: float, counts: ScoreCounts | None = None) -> Tensor:
    """Keep-mask over one matrix that drops `amount` of it; `counts` as in keep_global."""
    return keep_global([scores], amount, counts)[0]


def keep_in_fixed_steps(scores: Tensor, remove: int) -> Tensor:
    """Keep-mask over one matrix that drops `remove` of it, in steps whose sizes do not depend on the scores.

    A CUDA graph can repeat such steps without the processor. The index of ties takes 4 bytes a score.
    """
    if remove == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    flat = scores.reshape(-1)
    threshold = kth_lowest(flat, remove)
    lower, tied = flat < threshold, flat == threshold
    first = tied.cumsum(0, dtype=torch.int32) <= remove - torch.count_nonzero(lower)
    return ~(lower | (tied & first)).view(scores.shape)


def keep_global(scores: list[Tensor], amount: float, counts: ScoreCounts | None = None) -> list[Tensor]:
    """Keep-masks over several matrices that drop `amount` of all their entries, ranked together.

    counts: those of these very scores, kept from one amount to the next.
    """
    remove = count_to_remove(sum(s.numel() for s in scores), amount)
    return keep_above(scores, thresholds(scores, [remove])[0] if counts is None else counts.threshold(scores, remove))


def keep_above(scores: list[Tensor], threshold: Threshold) -> list[Tensor]:
    """Keep-masks over matrices that are ranked together, by their threshold."""
    keep, ties = [], threshold.ties
    for values in scores:
        flat = values.reshape(-1)
        end, ties = _behind_ties(flat, threshold.value, ties)
        kept = torch.empty_like(flat, dtype=torch.bool)
        torch.gt(flat[:end], threshold.value, out=kept[:end])
        torch.ge(flat[end:], threshold.value, out=kept[end:])
        keep.append(kept.view(values.shape))
    return keep


def _behind_ties(flat: Tensor, threshold: float, ties: int) -> tuple[int, int]:
    """The index after so many entries that equal the threshold, or the end and how many are still to come."""
    start = 0
    for chunk in flat.split(at_once(flat)):
        if ties == 0:
            break
        tied = chunk == threshold
        found = int(torch.count_nonzero(tied))
        if found >= ties:
            return start + int(tied.nonzero()[ties - 1]) + 1, 0
        start, ties = start + len(chunk), ties - found
    return start, ties


def keep_pattern(scores: Tensor, pattern: Pattern) -> Tensor:
    """Keep-mask of shape (out, in) with the `pattern.n` highest of every `pattern.m` consecutive inputs."""
    groups = scores.reshape(-1, pattern.m)
    if pattern.m > RANKED_BY_PAIRS:
        return keep_rows(groups, pattern.m - pattern.n).view(scores.shape)
    keep = torch.empty_like(groups, dtype=torch.bool)
    for chunk, kept in zip(groups.split(at_once(scores)), keep.split(at_once(scores)), strict=True):
        torch.ge(_ranks(chunk), pattern.m - pattern.n, out=kept)
    return keep.view(scores.shape)


def _ranks(groups: Tensor) -> Tensor:
    """Rank of each entry in its row, ties by the index; for few columns, since every pair is compared."""
    columns = groups.T.contiguous()
    ranks = torch.zeros_like(columns, dtype=torch.uint8)
    for first, second in combinations(range(len(columns)), 2):
        in_order = columns[first] <= columns[second]
        ranks[second] += in_order
        ranks[first] += ~in_order
    return ranks.T
