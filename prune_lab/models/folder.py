"""Models from a folder or Hub id, however their weights are stored: dense, in few bits, as bitmask and values."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prune_lab.models.low_bit import bitmask, compressed_tensors
from prune_lab.models.shards import INDEX, WHOLE
from prune_lab.system.files import owner_suffix


def load(source: str, config: Any, **keywords: Any) -> Any:
    """What AutoModelForCausalLM.from_pretrained returns for `source`, whose config.json is `config`.

    Raises Refused where the weights are quantized in a way that is not ours.
    """
    keywords["use_safetensors"] = True  # pickles could run code
    if (Path(source) / bitmask.FILE).is_file():
        return bitmask.load(Path(source), config, **keywords)
    with _indexed(Path(source)) as folder:
        return compressed_tensors.load(str(folder), config, **keywords)


@contextmanager
def _indexed(folder: Path) -> Iterator[Path]:
    """The folder, or where its index has no metadata, which transformers asks for, one of links with such an index."""
    index = {} if (folder / WHOLE).is_file() or not (folder / INDEX).is_file() else _read(folder / INDEX)
    if not index or isinstance(index.get("metadata"), dict):
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
