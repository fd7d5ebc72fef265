"""Rows of txt, JSON and parquet files, of which one column is read, whatever the other fields hold."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import re
from collections.abc import Iterable, Iterator
from datetime import date, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import IO, Any

# By the end of a file's name. Those with a star are read where they are named, and not looked for in a folder.
KINDS = {".txt": "text", ".jsonl": "json", ".parquet": "parquet"}
NAMED_KINDS = KINDS | {".json": "json", ".json.gz": "json", ".jsonl.gz": "json", ".txt.gz": "text"}
ROWS_AT_ONCE = 64  # of a parquet file: each may be a book
_CHARACTERS = 2**20  # of a JSON array that are read at once
_CUT = re.compile("[\ud800-\udfff]")  # half a character: what a JSON escape that was cut in two leaves

Row = tuple[str, Any, Iterable[str]]  # its place ("line 3"), the column's value (None: none), the row's columns


def ending(path: Path) -> str:
    """The end of a file's name that says its kind, such as .jsonl or .jsonl.gz, in small letters."""
    kind = "".join(path.suffixes[-2:]) if path.suffix.lower() == ".gz" else path.suffix
    return kind.lower()


def read_rows(path: Path, column: str) -> Iterator[Row]:
    """The rows of a file in order, read as they are asked for; a txt file is one row.

    Raises ValueError, with the place, where the file is not what its name says; and what pyarrow and gzip raise.
    """
    kind = NAMED_KINDS[ending(path)]
    if kind == "parquet":
        return _parquet(path, column)
    return _json(path, column) if kind == "json" else _text(path)


def mended(text: str) -> str:
    """The text, with U+FFFD for each half of a character that stands alone, which UTF-8 cannot hold."""
    return text if text.isascii() else _CUT.sub("\ufffd", text)


def _text(path: Path) -> Iterator[Row]:
    with _open(path) as file:
        text = _decoded(file.read()).removeprefix("\ufeff")
    yield "the file", text.replace("\r\n", "\n").replace("\r", "\n"), ()


def _decoded(content: bytes, line: int = 1) -> str:
    """The text of UTF-8 bytes, the first in `line`; raises ValueError that names the line of a wrong one."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        if line == 1 and (wide := wide_encoding(content)) is not None:
            raise ValueError(
                f"it is {wide.upper()}, not utf-8: convert it, such as by iconv -f {wide} -t utf-8"
            ) from error
        line += content.count(b"\n", 0, error.start)
        raise ValueError(
            f"line {line} holds the byte 0x{content[error.start]:02x}, which is not utf-8: convert the file, such as "
            "by iconv -f latin1 -t utf-8"
        ) from error


def wide_encoding(content: bytes) -> str | None:
    """utf-32 or utf-16, where the first bytes of a file say so."""
    if content[:4] in (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE):
        return "utf-32"
    return "utf-16" if content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else None


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")  # type: ignore[return-value]


# JSON: an object in each line, or one array of objects.


def _json(path: Path, column: str) -> Iterator[Row]:
    with _open(path) as file:
        first = next((line for line in file if not line.isspace()), b"")
    if first.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        return _of_objects(_array(path), column)
    return _of_objects(_lines(path), column)


def _of_objects(values: Iterator[tuple[str, Any]], column: str) -> Iterator[Row]:
    for place, row in values:
        if not isinstance(row, dict):
            raise ValueError(f'{place} is no object with columns but {what(row)}: give {{"{column}": "..."}} for each')
        yield place, row.get(column), row


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if line.isspace():
                continue
            place = f"line {number}"
            text = _decoded(line, number).removeprefix("\ufeff")
            try:
                # Other fields may hold any number: one of 5,000 digits is none that Python makes of it unasked.
                yield place, json.loads(text, parse_int=float)
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"{place} is not a complete JSON object ({_why(error)}): give one object a line, or one array"
                ) from error


class _Array:
    """The elements of one JSON array, of which a part is held at a time."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self._decoder = json.JSONDecoder(parse_int=float)
        self._text, self._at = "", 0

    def elements(self) -> Iterator[tuple[str, Any]]:
        """Each with its place."""
        self._take("[", "it")
        number = 0
        while self._next() != "]":
            number += 1
            place = f"item {number}"
            if number > 1:
                self._take(",", place)
            yield place, self._value(place)
        self._at += 1
        if self._next():
            raise ValueError("it goes on after its array: give one object a line, or one array in all")

    def _more(self) -> bool:
        """Reads on; whether there was anything to read."""
        try:
            block = self._file.read(_CHARACTERS)
        except UnicodeDecodeError as error:
            raise ValueError(f"it is not utf-8 ({error.reason}): convert it, such as by iconv") from error
        self._text, self._at = self._text[self._at :] + block, 0
        return bool(block)

    def _next(self) -> str:
        """The character that comes next, blanks aside; none at the end of the file."""
        while True:
            while self._at < len(self._text) and self._text[self._at].isspace():
                self._at += 1
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def _take(self, character: str, place: str) -> None:
        if self._next() != character:
            raise ValueError(f"{place} of its array is not where it should be: {character!r} is missing before it")
        self._at += 1

    def _value(self, place: str) -> Any:
        self._next()
        while True:
            try:
                value, self._at = self._decoder.raw_decode(self._text, self._at)
                return value
            except (ValueError, RecursionError) as error:
                if isinstance(error, RecursionError) or not self._more():
                    raise ValueError(f"{place} of its array is not a complete JSON value ({_why(error)})") from error


def _array(path: Path) -> Iterator[tuple[str, Any]]:
    with _open(path) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig") as file:
        yield from _Array(file).elements()


def _why(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg.removesuffix(' at')} at character {error.pos + 1}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


# Parquet.


def _parquet(path: Path, column: str) -> Iterator[Row]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        names, number = file.schema_arrow.names, 0
        if column not in names:
            for number in range(file.metadata.num_rows):
                yield f"row {number + 1}", None, names
            return
        for batch in file.iter_batches(ROWS_AT_ONCE, columns=[column]):
            for value in batch.column(column).to_pylist():
                number += 1
                yield f"row {number}", value, names


# What a value is, in words.


def what(value: Any) -> str:
    """Name of the kind of a value that is not text."""
    if isinstance(value, list):
        kinds = {what(entry) for entry in value[:100]}
        return f"a list of {_many(kinds.pop())}" if len(kinds) == 1 else "a list"
    if isinstance(value, dict):
        return f"an object with the fields {', '.join(list(map(str, value))[:6])}" if value else "an empty object"
    if isinstance(value, str):
        return "a string"
    if isinstance(value, bytes):
        return "bytes"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, date | time | timedelta):
        return "a date or time"
    return "a number" if isinstance(value, int | float | Decimal) else f"a {type(value).__name__}"


def _many(kind: str) -> str:
    first, _, rest = kind.partition(" ")
    if first in ("a", "an"):
        noun, _, more = rest.partition(" ")
        return {"date": "dates or times"}.get(noun, f"{noun}s {more}".strip())
    return kind
