"""Where a ranking of scores is cut, for any number of amounts from one pass over them. Pure functions.

Scores are counted, compared or partly ordered, never sorted, and no index as large as they are is made: 16-bit numbers
have few values, so that a count of each says where every amount cuts; wider ones are partitioned (Hoare, 1961).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

AT_ONCE = 2**21  # scores, on a CPU
_HALF = 2**15  # bit patterns of one sign


def at_once(scores: Tensor) -> int:
    """Scores looked at together: what is made of them stays small, and all cores stay busy."""
    return 8 * AT_ONCE if scores.is_cuda else AT_ONCE


@dataclass(frozen=True)
class Cut:
    """Scores below `threshold` go, and of those equal to it the first `ties`."""

    threshold: float
    ties: int


NOTHING = Cut(-math.inf, 0)


def cuts(scores: Sequence[Tensor], removals: Sequence[int]) -> list[Cut]:
    """Where to cut for each of `removals`, the numbers to remove, from one pass over all `scores` together.

    The tensors have any shapes, one number type and no NaN; an entry's place is that in their concatenation.
    """
    if all(values.dtype in (torch.bfloat16, torch.float16) for values in scores):
        return _from_counts(scores, removals)
    flat = torch.cat([values.reshape(-1) for values in scores])
    if flat.device.type != "cpu":
        return [_by_selection(flat, remove) for remove in removals]
    array = flat.numpy()
    if last := sorted({remove - 1 for remove in removals if remove > 0}):
        array.partition(last)
    return [_cut_of(torch.from_numpy(array[:remove]), remove) for remove in removals]


def row_cuts(scores: Tensor, remove: int) -> tuple[Tensor, Tensor]:
    """The cut of every row of `scores`, (rows, columns), `remove` at least 1: thresholds and ties, both (rows, 1)."""
    if scores.device.type != "cpu":
        threshold = scores.kthvalue(remove, dim=1, keepdim=True).values
        return threshold, remove - (scores < threshold).sum(1, keepdim=True)
    lowest = scores.to(torch.promote_types(scores.dtype, torch.float32), copy=True).numpy()
    lowest.partition(remove - 1, axis=1)
    lowest = lowest[:, :remove]
    ties = (lowest == lowest[:, -1:]).sum(1, keepdims=True)
    return torch.from_numpy(lowest[:, -1:]).to(scores.dtype), torch.from_numpy(ties)


def _by_selection(flat: Tensor, remove: int) -> Cut:
    if remove == 0:
        return NOTHING
    threshold = flat.kthvalue(remove).values
    return Cut(float(threshold), remove - int((flat < threshold).sum()))


def _cut_of(lowest: Tensor, remove: int) -> Cut:
    """The cut behind the `remove` lowest scores, of which the last is the highest."""
    if remove == 0:
        return NOTHING
    return Cut(float(lowest[-1]), int(torch.count_nonzero(lowest == lowest[-1])))


def _from_counts(scores: Sequence[Tensor], removals: Sequence[int]) -> list[Cut]:
    """From how often each of the 65,536 bit patterns occurs."""
    counts = torch.zeros(2 * _HALF, dtype=torch.int64, device=scores[0].device)
    for values in scores:
        for part in values.reshape(-1).view(torch.int16).split(at_once(values)):
            counts += torch.bincount(part.int() + _HALF, minlength=len(counts))
    counts = counts.cpu()
    # Read as integers, negative numbers descend from -0.0 on, and -0.0 is the same number as 0.0.
    counts[_HALF] += counts[0]
    counts = torch.cat([counts[1:_HALF].flip(0), counts[_HALF:]])
    patterns = torch.cat([torch.arange(-1, -_HALF, -1), torch.arange(_HALF)]).to(torch.int16)
    numbers, up_to = patterns.view(scores[0].dtype).tolist(), counts.cumsum(0)
    found = []
    for remove in removals:
        place = int(torch.searchsorted(up_to, remove))
        ties = remove - int(up_to[place] - counts[place])
        found.append(Cut(numbers[place], ties) if remove else NOTHING)
    return found
