"""Tensors in safetensors files, read and written one by one with ordinary reads and writes.

Every page of a memory map that was looked at counts as memory of the process until the map is closed; what is read
into a tensor does not, beyond the tensor itself. The layout of the files is https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"
MAX_SHARD_SIZE = "50GB"  # what save_pretrained of transformers takes
_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_AT_ONCE = 2**22  # numbers that are compared at a time
_NAMES = {dtype: name for name, dtype in _TYPES.items()}


@dataclass(frozen=True)
class Span:
    """Span of a file that holds a tensor's bytes."""

    file: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class Shards:
    """The tensors of a folder's safetensors by name."""

    def __init__(self, spans: Mapping[str, Span]) -> None:
        self.spans = dict(spans)

    def read(self, name: str) -> Tensor:
        """A tensor, in the type it is stored in. Raises ValueError where the file ends before it does."""
        span = self.spans[name]
        with span.file.open("rb", buffering=0) as file:
            return read_tensor(file, span.offset, span.shape, span.dtype)

    def write(self, name: str, tensor: Tensor) -> None:
        """Puts a tensor of the shape and type that are stored under `name` there."""
        span = self.spans[name]
        if (tuple(tensor.shape), tensor.dtype) != (span.shape, span.dtype):
            raise ValueError(f"{name}: {tuple(tensor.shape)} {tensor.dtype} does not fit what is laid out for it")
        with span.file.open("r+b", buffering=0) as file:
            write_tensor(file, span.offset, tensor)

    def equal(self, one: str, other: str) -> bool:
        """Equality of two tensors' values, whatever types they are stored in; NaN equals nothing."""
        if self.spans[one].shape != self.spans[other].shape:
            return False
        pairs = zip(self._parts(one), self._parts(other), strict=True)
        return all(bool((_comparable(a) == _comparable(b)).all()) for a, b in pairs)

    def is_zero(self, name: str) -> bool:
        """True where all values of a tensor are zero."""
        return all(not bool(_comparable(part).any()) for part in self._parts(name))

    def _parts(self, name: str) -> Iterator[Tensor]:
        """A tensor's numbers in order, some at a time."""
        span = self.spans[name]
        with span.file.open("rb", buffering=0) as file:
            for first in range(0, math.prod(span.shape), _AT_ONCE):
                count = min(_AT_ONCE, math.prod(span.shape) - first)
                yield read_tensor(file, span.offset + first * span.dtype.itemsize, (count,), span.dtype)

    @property
    def files(self) -> list[Path]:
        """The files, once each."""
        return sorted({span.file for span in self.spans.values()})


def open_shards(folder: Path) -> Shards:
    """Tensors of a folder in the Hub's layout. Raises ValueError where a file is damaged."""
    index, names = folder / INDEX, [WHOLE]
    if not (folder / WHOLE).is_file():
        if not index.is_file():
            others = ", ".join(sorted(path.name for path in folder.glob("*.safetensors"))[:3])
            raise ValueError(f"there is neither {WHOLE} nor {INDEX}{f', only {others}' if others else ''}")
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    return Shards({name: span for file in names for name, span in _read_header(folder / file).items()})


def open_file(path: Path) -> Shards:
    """The tensors of one file. Raises ValueError where it is damaged."""
    return Shards(_read_header(path))


def lay_out(folder: Path, tensors: Mapping[str, Tensor], max_shard_size: str = MAX_SHARD_SIZE) -> Shards:
    """Files with room for tensors of these shapes and types (they may be on the meta device), split, named and ordered
    as save_pretrained has them. The room takes no disk until something is written into it."""
    from huggingface_hub import split_torch_state_dict_into_shards

    split = split_torch_state_dict_into_shards(
        dict(tensors), filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    spans: dict[str, Span] = {}
    for file, names in split.filename_to_tensors.items():
        spans |= _write_header(folder / file, {name: tensors[name] for name in names})
    if split.is_sharded:
        total = {"total_parameters": sum(tensor.numel() for tensor in tensors.values())}
        content = {"metadata": total | split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return Shards(spans)


def read_tensor(file: RawIOBase, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The tensor whose bytes begin at `offset` of an unbuffered file."""
    tensor = torch.empty(shape, dtype=dtype)
    view, done = _bytes(tensor), 0
    file.seek(offset)
    while done < len(view):  # one read gives 2 GiB at most
        count = file.readinto(view[done:])
        if not count:
            raise ValueError(f"the file ends {len(view) - done} bytes too early: it is cut off")
        done += count
    return tensor


def write_tensor(file: RawIOBase, offset: int, tensor: Tensor) -> None:
    """Puts the bytes of a tensor at `offset` of an unbuffered file."""
    view, done = _bytes(tensor.detach().cpu().contiguous()), 0
    file.seek(offset)
    while done < len(view):
        done += file.write(view[done:]) or 0


def _comparable(tensor: Tensor) -> Tensor:
    """Tensor as it is, or in float32, which holds every number of the shorter types."""
    return tensor.float() if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _read_header(path: Path) -> dict[str, Span]:
    try:
        with path.open("rb") as file:
            header, start = _parse(file)
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name} is no safetensors file ({error})") from error
    spans, end = {}, start
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in _TYPES:
            raise ValueError(f"{path.name}: {name} is of type {entry['dtype']}: dense weights alone can be read")
        first, last = entry["data_offsets"]
        dtype, shape = _TYPES[entry["dtype"]], tuple(entry["shape"])
        if last - first != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{path.name}: the size of {name} does not fit its shape")
        spans[name] = Span(path, start + first, dtype, shape)
        end = max(end, start + last)
    if path.stat().st_size != end:
        raise ValueError(f"{path.name} should have {end} bytes and has {path.stat().st_size}: it is cut off or damaged")
    return spans


def _parse(file: BinaryIO) -> tuple[dict[str, Any], int]:
    """The header, and where the data begin."""
    length = int.from_bytes(file.read(8), "little")
    if length > 100_000_000:  # the format's own limit
        raise ValueError("its header is too long")
    return json.loads(file.read(length)), 8 + length


def _write_header(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Span]:
    """Begins a file: wide types first, then by name, as the library has it."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    order, end = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name)), 0
    for name in order:
        tensor, first = tensors[name], end
        end += tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [first, end]}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(file.tell() + end)
    return _read_header(path)
