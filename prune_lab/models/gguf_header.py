"""Header of a GGUF file: its metadata and the places of its tensors, read without PyTorch and checked.

The layout is https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. What the weights are is transformers' to read
(models/gguf_folder.py): here a file that it cannot read is refused before anything is loaded.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from prune_lab.models.families import family_of

MAGIC, SUFFIX = b"GGUF", ".gguf"
_VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST_DIMENSIONS = 4
_PACKAGES = ("gguf", "accelerate")  # by which transformers reads such a file
# Families that have another name there than in transformers.
_FAMILIES = {"gemma3": "gemma3_text"}


@dataclass(frozen=True)
class Stored:
    """A tensor of the file: its shape as PyTorch has it, the number of its type, and where it begins."""

    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True)
class Header:
    """Metadata (of an array its length alone) and tensors by name."""

    metadata: dict[str, Any]
    tensors: dict[str, Stored]

    @property
    def architecture(self) -> str:
        """Name of the architecture, as GGUF has it."""
        return str(self.metadata.get("general.architecture", ""))

    def said(self, key: str) -> Any:
        """Value of an architecture's key, such as block_count; None where there is none."""
        return self.metadata.get(f"{self.architecture}.{key}")

    @property
    def kinds(self) -> str:
        """Names of the types that the matrices are stored in, such as Q4_K."""
        from gguf.constants import GGMLQuantizationType

        numbers = sorted({stored.kind for stored in self.tensors.values() if len(stored.shape) > 1})
        return ", ".join(GGMLQuantizationType(number).name for number in numbers)


def is_gguf(path: Path) -> bool:
    """True for a file that begins as GGUF does, or whose name says that it should."""
    if not path.is_file():
        return False
    if path.suffix.lower() == SUFFIX:
        return True
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def check_gguf(path: Path, called: str) -> None:
    """Raises ValueError for a GGUF file that cannot be read, which a person calls `called`."""
    name = f"name={called!r}"
    try:
        header = read_header(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name} cannot be read as GGUF: {error}") from error
    if missing := [package for package in _PACKAGES if find_spec(package) is None]:
        raise ValueError(
            f"{name} is a GGUF file, and {' and '.join(missing)}, which it is read by, "
            f'{"is" if len(missing) == 1 else "are"} not installed: pip install "prune-lab[gguf]"'
        )
    if (parts := header.metadata.get("split.count", 0)) > 1:
        raise ValueError(
            f"{name} is one of {parts} parts of a split GGUF file: merge them with llama.cpp's "
            "'llama-gguf-split --merge FIRST.gguf WHOLE.gguf' and name the whole"
        )
    if (kind := header.metadata.get("general.type", "model")) != "model":
        raise ValueError(f"{name} is a GGUF file of another kind ({kind}): only a whole model can be read")
    family_of(_FAMILIES.get(header.architecture, header.architecture))
    _check_extents(path, header, name)


def read_header(path: Path) -> Header:
    """The header of a file; raises ValueError, with the reason, for one that is no GGUF or is damaged."""
    with path.open("rb") as file:
        first = file.read(24)
        if first[:4] != MAGIC:
            began = f"it begins with {first[:4]!r}" if first else "it is empty"
            raise ValueError(f"{began}, and a GGUF file with {MAGIC!r}: give a GGUF file, or a folder")
        if len(first) < 24:
            raise ValueError(_CUT)
        version, tensors, keys = struct.unpack("<IQQ", first[4:])
        if version not in _VERSIONS:
            other = ", of the other byte order" * (version & 0xFFFF == 0)
            raise ValueError(f"it is of version {version}{other}: versions {_VERSIONS[0]} and {_VERSIONS[1]} are read")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            reader = _Reader(content, 24)
            try:
                metadata = {reader.string(): reader.value(reader.number("I")) for _ in range(keys)}
                found = {reader.string(): reader.stored() for _ in range(tensors)}
            except (struct.error, OverflowError) as error:
                raise ValueError(_CUT) from error
            end = reader.place
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"its alignment is {alignment!r}: it is damaged")
    if len(found) != tensors or not found:
        raise ValueError("two of its tensors have one name: it is damaged" if found else "it holds no tensors")
    start = -(-end // alignment) * alignment
    at = {name: Stored(stored.shape, stored.kind, start + stored.offset) for name, stored in found.items()}
    return Header(metadata, at)


_CUT = "it ends, or is damaged, before the end of its header: fetch it again"


class _Reader:
    """Values one after the other from a place of a file's content; struct.error where it ends before they do."""

    def __init__(self, content: mmap.mmap, place: int) -> None:
        self.content, self.place = content, place

    def number(self, kind: str) -> Any:
        """A number of one of struct's types."""
        (value,) = struct.unpack_from(f"<{kind}", self.content, self.place)
        self.place += struct.calcsize(f"<{kind}")
        return value

    def skip(self, count: int) -> int:
        """Passes over bytes and returns where they begin."""
        begin, self.place = self.place, self.place + count
        if self.place > len(self.content):
            raise struct.error("beyond the end")
        return begin

    def string(self) -> str:
        """A string; what is no UTF-8 in it is shown as that."""
        begin = self.skip(self.number("Q"))
        return self.content[begin : self.place].decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        """A value of metadata of one of GGUF's types; of an array, which may be a vocabulary, its length."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise ValueError(f"a value of its metadata has the unknown type {kind}: it is damaged")
        inner, count = self.number("I"), self.number("Q")
        if inner in _SCALARS:
            self.skip(count * struct.calcsize(_SCALARS[inner]))
        elif inner == _STRING:
            for _ in range(count):
                self.skip(self.number("Q"))
        else:
            raise ValueError(f"an array of its metadata is of the unknown type {inner}: it is damaged")
        return count

    def stored(self) -> Stored:
        """An entry of the table of tensors, less its name; the offset is from where the data begin."""
        dimensions = self.number("I")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise ValueError(f"a tensor has {dimensions} dimensions: it is damaged")
        shape = tuple(self.number("Q") for _ in range(dimensions))[::-1]
        return Stored(shape, self.number("I"), self.number("Q"))


def _check_extents(path: Path, header: Header, name: str) -> None:
    """Raises ValueError where a tensor has an unknown type, or the file ends before it does."""
    from gguf.constants import GGML_QUANT_SIZES

    sizes, size = {int(kind): of_kind for kind, of_kind in GGML_QUANT_SIZES.items()}, path.stat().st_size
    for key, stored in header.tensors.items():
        if stored.kind not in sizes:
            raise ValueError(f"{name}: {key} is stored in a type of number {stored.kind}, which the package gguf lacks")
        numbers, bytes_ = sizes[stored.kind]
        end = stored.offset + math.prod(stored.shape) // numbers * bytes_
        if stored.shape[-1] % numbers or end > size:
            raise ValueError(
                f"{name} has {size} bytes, and its {key} ends at {end}: the file is cut off or damaged; fetch it again"
                if end > size
                else f"{name}: {key} has rows of {stored.shape[-1]}, no multiple of {numbers}: the file is damaged"
            )
