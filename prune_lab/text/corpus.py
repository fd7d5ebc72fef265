"""Corpora: documents in splits, held in memory or read again whenever they are needed."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from prune_lab.errors import Refused
from prune_lab.text.chat import Chat
from prune_lab.text.rows import wide_encoding
from prune_lab.text.splits import BUCKETS, POSITIONS, SPLITS, split_of

JOIN = "\n\n"  # between documents, as the published perplexities have it
PIECE = 2**20  # bytes of a long document that are read at once
Document = str | Chat
Read = Callable[[], Iterator[Document | None]]  # documents; None for what holds no text


class Corpus(ABC):
    """A named text in four splits; `provenance` says where it came from, for the protocol stamp and the tracker."""

    name: str
    provenance: dict[str, str]
    is_cut: bool = False  # whether the splits are parts of one document
    read_test: Read | None = None  # gives the test documents, where they are kept apart

    @abstractmethod
    def split(self, name: str) -> Iterable[str]:
        """The documents of one split, in order; one long document comes in pieces."""

    def for_tokenizer(self, tokenizer: Any) -> Corpus:
        """The corpus whose conversations, if it has any, the tokenizer's chat template renders."""
        return self

    def is_one_document(self, name: str) -> bool:
        """True where the pieces of `split` are of one document and follow each other without a gap."""
        return False

    def as_one(self) -> Iterator[str]:
        """The text of a corpus that `is_cut`, in its own order."""
        return (text for _, text in self.everything())

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

    def rows(self) -> Iterator[tuple[str | None, str]]:
        """Every text with its split, and what is in no split."""
        return self.everything()

    @cached_property
    def survey(self) -> Survey:
        """Hashes and counts from one pass over the whole text."""
        digests, rows = {name: hashlib.sha256() for name in SPLITS}, Counter[str | None]()
        for name, text in self.rows():
            rows[name] += 1
            if name in digests:
                digests[name].update(f"{len(text)}:".encode() + text.encode())
        return Survey({name: digest.hexdigest() for name, digest in digests.items()}, rows)

    @property
    def fingerprints(self) -> dict[str, str]:
        """sha256 of each split's texts."""
        return self.survey.fingerprints

    @property
    def stamp(self) -> dict[str, Any]:
        """The provenance, with how many rows had no text, where there were any."""
        blank = self.survey.rows[BLANK]
        return self.provenance | ({"rows": self.n_documents + blank, "rows_without_text": blank} if blank else {})

    @property
    def n_documents(self) -> int:
        """Number of documents, whatever their split."""
        found = self.survey.rows
        if self.is_cut:
            return 1 + (found["test"] if self.read_test is not None else 0)
        return found.total() - found[BLANK]

    def fingerprint(self) -> str:
        """sha256 over all splits."""
        return hashlib.sha256(" ".join(self.fingerprints[name] for name in SPLITS).encode()).hexdigest()


BLANK, HELD_OUT = None, "held out"  # rows in no split: without text; of training text, but in the test text as well


@dataclass(frozen=True)
class Survey:
    """sha256 of each split's texts, and how many documents (of one long document: pieces) each split has."""

    fingerprints: dict[str, str]
    rows: Counter[str | None]


@dataclass(frozen=True)
class Documents(Corpus):
    """Documents in memory."""

    name: str
    train: tuple[str, ...]
    calibration: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]
    provenance: dict[str, str] = field(default_factory=dict)
    is_cut: bool = field(default=False, kw_only=True)
    blank_rows: int = field(default=0, kw_only=True)  # that lay beside them

    def rows(self) -> Iterator[tuple[str | None, str]]:
        """The documents, and what had no text."""
        yield from self.everything()
        yield from ((BLANK, "") for _ in range(self.blank_rows))

    def split(self, name: str) -> tuple[str, ...]:
        """The documents of one split."""
        if name not in SPLITS:
            raise ValueError(f"split={name!r} is not one of {', '.join(SPLITS)}")
        documents: tuple[str, ...] = getattr(self, name)
        return documents


