"""Thresholds of scores that stay the same from amount to amount: found for any amount from one pass over them."""

from __future__ import annotations

import torch
from torch import Tensor

from prune_lab.pruning.cuts import cuts
from prune_lab.pruning.selection import count_to_remove, keep_behind

_BUCKETS = 2**16


class Thresholds:
    """Counts of scores by the upper 16 bits of their floats, which order as the scores do.

    Scores are zero or more, or -1, the same at each call, float32, bfloat16 or float16. In 16 bits the counts are the
    whole answer; in float32 the one bucket in which the threshold lies is looked into.
    """

    def __init__(self) -> None:
        self._up_to: Tensor | None = None  # how many scores lie in each bucket or below it

    def keep(self, scores: list[Tensor], amount: float) -> list[Tensor]:
        """Keep-masks over matrices that are ranked together: exact counts, of equal scores the first ones go.

        The same masks as selection.keep_global makes.
        """
        remove = count_to_remove(sum(s.numel() for s in scores), amount)
        if remove == 0:
            return [torch.ones_like(s, dtype=torch.bool) for s in scores]
        if self._up_to is None:
            counts = [torch.bincount(_buckets(s).reshape(-1), minlength=_BUCKETS) for s in scores]
            self._up_to = torch.stack(counts).sum(0).cumsum(0).cpu()
        bucket = int((self._up_to < remove).sum())
        left = remove - (int(self._up_to[bucket - 1]) if bucket else 0)
        inside = torch.cat([s[_buckets(s) == bucket] for s in scores])
        (cut,) = cuts([inside], [left])
        return keep_behind(scores, cut)


def _buckets(scores: Tensor) -> Tensor:
    bits = scores.view(torch.int32) >> 16 if scores.dtype == torch.float32 else scores.view(torch.int16).int()
    return bits + _BUCKETS // 2
