"""Continuations to be read: prompt, dense and compressed text side by side; generation.md."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

FILE = "generation.md"
SHOWN = 2  # samples in the summary, and so on the page of a report; the file has all
LONGEST = 4000  # characters of a text in them
_HIDDEN = ("Cc", "Cs", "Cn", "Co", "Zl", "Zp")  # categories: control, surrogate, unassigned, private, line separators
_TURNING = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")  # change the direction of what follows


@dataclass(frozen=True)
class Sample:
    """A prompt and what both models put after it, as text; and a word on the length of each."""

    prompt: str
    dense: str
    compressed: str
    dense_length: str
    compressed_length: str


def printable(text: str) -> str:
    """Text that any file and page may hold: characters that are not seen as they are stand as escapes, cut if long."""
    shown = "".join(letter if _is_seen(letter) else ascii(letter)[1:-1] for letter in text[: LONGEST + 1])
    return shown if len(text) <= LONGEST else shown[:LONGEST] + " ..."


def _is_seen(letter: str) -> bool:
    if letter in "\n\t":
        return True
    return unicodedata.category(letter) not in _HIDDEN and unicodedata.bidirectional(letter) not in _TURNING


def markdown(samples: Sequence[Sample], head: str) -> str:
    """The contents of generation.md; head: a sentence about the prompts."""
    lines = ["# Greedy continuations", "", head, ""]
    for number, sample in enumerate(samples, 1):
        lines += [f"## Prompt {number}", "", *_fenced(sample.prompt)]
        lines += [f"Dense, {sample.dense_length}:", "", *_fenced(sample.dense)]
        lines += [f"Compressed, {sample.compressed_length}:", "", *_fenced(sample.compressed)]
    return "\n".join(lines)


def _fenced(text: str) -> list[str]:
    """Text between fences that are longer than any that it holds."""
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
    return [f"{fence}text", printable(text), fence, ""]