@dataclass(frozen=True)
class Stream(Corpus):
    """Documents read anew each time they are asked for, so that memory does not grow with their number.

    `read` gives all of them, `read_test` the test documents where they are kept apart; those are then in no other
    split, and what would have been for testing is for training. A conversation goes where its messages say, whatever
    renders them.
    """

    name: str
    read: Read
    provenance: dict[str, str] = field(default_factory=dict)
    read_test: Read | None = None
    tokenizer: Any = None

    def for_tokenizer(self, tokenizer: Any) -> Stream:
        """Copy whose conversations are rendered by this tokenizer."""
        return replace(self, tokenizer=tokenizer)

    def split(self, name: str) -> Iterator[str]:
        """The documents of one split."""
        return (text for found, text in self.everything() if found == name)

    def everything(self) -> Iterator[tuple[str, str]]:
        """Every document that is not blank, with its split, in one pass."""
        return ((name, text) for name, text in self.rows() if name in SPLITS)

    def rows(self) -> Iterator[tuple[str | None, str]]:
        """Every row, with its split where it is in one."""
        held_out = set()
        for document in self.read_test() if self.read_test is not None else ():
            text = _text_of(document, self.tokenizer)
            if text:
                held_out.add(_digest(text))
            yield "test" if text else BLANK, text
        for document in self.read():
            text = _text_of(document, self.tokenizer)
            if document is None or not text:
                yield BLANK, ""
            elif self.read_test is None:
                yield split_of(_key(document)), text
            elif _digest(text) in held_out:
                yield HELD_OUT, text
            else:
                split = split_of(_key(document))
                yield "train" if split == "test" else split, text


@dataclass(frozen=True)
class LongDocument(Corpus):
    """One text file, cut into splits by position, at line ends where there are any; read in pieces, never whole.

    With `read_test`, the test documents come from there and the last part is for training.
    """

    name: str
    path: Path
    provenance: dict[str, str] = field(default_factory=dict)
    read_test: Read | None = None
    tokenizer: Any = None
    is_cut: bool = True

    def for_tokenizer(self, tokenizer: Any) -> LongDocument:
        """Copy in which conversations of the test text are rendered by this tokenizer."""
        return replace(self, tokenizer=tokenizer)

    def as_one(self) -> Iterator[str]:
        """The whole file, piece by piece."""
        return self._between(0, BUCKETS)

    def is_one_document(self, name: str) -> bool:
        """Test documents kept apart are many."""
        return name != "test" or self.read_test is None

    def split(self, name: str) -> Iterator[str]:
        """The pieces of one split, whole lines where there are any."""
        if name == "test" and self.read_test is not None:
            yield from filter(None, self._test_texts())
            return
        yield from self._between(*POSITIONS[name])
        if name == "train" and self.read_test is not None:
            yield from self._between(*POSITIONS["test"])

    def rows(self) -> Iterator[tuple[str | None, str]]:
        """Every piece with its split, and rows of the test text that have no text."""
        for name in SPLITS:
            apart = name == "test" and self.read_test is not None
            for text in self._test_texts() if apart else self.split(name):
                yield name if text else BLANK, text

    def _test_texts(self) -> Iterator[str]:
        assert self.read_test is not None
        return (_text_of(document, self.tokenizer) for document in self.read_test())

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
                text = decoded(block[:whole], start, self.name)
                yield (text if start else text.removeprefix("\ufeff")).replace("\r\n", "\n")
                start += whole

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
    """Length of the complete lines of a block, or of its complete characters where no line ends in it."""
    line_end = block.rfind(b"\n") + 1
    if line_end:
        return line_end
    last = max(0, len(block) - 4)
    starts = [last + i for i, byte in enumerate(block[last:]) if byte & 0xC0 != 0x80]
    return starts[-1] if starts and starts[-1] else len(block)


def _next_character(following: bytes) -> int:
    """Bytes to skip to where a UTF-8 character begins; none where there is no such place near."""
    return next((i for i, byte in enumerate(following[:4]) if byte & 0xC0 != 0x80), 0)


def decoded(content: bytes, start: int, name: str) -> str:
    """The text of UTF-8 bytes, the first of which is the file's byte `start`; raises Refused where they are none."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        wide = wide_encoding(content) if not start else None
        found = f"byte {start + error.start:,} is 0x{content[error.start]:02x}"
        raise Refused(
            f"{name} cannot be read as text: {f'it is {wide.upper()}' if wide else found}, not utf-8: convert the "
            f"file, such as by iconv -f {wide or 'latin1'} -t utf-8"
        ) from error


def is_blank(document: Document) -> bool:
    """True where a document holds no text."""
    return not document.strip() if isinstance(document, str) else document.is_blank


def _text_of(document: Document | None, tokenizer: Any) -> str:
    """A document's text; nothing where it is blank."""
    if document is None or is_blank(document):
        return ""
    return document if isinstance(document, str) else document.rendered(tokenizer)


def _key(document: Document) -> str:
    return document if isinstance(document, str) else document.key


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
