"""Thresholds: the score up to which weights are removed, for any number of amounts, from one pass. Pure functions.

Scores are counted, compared or partly ordered, never sorted, and no index as large as they are is made. 16-bit numbers
have few values, so a count of each gives the threshold of every amount. Wider numbers are partitioned (Hoare, 1961):
all of them, or, where several amounts are asked for one after the other, those whose upper 16 bits are the threshold's.
On a GPU the lowest of a matrix are found by their digits (torch.topk), and large ones are counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

AT_ONCE = 2**21  # scores, on a CPU
_HALF = 2**15  # bit patterns of one sign
_BY_DIGITS = 2**26  # scores, on a GPU: torch.topk also makes an index of what it finds, 8 bytes for each


def at_once(scores: Tensor) -> int:
    """Number of scores that are processed together: few enough for small copies, enough to keep all cores busy."""
    return 8 * AT_ONCE if scores.is_cuda else AT_ONCE


@dataclass(frozen=True)
class Threshold:
    """Scores below `value` are removed, and of those equal to it the first `ties`."""

    value: float
    ties: int


NOTHING = Threshold(-math.inf, 0)


def thresholds(scores: Sequence[Tensor], removals: Sequence[int]) -> list[Threshold]:
    """The threshold for each of `removals`, numbers of scores to remove, from one pass over all `scores` together.

    The tensors have any shapes, one number type and no NaN; ties are broken by the index in their concatenation.
    """
    if scores[0].is_cuda:
        counted = sum(values.numel() for values in scores) > _BY_DIGITS
    else:
        counted = scores[0].dtype in (torch.bfloat16, torch.float16)
    if counted:
        counts = ScoreCounts()
        return [counts.threshold(scores, remove) for remove in removals]
    return _by_selection([values.reshape(-1) for values in scores], removals)


class ScoreCounts:
    """Counts of scores by their upper 16 bits, kept to find the thresholds of several amounts one after the other.

    Scores are float32, bfloat16 or float16, without NaN, and the same at each call. For 16-bit scores the counts give
    the threshold; of float32 scores those are partitioned whose upper 16 bits are the threshold's.
    """

    def __init__(self) -> None:
        self._up_to: Tensor | None = None  # how many scores have each upper half or a lower one

    def threshold(self, scores: Sequence[Tensor], remove: int) -> Threshold:
        """The threshold that removes `remove` of `scores`, which are ranked together."""
        if remove == 0:
            return NOTHING
        if self._up_to is None:
            self._up_to = _number_of_each(scores).cumsum(0)
        index = int(torch.searchsorted(self._up_to, remove))
        half, left = _half_at(index), remove - (int(self._up_to[index - 1]) if index else 0)
        if scores[0].dtype != torch.float32:
            return Threshold(float(torch.tensor([half], dtype=torch.int16).view(scores[0].dtype)), left)
        chunks = [chunk for values in scores for chunk in values.reshape(-1).split(at_once(values))]
        inside = [chunk[_has_half(chunk, half)] for chunk in chunks]
        return _by_selection(inside, [left])[0]


def row_thresholds(scores: Tensor, remove: int) -> tuple[Tensor, Tensor]:
    """Thresholds and ties of every row of `scores` (rows, columns), both (rows, 1); `remove` is at least 1."""
    if scores.device.type != "cpu":
        threshold = scores.kthvalue(remove, dim=1, keepdim=True).values
        return threshold, remove - (scores < threshold).sum(1, keepdim=True)
    lowest = scores.to(torch.promote_types(scores.dtype, torch.float32), copy=True).numpy()
    lowest.partition(remove - 1, axis=1)
    lowest = lowest[:, :remove]
    ties = (lowest == lowest[:, -1:]).sum(1, keepdims=True)
    return torch.from_numpy(lowest[:, -1:]).to(scores.dtype), torch.from_numpy(ties)


def _by_selection(chunks: Sequence[Tensor], removals: Sequence[int]) -> list[Threshold]:
    if chunks[0].is_cuda:
        flat = chunks[0] if len(chunks) == 1 else torch.cat(list(chunks))
        return [_by_digits(flat, remove) for remove in removals]
    array = torch.cat(list(chunks)).numpy()  # a copy, which is reordered
    if last := sorted({remove - 1 for remove in removals if remove > 0}):
        array.partition(last)
    return [_threshold_of(torch.from_numpy(array[:remove]), remove) for remove in removals]


def _by_digits(flat: Tensor, remove: int) -> Threshold:
    if remove == 0:
        return NOTHING
    threshold = kth_lowest(flat, remove)
    return Threshold(float(threshold), remove - int(torch.count_nonzero(flat < threshold)))


def kth_lowest(flat: Tensor, k: int) -> Tensor:
    """The k-th lowest of some scores, k from 1 on, on their device, without waiting for a GPU."""
    others = len(flat) - k + 1
    if k <= others:
        return flat.topk(k, largest=False, sorted=False).values.max()
    return flat.topk(others, sorted=False).values.min()


def _threshold_of(lowest: Tensor, remove: int) -> Threshold:
    """The threshold above the `remove` lowest scores, of which the last is the highest."""
    if remove == 0:
        return NOTHING
    return Threshold(float(lowest[-1]), int(torch.count_nonzero(lowest == lowest[-1])))


def _upper_half(scores: Tensor) -> Tensor:
    """The upper 16 bits of each, int32 from -2^15 to 2^15 - 1; of 16-bit numbers those are all."""
    return scores.view(torch.int32) >> 16 if scores.dtype == torch.float32 else scores.view(torch.int16).int()


def _has_half(scores: Tensor, half: int) -> Tensor:
    found = _upper_half(scores)
    return found == half if half else (found & (_HALF - 1)) == 0  # the two signs of zero are one number


def _number_of_each(scores: Sequence[Tensor]) -> Tensor:
    """How many scores have each upper half, in the order of the numbers that they are."""
    counts = torch.zeros(2 * _HALF, dtype=torch.int64, device=scores[0].device)
    for values in scores:
        for chunk in values.reshape(-1).split(at_once(values)):
            if chunk.is_cuda:  # sorting the keys alone takes a fifth of the time of adding up in so many bins
                halves, times = _upper_half(chunk).short().unique(return_counts=True)
                counts.index_add_(0, halves.int() + _HALF, times)
            else:
                counts += torch.bincount(_upper_half(chunk) + _HALF, minlength=len(counts))
    counts = counts.cpu()
    # Read as integers, negative numbers descend from -0.0 on, and -0.0 is the same number as 0.0.
    counts[_HALF] += counts[0]
    return torch.cat([counts[1:_HALF].flip(0), counts[_HALF:]])


def _half_at(index: int) -> int:
    """The upper half at an index of that order."""
    return index - _HALF + 1 if index >= _HALF - 1 else -1 - index
