"""Repetition and loops of continuations, and how far they are the dense model's. Pure functions of token ids."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

N = 4  # tokens of the n-grams whose repetition is counted
LEAST = 16  # tokens of a continuation that can be a loop: its last half is 8, twice 4


@dataclass(frozen=True)
class Continuation:
    """Tokens that a model put after a prompt, each the likeliest one.

    end: "eos" where the last token is one that ends a text, "length" where as many came as were asked for, "nan" where
    the next logits were NaN.
    """

    ids: tuple[int, ...]
    end: str

    @property
    def text_ids(self) -> tuple[int, ...]:
        """Tokens without the one that ends the text."""
        return self.ids[:-1] if self.end == "eos" else self.ids


@dataclass(frozen=True)
class Generation:
    """Figures of a model's continuations. Each field is a metric of its name, a mean over the prompts."""

    repetition: float
    loops: float
    common_prefix: float
    ended: float


def generation_of(found: Sequence[Continuation], dense: Sequence[Continuation]) -> Generation:
    """Figures of continuations beside the dense model's of the same prompts, at least one; NaN where logits were NaN.

    The common prefix includes the token that ends a text: a text that goes on where the dense one ends is another one.
    """
    pairs = list(zip(found, dense, strict=True))
    prefix = fmean(common_prefix(one.ids, other.ids) for one, other in pairs)
    if any(one.end == "nan" for one in found):
        return Generation(*[math.nan] * 4)
    return Generation(
        repetition=fmean(repetition(one.text_ids, N) for one in found),
        loops=fmean(is_loop(one.text_ids) for one in found),
        common_prefix=math.nan if any(other.end == "nan" for other in dense) else prefix,
        ended=fmean(one.end == "eos" for one in found),
    )


def repetition(ids: Sequence[int], n: int) -> float:
    """Repetition (rep-n): 1 - different n-grams / all n-grams, from 0 to below 1; 0 where there is no n-gram."""
    grams = [tuple(ids[begin : begin + n]) for begin in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def is_loop(ids: Sequence[int]) -> bool:
    """True where one n-gram, of any n, fills the last half: twice at least, cut off at either end.

    False below LEAST tokens, in whose last half a name that comes twice would be one.
    """
    half = ids[len(ids) // 2 :]
    if len(ids) < LEAST:
        return False
    return any(half[period:] == half[:-period] for period in range(1, len(half) // 2 + 1))


def common_prefix(ids: Sequence[int], others: Sequence[int]) -> int:
    """Number of tokens at the beginning of both."""
    length = min(len(ids), len(others))
    return next((place for place in range(length) if ids[place] != others[place]), length)
