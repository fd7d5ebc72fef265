"""Which scores stay: exact counts, ties broken by the lower index first, N:M patterns. Pure functions."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor

_PATTERN = re.compile(r"(\d+):(\d+)")


@dataclass(frozen=True)
class Pattern:
    """N of every M consecutive inputs of an output row are kept (NVIDIA's convention)."""

    n: int
    m: int

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Reads "N:M"; raises ValueError otherwise."""
        found = _PATTERN.fullmatch(text)
        if found is None:
            hint = " (YAML reads an unquoted 2:4 as a number: quote it)" if text.isdigit() else ""
            raise ValueError(f"pattern={text!r} is not of the form N:M, such as 2:4{hint}")
        pattern = cls(int(found[1]), int(found[2]))
        if not 0 < pattern.n <= pattern.m:
            raise ValueError(f"pattern={text!r}: N of N:M are kept, so N must be from 1 to M")
        return pattern


def count_to_remove(numel: int, amount: float) -> int:
    """floor(numel * amount + 1/2): the exact number to remove of a group, rounded half up."""
    return math.floor(numel * amount + 0.5)


def keep_rows(scores: Tensor, remove: int) -> Tensor:
    """Keep-mask that drops exactly `remove` lowest scores of every row, ties by the lower index first.

    `scores` has shape (rows, columns); so has the mask (bool, True: kept).
    """
    if remove == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = scores.kthvalue(remove, dim=1, keepdim=True).values
    below = scores < threshold
    tied = scores == threshold
    still_to_drop = remove - below.sum(1, keepdim=True)
    return ~(below | (tied & (tied.cumsum(1) <= still_to_drop)))


def keep_layer(scores: Tensor, amount: float) -> Tensor:
    """Keep-mask over one matrix that drops `amount` of it."""
    flat = scores.reshape(1, -1)
    return keep_rows(flat, count_to_remove(flat.numel(), amount)).view(scores.shape)


def keep_global(scores: list[Tensor], amount: float) -> list[Tensor]:
    """Keep-masks over several matrices that drop `amount` of all their entries, ranked together."""
    flat = torch.cat([s.reshape(-1) for s in scores])
    keep = keep_layer(flat, amount)
    return [part.view(s.shape) for part, s in zip(keep.split([s.numel() for s in scores]), scores, strict=True)]


def keep_pattern(scores: Tensor, pattern: Pattern) -> Tensor:
    """Keep-mask of shape (out, in) with the `pattern.n` highest of every `pattern.m` consecutive inputs."""
    groups = scores.reshape(-1, pattern.m)
    return keep_rows(groups, pattern.m - pattern.n).view(scores.shape)
