"""dataset=text: local txt, jsonl and parquet files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from prune_lab.errors import Refused
from prune_lab.system.files import as_path, matching
from prune_lab.text.corpus import Corpus, Documents, LongDocument, Stream
from prune_lab.text.rows import has_rows, read_rows
from prune_lab.text.source import TextSource
from prune_lab.text.splits import by_position

_READERS = {".txt": "text", ".jsonl": "json", ".parquet": "parquet"}


@dataclass(frozen=True)
class TextFiles(TextSource):
    """Files named by a path, a folder or a glob. A txt file is one document; so is a row of the others.

    Documents are split by the hash of each; where there is one alone, by position.
    """

    path: str = ""
    test_path: str | None = None
    column: str = "text"

    def corpus(self) -> Corpus:
        """The files as a corpus that is read when it is used; with `test_path` its documents are the test split."""
        files, name = _files(self.path, "dataset.path"), f"dataset.path={self.path}"
        facts, read_test = {"path": self.path}, None
        if self.test_path is not None:
            test_files, test_name = _files(self.test_path, "dataset.test_path"), f"dataset.test_path={self.test_path}"
            read_test = partial(self._rows, test_files, test_name)
            facts["test_path"] = self.test_path
            _first(read_test(), 1, test_name)
            if (
                len(files) == 1
                and files[0].suffix == ".txt"
                and files[0].resolve() in {f.resolve() for f in test_files}
            ):
                raise Refused(f"{test_name} is the text of dataset.path too: what is tested on may not be trained on")
        read = partial(self._rows, files, name)
        if len(files) == 1 and files[0].suffix == ".txt":
            whole = LongDocument(name, files[0], facts, read_test)
            _first(whole.split("train"), 1, name)
            return whole
        first = _first(read(), 2, name)
        if len(first) == 1 and read_test is None:
            parts = {split: tuple(texts) for split, texts in by_position(first[0]).items()}
            return Documents(name, **parts, facts=facts)
        return Stream(name, read, facts, read_test)

    def _rows(self, files: list[Path], where: str) -> Iterator[str]:
        """The documents of all files, kind by kind, read as they are asked for."""
        for kind in sorted({file.suffix for file in files}):
            yield from self._rows_of(kind, [str(file) for file in files if file.suffix == kind], where)

    def _rows_of(self, kind: str, files: list[str], where: str) -> Iterator[str]:
        column = "text" if kind == ".txt" else self.column
        options = {"sample_by": "document"} if kind == ".txt" else {}
        try:
            for row in read_rows(_READERS[kind], list(filter(has_rows, files)), **options):
                if not isinstance(row.get(column), str):
                    raise Refused(
                        f"dataset.column={column!r} is not a column of text in {where}; "
                        f"its columns are {', '.join(row)}: give dataset.column=..."
                    )
                yield row[column]
        except Refused:
            raise
        except Exception as error:  # the readers' own errors: broken JSON, not parquet, not UTF-8
            raise Refused(f"{where} cannot be read as {_READERS[kind]}: {_innermost(error)}") from error


def _first(texts: Iterable[str], count: int, where: str) -> list[str]:
    """The first texts that are not blank; raises Refused where there is none."""
    found = list(islice(filter(str.strip, texts), count))
    if not found:
        raise Refused(f"{where}: there is no text in it")
    return found


def _files(path: str, key: str) -> list[Path]:
    """The files that `path` names, sorted; raises Refused where there are none of a known kind."""
    kinds = ", ".join(_READERS)
    try:
        place = as_path(path).absolute()  # to pyarrow file:x is an address, and ~/x at home
        if place.is_dir():
            found = [file for file in place.rglob("*") if file.suffix in _READERS]
        elif place.is_file():
            found = [place]
        else:
            found = matching(place)
        found = [file for file in found if file.is_file()]  # no folders, no pipes, no links that lead nowhere
    except (OSError, ValueError, RuntimeError):  # no path at all: too long, with a NUL, ~ of nobody
        found = []
    if not found:
        raise Refused(f"{key}={path[:200]!r} names no file: give a file, a folder or a glob of {kinds}")
    wrong = [file.name for file in found if file.suffix not in _READERS]
    if wrong:
        raise Refused(f"{key}={path!r}: {wrong[0]} is none of {kinds}")
    return sorted(found)


def _innermost(error: BaseException) -> str:
    """The message of the first cause: the readers wrap it in their own."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:200] or type(error).__name__
