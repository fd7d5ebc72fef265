"""Tokenises one long text piece by piece, to the same tokens as in one go."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice
from typing import Any

from prune_lab.text.encode import encode
from prune_lab.text.token_store import Run

AT_ONCE = 2**20  # characters that are tokenised at once
CONTEXT = 300  # characters on both sides of a cut by which it is judged
CUTS_TRIED = 50


def tokenise_joined(tokenizer: Any, pieces: Iterator[str]) -> Iterator[Run]:
    """Token ids and UTF-8 bytes of the text that `pieces` make up, with the tokenizer's special tokens around it once:
    a text that begins with those that stand before, as a chat template may, gets no second ones.

    A text of up to AT_ONCE characters is tokenised in one go. A longer one is cut before line ends where the tokens on
    both sides are the same with and without the cut; where a tokenizer has no such place, the text is not cut.
    """
    before, after = special_tokens(tokenizer)
    first = next((piece for piece in pieces if piece), "")
    pieces = chain([first], pieces)
    if before and _ids(tokenizer, first[:CONTEXT])[: len(before)] != before:
        yield before, 0
    waiting, limit = "", AT_ONCE
    for piece in pieces:
        waiting += piece
        while len(waiting) > limit:
            cut = _harmless_cut(tokenizer, waiting, limit)
            if cut is None:
                limit += AT_ONCE
                break
            yield _ids(tokenizer, waiting[:cut]), len(waiting[:cut].encode())
            waiting, limit = waiting[cut:], AT_ONCE
    if waiting:
        yield _ids(tokenizer, waiting), len(waiting.encode())
    if after:
        yield after, 0


def _harmless_cut(tokenizer: Any, text: str, limit: int) -> int | None:
    """A place before `limit`, at the end of a line, where cutting changes no token."""

    def line_ends() -> Iterator[int]:
        place = limit
        while (place := text.rfind("\n", CONTEXT, place)) > limit // 2:
            if not text[place - 1].isspace():
                yield place

    for place in islice(line_ends(), CUTS_TRIED):
        left, right = text[place - CONTEXT : place], text[place : place + CONTEXT]
        if _ids(tokenizer, left) + _ids(tokenizer, right) == _ids(tokenizer, left + right):
            return place
    return None


def _ids(tokenizer: Any, text: str) -> list[int]:
    return encode(tokenizer, [text], special=False)[0]


def special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Special tokens that the tokenizer puts before and after a text."""
    bare = _ids(tokenizer, "a")
    whole = encode(tokenizer, ["a"], special=True)[0]
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    return [], []
