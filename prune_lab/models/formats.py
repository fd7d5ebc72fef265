"""Formats in which a model may be stored: how each is recognised, checked and read.

A model lies in a folder in the Hub's layout (FORMATS: how its weights are stored), or in one file of which such a
folder is made (PACKED). Checking needs no PyTorch: what reads is imported when it reads.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prune_lab.models.folder_check import check_folder, licence_of
from prune_lab.models.gguf_header import check_gguf, is_gguf
from prune_lab.system.files import owner_suffix

if TYPE_CHECKING:
    from torch import dtype

    from prune_lab.models.shards import Shards


# What weights are stored in that transformers makes dense ones of as it reads: a name, by quant_method of the config.
DEQUANTIZED = {"mxfp4": "MXFP4", "fp8": "8-bit floats"}
BITMASK = "model.bitmask.safetensors"  # the one file of weights in models/low_bit/bitmask.py's format


@dataclass(frozen=True)
class Packed:
    """Format of a file that holds all of a model.

    is_of: whether a file is that. check: raises ValueError or Refused for one that cannot be read, called as a person
    calls it. unpack: the folder of a file, by its name and the number type of the weights (None: without weights), and
    facts: `notes` that a run must say, `licence`; it is there while inside.
    """

    is_of: Callable[[Path], bool]
    check: Callable[[Path, str], None]
    unpack: Callable[[Path, str, dtype | None], AbstractContextManager[tuple[Path, dict[str, Any]]]]


@dataclass(frozen=True)
class Format:
    """Format of a folder's weights.

    is_of: whether it is that of a folder with a config of transformers. open: the tensors of a folder by name, shaped
    as the model has them; raises ValueError where a file is damaged. load: what `from_pretrained` of its auto class
    returns for a folder with a config and keywords; raises Refused where it is not read.
    not_streamed: why its weights cannot be read block by block (model.stream=true); None where they can.
    """

    is_of: Callable[[Path, Any], bool]
    open: Callable[[Path], Shards]
    load: Callable[..., Any]
    not_streamed: str | None = None


@dataclass(frozen=True)
class Place:
    """Folder in the Hub's layout from which a model is read; notes that a run must say of it, and its licence."""

    folder: Path
    notes: list[str] = field(default_factory=list)
    licence: str | None = None


def check(path: Path, weights: str) -> None:
    """Raises ValueError or Refused for a folder or file that can hold no model we may read.

    weights: pretrained or random.
    """
    if (packed := _packed(path)) is not None:
        packed.check(path, str(path))
    elif path.is_dir():
        check_folder(path, weights)
    else:
        raise ValueError(
            f"name={str(path)!r} is a file of no format that holds a whole model: give its folder, with config.json "
            "and *.safetensors, or a GGUF file"
        )


def files_of(path: Path) -> list[Path]:
    """Files that the model of a folder or file is read from."""
    return [file for file in path.iterdir() if file.is_file()] if path.is_dir() else [path]


@contextmanager
def opened(path: Path, name: str, dtype: dtype | None) -> Iterator[Place]:
    """The folder of a path that a person calls `name`: the path itself, or what is made of it; it stays while inside.

    dtype: the number type of the weights, or None where config and tokenizer alone are asked for. Raises Refused for a
    file that cannot be read.
    """
    packed = _packed(path)
    if packed is None:
        yield Place(path, licence=licence_of(path / "README.md"))
        return
    with packed.unpack(path, name, dtype) as (folder, facts):
        yield Place(folder, list(facts["notes"]), facts["licence"])


def format_of(folder: Path, config: Any) -> Format:
    """The format of a folder, whose config.json is `config`."""
    return next(found for found in FORMATS if found.is_of(folder, config))


def load(folder: Path, config: Any, **keywords: Any) -> Any:
    """Result of `from_pretrained` of the auto class (models/auto_class.py) for a folder, whose config.json is `config`.

    Raises Refused where the weights are quantized in a way that is not ours.
    """
    keywords["use_safetensors"] = True  # pickles could run code
    return format_of(folder, config).load(folder, config, **keywords)


def dequantized_from(config: Any) -> str | None:
    """Name of what the weights of a config are stored in, where dense ones are made of them; None of others."""
    stored = getattr(config, "quantization_config", None)
    method = stored.get("quant_method") if isinstance(stored, dict) else None
    return DEQUANTIZED.get(method) if isinstance(method, str) else None


def _packed(path: Path) -> Packed | None:
    return next((found for found in PACKED if found.is_of(path)), None)


def _unpack_gguf(path: Path, name: str, dtype: dtype | None) -> AbstractContextManager[tuple[Path, dict[str, Any]]]:
    from prune_lab.models.gguf_folder import unpacked

    return unpacked(path, name, dtype)


def _open_shards(folder: Path) -> Shards:
    from prune_lab.models.shards import open_shards

    return open_shards(folder)


def _load_shards(folder: Path, config: Any, **keywords: Any) -> Any:
    from prune_lab.models.low_bit import compressed_tensors

    with _indexed(folder) as whole:
        return compressed_tensors.load(str(whole), config, **keywords)


def _load_dequantized(folder: Path, config: Any, **keywords: Any) -> Any:
    from prune_lab.models.low_bit import dequantized

    with _indexed(folder) as whole:
        return dequantized.load(folder, str(whole), config, **keywords)


def _open_bitmask(folder: Path) -> Shards:
    from prune_lab.models.low_bit.bitmask import open_bitmask

    return open_bitmask(folder)


def _load_bitmask(folder: Path, config: Any, **keywords: Any) -> Any:
    from prune_lab.models.low_bit import bitmask

    return bitmask.load(folder, config, **keywords)


@contextmanager
def _indexed(folder: Path) -> Iterator[Path]:
    """The folder, or where its index has no metadata, which transformers asks for, one of links with such an index."""
    from prune_lab.models.shards import INDEX, WHOLE

    index = {} if (folder / WHOLE).is_file() or not (folder / INDEX).is_file() else _read(folder / INDEX)
    if not isinstance(index, dict) or not index or isinstance(index.get("metadata"), dict):
        yield folder
        return
    with tempfile.TemporaryDirectory(suffix=owner_suffix()) as place:
        for file in folder.iterdir():
            if file.name != INDEX:
                (Path(place) / file.name).symlink_to(file.resolve())
        (Path(place) / INDEX).write_text(json.dumps(index | {"metadata": {}}), encoding="utf-8")
        yield Path(place)


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


# The first that fits is a path's.
PACKED = (Packed(is_gguf, check_gguf, _unpack_gguf),)
FORMATS = (
    Format(
        is_of=lambda folder, config: (folder / BITMASK).is_file(),
        open=_open_bitmask,
        load=_load_bitmask,
        not_streamed=f"holds {BITMASK}",
    ),
    Format(
        is_of=lambda folder, config: dequantized_from(config) is not None,
        open=_open_shards,
        load=_load_dequantized,
        not_streamed="has quantized weights",
    ),
    Format(
        is_of=lambda folder, config: getattr(config, "quantization_config", None) is not None,
        open=_open_shards,
        load=_load_shards,
        not_streamed="has quantized weights",
    ),
    Format(is_of=lambda folder, config: True, open=_open_shards, load=_load_shards),  # dense
)
