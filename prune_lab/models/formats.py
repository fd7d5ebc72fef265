"""Formats in which a model's folder may store its weights: how each is recognised and read."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prune_lab.models.low_bit import bitmask, compressed_tensors
from prune_lab.models.shards import INDEX, WHOLE, Shards, open_shards
from prune_lab.system.files import owner_suffix


@dataclass(frozen=True)
class Format:
    """Format of a folder's weights.

    is_of: whether it is that of a folder with a config of transformers. open: the tensors of a folder by name, shaped
    as the model has them; raises ValueError where a file is damaged. load: what AutoModelForCausalLM.from_pretrained
    returns for a folder with a config and keywords; raises Refused where it is not read.
    not_streamed: why its weights cannot be read block by block (model.stream=true); None where they can.
    """

    is_of: Callable[[Path, Any], bool]
    open: Callable[[Path], Shards]
    load: Callable[..., Any]
    not_streamed: str | None = None


def format_of(folder: Path, config: Any) -> Format:
    """The format of a folder, whose config.json is `config`."""
    return next(found for found in FORMATS if found.is_of(folder, config))


def load(folder: Path, config: Any, **keywords: Any) -> Any:
    """Result of AutoModelForCausalLM.from_pretrained for a folder, whose config.json is `config`.

    Raises Refused where the weights are quantized in a way that is not ours.
    """
    keywords["use_safetensors"] = True  # pickles could run code
    return format_of(folder, config).load(folder, config, **keywords)


def _load_shards(folder: Path, config: Any, **keywords: Any) -> Any:
    with _indexed(folder) as whole:
        return compressed_tensors.load(str(whole), config, **keywords)


@contextmanager
def _indexed(folder: Path) -> Iterator[Path]:
    """The folder, or where its index has no metadata, which transformers asks for, one of links with such an index."""
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


# The first that fits is a folder's.
FORMATS = (
    Format(
        is_of=lambda folder, config: (folder / bitmask.FILE).is_file(),
        open=bitmask.open_bitmask,
        load=bitmask.load,
        not_streamed=f"holds {bitmask.FILE}",
    ),
    Format(
        is_of=lambda folder, config: getattr(config, "quantization_config", None) is not None,
        open=open_shards,
        load=_load_shards,
        not_streamed="has quantized weights",
    ),
    Format(is_of=lambda folder, config: True, open=open_shards, load=_load_shards),  # dense
)
