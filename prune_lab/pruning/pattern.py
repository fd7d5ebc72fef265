"""N:M patterns as they are written."""

from __future__ import annotations

import re
from dataclasses import dataclass

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
