"""Calibration windows: which tokens of which documents. All of it is arithmetic on their lengths and a seed."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

_TRIES = 20  # at places of which none has been given before
_FACTOR = 6364136223846793005  # of Knuth's MMIX: odd, and large enough to mix all bits
Place = tuple[int, int]  # a document, by its number; the first token of a window in it


@dataclass(frozen=True)
class Drawn:
    """Windows, shape (n_samples, seq_len), int64, and where each begins: [document, its token].

    sampling: how they were drawn. documents, distinct_tokens: how many documents, and places of tokens, the windows
    are made of. too_short: how many other documents hold no window. overlap: the most windows that share a token.
    """

    windows: Tensor
    places: list[list[int]]
    sampling: str
    documents: int
    too_short: int
    distinct_tokens: int
    overlap: int


def at_random(lengths: Tensor, seq_len: int, n_samples: int, seed: int) -> list[Place]:
    """The papers' way: for each window a document longer than seq_len, and a place in it, both with replacement.

    Two windows are never the same. There must be n_samples of them.
    """
    long_enough = (lengths > seq_len).nonzero().flatten()
    generator = torch.Generator().manual_seed(seed)
    places: list[Place] = []
    while len(places) < n_samples:
        document = int(long_enough[torch.randint(len(long_enough), (1,), generator=generator)])
        place = document, int(torch.randint(int(lengths[document]) - seq_len, (1,), generator=generator))
        if place not in places:
            places.append(place)
    return places


def in_turn(lengths: Tensor, seq_len: int, n_samples: int, seed: int) -> list[Place]:
    """Windows spread over all documents longer than seq_len: each gives one before any gives another.

    A document gives as many as it holds side by side, at random places; only when all have given all that they hold
    does another layer begin, over the first. Two windows are never the same. There must be n_samples of them.
    """
    long_enough = (lengths > seq_len).nonzero().flatten()
    sizes = lengths[long_enough]
    generator = torch.Generator().manual_seed(seed)
    taken: dict[Place, None] = {}
    layer = 0
    while len(taken) < n_samples:
        # From the third layer on one less: with little left over, side by side would be the same places again.
        holds = (sizes // seq_len - int(layer > 1)).clamp(min=1)
        counts = _shared(holds, n_samples - len(taken), generator)
        for document, size, count in zip(long_enough.tolist(), sizes.tolist(), counts.tolist(), strict=True):
            for _ in range(_TRIES):
                gaps = torch.randint(size - count * seq_len + 1, (count,), generator=generator).sort().values.tolist()
                places = dict.fromkeys((document, gap + number * seq_len) for number, gap in enumerate(gaps))
                if not places.keys() & taken.keys():
                    break
            taken |= places
        layer += 1
    found = list(taken)
    return [found[i] for i in torch.randperm(len(found), generator=generator).tolist()]


def _shared(holds: Tensor, wanted: int, generator: torch.Generator) -> Tensor:
    """Number of windows from each document, shape (documents,): as equal as their lengths allow."""
    wanted = min(wanted, int(holds.sum()))
    low, high = 0, int(holds.max())  # whole rounds that can be asked for
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if int(holds.clamp(max=middle).sum()) <= wanted else (low, middle - 1)
    counts = holds.clamp(max=low)
    more = (holds > low).nonzero().flatten()
    chosen = more[torch.randperm(len(more), generator=generator)[: wanted - int(counts.sum())]]
    counts[chosen] += 1
    return counts


def covered(firsts: list[int], seq_len: int) -> tuple[int, int]:
    """Number of tokens that windows at these offsets of one text cover, and the most windows that share one."""
    starts = sorted(firsts)
    distinct = sum(min(seq_len, b - a) for a, b in zip(starts, [*starts[1:], starts[-1] + seq_len], strict=True))
    steps = sorted([(first + seq_len, -1) for first in starts] + [(first, 1) for first in starts])
    return distinct, max(accumulate(step for _, step in steps))


def holding(windows: Tensor, text: Tensor, length: int) -> int:
    """Number of windows, shape (windows, tokens), with `length` tokens in a row that are in `text`, shape (tokens,)."""
    return int(torch.isin(_runs(windows, length), _runs(text, length)).any(dim=1).sum())


def _runs(ids: Tensor, length: int) -> Tensor:
    """A hash of each run of `length` tokens along the last axis: a polynomial in them, modulo 2^64."""
    count = max(0, ids.shape[-1] - length + 1)
    found = ids.new_zeros((*ids.shape[:-1], count), dtype=torch.int64)
    for first in range(length):
        found = found * _FACTOR + ids[..., first : first + count]
    return found
