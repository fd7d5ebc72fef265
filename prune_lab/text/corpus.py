"""Corpora: documents in splits, held in memory or read again whenever they are needed."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from prune_lab.errors import Refused
from prune_lab.text.splits import BUCKETS, POSITIONS, SPLITS, split_of

JOIN = "\n\n"  # between documents, as the published perplexities have it
PIECE = 2**20  # bytes of a long document that are read at once


class Corpus(ABC):
    """A named text in four splits; `facts` says where it came from, for the protocol stamp and the tracker."""

    name: str
    facts: dict[str, str]

    @abstractmethod
    def split(self, name: str) -> Iterable[str]:
        """The documents of one split, in order; one long document comes in pieces."""

    def is_one_document(self, name: str) -> bool:
        """Whether what `split` gives are pieces of one document, which follow each other without a gap."""
        return False

    def pieces(self, name: str) -> Iterator[str]:
        """The text of a split, piece by piece: put together they are its documents, a blank line between them."""
        for number, text in enumerate(self.split(name)):
            if number and not self.is_one_document(name):
                yield JOIN
            yield text

    def everything(self) -> Iterator[tuple[str, str]]:
        """Every text with its split."""
        for name in SPLITS:
            for text in self.split(name):
                yield name, text

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """sha256 of each split's texts."""
        digests = {name: hashlib.sha256() for name in SPLITS}
        for name, text in self.everything():
            digests[name].update(f"{len(text)}:".encode() + text.encode())
        return {name: digest.hexdigest() for name, digest in digests.items()}

    def fingerprint(self) -> str:
        """sha256 over all splits."""
        return hashlib.sha256(" ".join(self.fingerprints[name] for name in SPLITS).encode()).hexdigest()


@dataclass(frozen=True)
class Documents(Corpus):
    """Documents in memory."""

    name: str
    train: tuple[str, ...]
    calibration: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]
    facts: dict[str, str] = field(default_factory=dict)

    def split(self, name: str) -> tuple[str, ...]:
        """The documents of one split."""
        if name not in SPLITS:
            raise ValueError(f"split={name!r} is none of {', '.join(SPLITS)}")
        documents: tuple[str, ...] = getattr(self, name)
        return documents


@dataclass(frozen=True)
class Stream(Corpus):
    """Documents read anew each time they are asked for, so that memory does not grow with their number.

    `read` gives all of them, `read_test` the test documents where they are kept apart; those are then in no other
    split, and what would have been for testing is for training.
    """

    name: str
    read: Callable[[], Iterator[str]]
    facts: dict[str, str] = field(default_factory=dict)
    read_test: Callable[[], Iterator[str]] | None = None

    def split(self, name: str) -> Iterator[str]:
        """The documents of one split."""
        return (text for found, text in self.everything() if found == name)

    def everything(self) -> Iterator[tuple[str, str]]:
        """Every document that is not blank, with its split, in one pass."""
        held_out = set()
        if self.read_test is not None:
            for text in filter(str.strip, self.read_test()):
                held_out.add(_digest(text))
                yield "test", text
        for text in filter(str.strip, self.read()):
            split = split_of(text)
            if self.read_test is None:
                yield split, text
            elif _digest(text) not in held_out:
                yield "train" if split == "test" else split, text


@dataclass(frozen=True)
class LongDocument(Corpus):
    """One text file, cut into splits by position, at line ends where there are any; read in pieces, never whole.

    With `read_test`, the test documents come from there and the last part is for training.
    """

    name: str
    path: Path
    facts: dict[str, str] = field(default_factory=dict)
    read_test: Callable[[], Iterator[str]] | None = None

    def is_one_document(self, name: str) -> bool:
        """Test documents kept apart are many."""
        return name != "test" or self.read_test is None

    def split(self, name: str) -> Iterator[str]:
        """The pieces of one split, whole lines where there are any."""
        if name == "test" and self.read_test is not None:
            yield from filter(str.strip, self.read_test())
            return
        yield from self._between(*POSITIONS[name])
        if name == "train" and self.read_test is not None:
            yield from self._between(*POSITIONS["test"])

    def _between(self, first: int, last: int) -> Iterator[str]:
        start, end = self._cut(first), self._cut(last)
        rest, left = b"", end - start
        with self.path.open("rb") as file:
            file.seek(start)
            while left:
                block = rest + file.read(min(PIECE, left))
                left -= len(block) - len(rest)
                whole = _whole_part(block) if left else len(block)
                rest = block[whole:]
                try:
                    yield block[:whole].decode("utf-8").replace("\r\n", "\n")
                except UnicodeDecodeError as error:
                    raise Refused(f"{self.name} cannot be read as text: {error}") from error

    def _cut(self, part: int) -> int:
        """The byte at which a part begins: after a line's end that is near, else at a character."""
        size = self.path.stat().st_size
        position = size * part // BUCKETS
        if not 0 < position < size:
            return position
        with self.path.open("rb") as file:
            file.seek(position)
            following = file.read(max(4, min(size // (2 * BUCKETS), PIECE)))
        line_end = following.find(b"\n")
        return position + (line_end + 1 if line_end >= 0 else _next_character(following))


def _whole_part(block: bytes) -> int:
    """How much of a block is whole lines, or whole characters where it has no line's end."""
    line_end = block.rfind(b"\n") + 1
    if line_end:
        return line_end
    last = max(0, len(block) - 4)
    starts = [last + i for i, byte in enumerate(block[last:]) if byte & 0xC0 != 0x80]
    return starts[-1] if starts and starts[-1] else len(block)


def _next_character(following: bytes) -> int:
    """Bytes to skip to where a UTF-8 character begins; none where there is no such place near."""
    return next((i for i, byte in enumerate(following[:4]) if byte & 0xC0 != 0x80), 0)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
