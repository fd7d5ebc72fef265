"""dataset=text: local txt, jsonl and parquet files."""

from __future__ import annotations

import glob
from dataclasses import dataclass
from pathlib import Path

from prune_lab.errors import Refused
from prune_lab.text.source import TextSource
from prune_lab.text.splits import Documents, of_documents

_READERS = {".txt": "text", ".jsonl": "json", ".parquet": "parquet"}


@dataclass(frozen=True)
class TextFiles(TextSource):
    """Files named by a path, a folder or a glob. A txt file is one document; so is a row of the others."""

    path: str = ""
    test_path: str | None = None
    column: str = "text"

    def documents(self) -> Documents:
        """Reads the files; with `test_path` its documents are the test split, and none of `path` is."""
        texts = self._read(self.path, "dataset.path")
        facts = {"path": self.path}
        if self.test_path is None:
            return of_documents(f"dataset.path={self.path}", texts, facts)
        test = [text for text in self._read(self.test_path, "dataset.test_path") if text.strip()]
        if not test:
            raise Refused(f"dataset.test_path={self.test_path}: there is no text in it")
        seen = set(test)
        rest = of_documents(f"dataset.path={self.path}", [text for text in texts if text not in seen], facts)
        return Documents(
            rest.name,
            train=rest.train + rest.test,
            calibration=rest.calibration,
            validation=rest.validation,
            test=tuple(test),
            facts=facts | {"test_path": self.test_path},
        )

    def _read(self, path: str, key: str) -> list[str]:
        files = _files(path, key)
        by_kind: dict[str, list[str]] = {}
        for file in files:
            by_kind.setdefault(file.suffix, []).append(str(file))
        return [text for kind, names in by_kind.items() for text in self._rows(kind, names, f"{key}={path}")]

    def _rows(self, kind: str, files: list[str], where: str) -> list[str]:
        from datasets import load_dataset
        from datasets.utils import logging

        logging.set_verbosity(logging.CRITICAL)  # it logs the errors that it raises
        column = "text" if kind == ".txt" else self.column
        options = {"sample_by": "document"} if kind == ".txt" else {}
        try:
            # Streaming reads the files as they are: no copy of the corpus in a cache.
            rows = load_dataset(_READERS[kind], data_files=files, split="train", streaming=True, **options)
            documents = []
            for row in rows:
                if not isinstance(row.get(column), str):
                    raise Refused(
                        f"dataset.column={column!r} is not a column of text in {where}; "
                        f"its columns are {', '.join(row)}: give dataset.column=..."
                    )
                documents.append(row[column])
        except Refused:
            raise
        except Exception as error:  # the readers' own errors: broken JSON, not parquet, not UTF-8
            raise Refused(f"{where} cannot be read as {_READERS[kind]}: {_innermost(error)}") from error
        return documents


def _files(path: str, key: str) -> list[Path]:
    """The files that `path` names, sorted; raises Refused where there are none of a known kind."""
    kinds = ", ".join(_READERS)
    place = Path(path).expanduser()
    if place.is_dir():
        found = [file for file in place.rglob("*") if file.suffix in _READERS]
    elif place.is_file():
        found = [place]
    else:
        found = [Path(name) for name in glob.glob(str(place), recursive=True)]  # noqa: PTH207 (absolute globs)
    if not found:
        raise Refused(f"{key}={path!r} names no file: give a file, a folder or a glob of {kinds}")
    wrong = [file.name for file in found if file.suffix not in _READERS]
    if wrong:
        raise Refused(f"{key}={path!r}: {wrong[0]} is none of {kinds}")
    return sorted(found)


def _innermost(error: BaseException) -> str:
    """The message of the first cause: the readers wrap it in their own."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:200] or type(error).__name__
