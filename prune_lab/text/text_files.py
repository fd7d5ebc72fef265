"""dataset=text: local txt, JSON and parquet files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from prune_lab.errors import Refused
from prune_lab.system.files import as_path, matching
from prune_lab.text.chat import Chat, as_chat
from prune_lab.text.corpus import Corpus, Document, Documents, LongDocument, Stream, is_blank
from prune_lab.text.rows import KINDS, NAMED_KINDS, ending, mended, read_rows, what
from prune_lab.text.source import TextSource
from prune_lab.text.splits import by_position
from prune_lab.text.unsplit import UnsplitCorpus

_INSTEAD = {
    "bytes": "write it as strings",
    "a list of strings": "join each into one text, or write one string a row",
    "a date or time": "write it as strings, or give a column of text",
}


@dataclass(frozen=True)
class TextFiles(TextSource):
    """Files named by a path, a folder or a glob. A txt file is one document; so is a row of the others.

    Of rows, `column` alone is read: text, or chat messages, which the tokenizer's chat template renders. Documents are
    split by the hash of each; where there is one alone, by position.
    """

    path: str = ""
    test_path: str | None = None
    column: str = "text"

    def files(self) -> list[Path]:
        """Files that are named."""
        named = {"dataset.path": self.path, "dataset.test_path": self.test_path}
        return [file for key, path in named.items() if path is not None for file in _files(path, key)]

    def corpus(self) -> Corpus:
        """The files as a corpus that is read when it is used; with `test_path` its documents are the test split."""
        read = _Files.named(self.path, "dataset.path", self.column, "dataset.column")
        provenance, read_test = {"path": self.path}, None
        if self.test_path is not None:
            read_test = _Files.named(self.test_path, "dataset.test_path", self.column, "dataset.column")
            provenance["test_path"] = self.test_path
            read_test.first(1)
            if read.is_one_txt and read.files[0].resolve() in {file.resolve() for file in read_test.files}:
                raise Refused(
                    f"{read_test.name} is the text of dataset.path too: what is tested on may not be trained on"
                )
        if read.is_one_txt:
            return read.as_long_document(provenance, read_test)
        first, rows = read.first(2)
        if len(first) == 1 and isinstance(first[0], str) and read_test is None:
            parts = {split: tuple(texts) for split, texts in by_position(first[0]).items()}
            return Documents(read.name, **parts, provenance=provenance, is_cut=True, blank_rows=rows - 1)
        return Stream(read.name, read, provenance, read_test)

    def unsplit(self, key: str = "dataset.calibration") -> UnsplitCorpus:
        """All of the files' text, as another dataset's calibration names it."""
        read = _Files.named(self.path, f"{key}.name", self.column, f"{key}.column")
        provenance = {"path": self.path}
        if read.is_one_txt:
            return UnsplitCorpus(read.name, read.as_long_document(provenance), provenance)
        read.first(1)
        return UnsplitCorpus(read.name, Stream(read.name, read, provenance), provenance)


@dataclass(frozen=True)
class _Files:
    """The documents of files, read anew at each call. `name` and `column_key` are what refusals call them."""

    files: tuple[Path, ...]
    name: str
    column: str
    column_key: str

    @classmethod
    def named(cls, path: str, key: str, column: str, column_key: str) -> _Files:
        """Files that `path`, the value of `key`, names."""
        return cls(tuple(_files(path, key)), f"{key}={path}", column, column_key)

    @property
    def is_one_txt(self) -> bool:
        """True for one txt file: a document that is read in pieces."""
        return len(self.files) == 1 and ending(self.files[0]) == ".txt"

    def as_long_document(self, provenance: dict[str, str], read_test: _Files | None = None) -> LongDocument:
        """The one txt file; raises Refused where there is no text in it."""
        long = LongDocument(self.name, self.files[0], provenance, read_test)
        _first(long.as_one(), 1, self.name)
        return long

    def __call__(self) -> Iterator[Document | None]:
        """The documents of all files, kind by kind, read as they are asked for; None for a row without text."""
        for kind in sorted({ending(file) for file in self.files}):
            for file in self.files:
                if ending(file) == kind:
                    yield from self._documents(file)

    def first(self, count: int) -> tuple[list[Document], int]:
        """The first documents with text, and how many were looked at for them; raises Refused where there is none."""
        found: list[Document] = []
        rows = 0
        for rows, document in enumerate(self(), 1):
            if document is not None and not is_blank(document):
                found.append(document)
            if len(found) == count:
                return found, rows
        if not found:
            columns = self._columns()
            if columns and self.column not in columns:
                raise Refused(
                    f"{self.column_key}={self.column!r} is not there in {self.name}: its columns are "
                    f"{', '.join(columns)[:150]}: give {self.column_key}=..."
                )
            where = f": {self.column_key}={self.column!r} is null or blank in each of {rows:,} rows" if columns else ""
            raise Refused(f"{self.name}: there is no text in it{where}")
        return found, rows

    def _columns(self) -> list[str]:
        """The columns of the first rows of each file."""
        found = (columns for file in self.files for _, _, columns in islice(read_rows(file, self.column), 20))
        return list(dict.fromkeys(name for columns in found for name in columns))

    def _documents(self, file: Path) -> Iterator[Document | None]:
        try:
            for place, value, columns in read_rows(file, self.column):
                if isinstance(value, str):
                    yield mended(value)
                elif value is None or value == []:
                    yield None
                else:
                    yield self._chat(value, f"{place} of {file.name}", columns)
        except Refused:
            raise
        except Exception as error:  # pyarrow's, gzip's and the system's own beside ours
            why = " ".join(str(error).split())[:200] or type(error).__name__
            kind = NAMED_KINDS[ending(file)]
            raise Refused(f"{self.name} cannot be read as {kind}: {file.name}: {why}") from error

    def _chat(self, value: object, place: str, columns: Iterable[str]) -> Chat:
        """The conversation that a value is; raises Refused where it is none."""
        chat = as_chat(value, f"{self.column_key}={self.column!r} ({self.name}, {place})")
        if chat is None:
            kind, names = what(value), ", ".join(columns)[:100]
            instead = _INSTEAD.get(kind, f"give {self.column_key}=..., a column of text or of chat messages")
            raise Refused(
                f"{self.column_key}={self.column!r} is not text: {place} holds {kind} in it ({self.name}); {instead}; "
                f"the columns are {names}"
            )
        return chat


def _first(texts: Iterable[str], count: int, where: str) -> list[str]:
    """The first texts that are not blank; raises Refused where there is none."""
    found = list(islice(filter(str.strip, texts), count))
    if not found:
        raise Refused(f"{where}: there is no text in it")
    return found


def _files(path: str, key: str) -> list[Path]:
    """The files that `path` names, sorted; raises Refused where there are none of a known kind."""
    kinds = ", ".join(KINDS)
    try:
        place = as_path(path).absolute()  # to pyarrow file:x is an address, and ~/x at home
        if place.is_dir():
            found = [file for file in place.rglob("*") if ending(file) in KINDS]
        elif place.is_file():
            found = [place]
        else:
            found = matching(place)
        found = [file for file in found if file.is_file()]  # no folders, no pipes, no links that lead nowhere
    except (OSError, ValueError, RuntimeError):  # no path at all: too long, with a NUL, ~ of nobody
        found = []
    if not found:
        raise Refused(f"{key}={path[:200]!r} names no file: give a file, a folder or a glob of {kinds}")
    wrong = [file.name for file in found if ending(file) not in NAMED_KINDS]
    if wrong:
        more = ", ".join(sorted(NAMED_KINDS.keys() - KINDS.keys()))
        raise Refused(f"{key}={path!r}: {wrong[0]} is not one of {kinds} (or, named as a file, {more})")
    return sorted(found)
