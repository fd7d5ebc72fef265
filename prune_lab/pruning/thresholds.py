"""Where a ranking of scores is cut, for any number of amounts from one pass over them. Pure functions.

Scores are counted, compared or partly ordered, never sorted, and no index as large as they are is made: 16-bit numbers
have few values, so that a count of each says where every amount cuts; wider ones are partitioned (Hoare, 1961), all or,
where they are asked about again and again, those alone that begin with the same 16 bits as the cut. On a GPU the lowest
of a matrix are found by their digits (torch.topk); where their index would be large, scores are counted there too.
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
    """Scores looked at together: what is made of them stays small, and all cores stay busy."""
    return 8 * AT_ONCE if scores.is_cuda else AT_ONCE


@dataclass(frozen=True)
class Threshold:
    """Scores below `threshold` go, and of those equal to it the first `ties`."""

    threshold: float
    ties: int


NOTHING = Threshold(-math.inf, 0)


def cuts(scores: Sequence[Tensor], removals: Sequence[int]) -> list[Threshold]:
    """Where to cut for each of `removals`, the numbers to remove, from one pass over all `scores` together.

    The tensors have any shapes, one number type and no NaN; an entry's place is that in their concatenation.
    """
    if scores[0].is_cuda:
        counted = sum(values.numel() for values in scores) > _BY_DIGITS
    else:
        counted = scores[0].dtype in (torch.bfloat16, torch.float16)
    if counted:
        counts = Counts()
        return [counts.cut(scores, remove) for remove in removals]
    return _by_selection([values.reshape(-1) for values in scores], removals)


class Counts:
    """Where any amount cuts scores that are the same at each asking: one pass over them counts their upper halves.

    Scores are float32, bfloat16 or float16, without NaN. In 16 bits the counts are the whole answer; in float32 those
    scores are looked into whose upper half is the one in which the cut lies.
    """

    def __init__(self) -> None:
        self._up_to: Tensor | None = None  # how many scores have each upper half or a lower one

    def cut(self, scores: Sequence[Tensor], remove: int) -> Threshold:
        """As `cuts` has it."""
        if remove == 0:
            return NOTHING
        if self._up_to is None:
            self._up_to = _number_of_each(scores).cumsum(0)
        place = int(torch.searchsorted(self._up_to, remove))
        half, left = _half_at(place), remove - (int(self._up_to[place - 1]) if place else 0)
        if scores[0].dtype != torch.float32:
            return Threshold(float(torch.tensor([half], dtype=torch.int16).view(scores[0].dtype)), left)
        parts = [part for values in scores for part in values.reshape(-1).split(at_once(values))]
        inside = [part[_has_half(part, half)] for part in parts]
        return _by_selection(inside, [left])[0]


def row_thresholds(scores: Tensor, remove: int) -> tuple[Tensor, Tensor]:
    """The cut of every row of `scores`, (rows, columns), `remove` at least 1: thresholds and ties, both (rows, 1)."""
    if scores.device.type != "cpu":
        threshold = scores.kthvalue(remove, dim=1, keepdim=True).values
        return threshold, remove - (scores < threshold).sum(1, keepdim=True)
    lowest = scores.to(torch.promote_types(scores.dtype, torch.float32), copy=True).numpy()
    lowest.partition(remove - 1, axis=1)
    lowest = lowest[:, :remove]
    ties = (lowest == lowest[:, -1:]).sum(1, keepdims=True)
    return torch.from_numpy(lowest[:, -1:]).to(scores.dtype), torch.from_numpy(ties)


def _by_selection(parts: Sequence[Tensor], removals: Sequence[int]) -> list[Threshold]:
    if parts[0].is_cuda:
        flat = parts[0] if len(parts) == 1 else torch.cat(list(parts))
        return [_by_digits(flat, remove) for remove in removals]
    array = torch.cat(list(parts)).numpy()  # a copy, which is put into another order
    if last := sorted({remove - 1 for remove in removals if remove > 0}):
        array.partition(last)
    return [_cut_of(torch.from_numpy(array[:remove]), remove) for remove in removals]


def _by_digits(flat: Tensor, remove: int) -> Threshold:
    if remove == 0:
        return NOTHING
    threshold = kth_lowest(flat, remove)
    return Threshold(float(threshold), remove - int(torch.count_nonzero(flat < threshold)))


def kth_lowest(flat: Tensor, k: int) -> Tensor:
    """The k-th lowest of some scores, k from 1 on, on their device: a GPU needs not be waited for."""
    others = len(flat) - k + 1
    if k <= others:
        return flat.topk(k, largest=False, sorted=False).values.max()
    return flat.topk(others, sorted=False).values.min()


def _cut_of(lowest: Tensor, remove: int) -> Threshold:
    """The cut behind the `remove` lowest scores, of which the last is the highest."""
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
        for part in values.reshape(-1).split(at_once(values)):
            if part.is_cuda:  # keys alone are sorted, which takes a fifth of the time of adding up in so many places
                halves, times = _upper_half(part).short().unique(return_counts=True)
                counts.index_add_(0, halves.int() + _HALF, times)
            else:
                counts += torch.bincount(_upper_half(part) + _HALF, minlength=len(counts))
    counts = counts.cpu()
    # Read as integers, negative numbers descend from -0.0 on, and -0.0 is the same number as 0.0.
    counts[_HALF] += counts[0]
    return torch.cat([counts[1:_HALF].flip(0), counts[_HALF:]])


def _half_at(place: int) -> int:
    """The upper half at a place of that order."""
    return place - _HALF + 1 if place >= _HALF - 1 else -1 - place
