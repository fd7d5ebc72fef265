"""Sparse weights on disk as one bit for each weight and the values that are not zero.

A folder so written has `model.bitmask.safetensors` in the place of `model.safetensors`, so that stock transformers
finds no weights in it instead of wrong ones. A matrix `NAME` of which enough is zero is three tensors there:

- `NAME.bitmask`, uint8, ceil(numbers / 8): bit i of byte j says whether weight 8 j + i, row by row, is not zero;
- `NAME.values`, the type of the matrix: those weights in that order;
- `NAME.shape`, int64.

Everything else is stored as it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from prune_lab.models.auto_class import model_class
from prune_lab.models.formats import BITMASK as FILE
from prune_lab.models.shards import Shards, Span, open_file

_PARTS = ("bitmask", "values", "shape")
_T = TypeVar("_T")
_BITS = torch.arange(8, dtype=torch.uint8)


def compress_folder(folder: Path) -> None:
    """Rewrites the safetensors of a Hugging Face folder as one bitmask file."""
    from safetensors.torch import load_file, save_file

    files = sorted(folder.glob("*.safetensors"))
    stored: dict[str, Tensor] = {}
    for file in files:
        for name, tensor in load_file(file).items():
            stored |= compress(name, tensor)
    save_file(stored, folder / FILE, metadata={"format": "pt"})
    for file in [*files, folder / "model.safetensors.index.json"]:
        file.unlink(missing_ok=True)


def compress(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """The tensors that stand for one: three of them where that takes fewer bytes, else itself."""
    keep = tensor.flatten() != 0
    values = tensor.flatten()[keep]
    bits = pad(keep.to(torch.uint8), (0, -keep.numel() % 8)).unflatten(0, (-1, 8))
    bitmask = (bits << _BITS).sum(dim=1, dtype=torch.uint8)
    if tensor.dim() < 2 or bitmask.numel() + values.nbytes >= tensor.nbytes:
        return {name: tensor}
    return {f"{name}.bitmask": bitmask, f"{name}.values": values, f"{name}.shape": torch.tensor(tensor.shape)}


def expand(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """The dense tensors by name, equal to those that were compressed. Raises ValueError where they do not fit."""
    dense = {name: tensor for name, tensor in stored.items() if _part(name) is None}
    for name in sorted({part for part in map(_part, stored) if part is not None}):
        bitmask, values, shape = (_stored_part(stored, name, part) for part in _PARTS)
        numbers = int(shape.prod())
        keep = (bitmask[:, None] >> _BITS & 1).flatten()[:numbers].bool()
        if len(keep) != numbers or int(keep.sum()) != len(values):
            raise ValueError(f"{FILE}: bitmask, values and shape of {name} do not fit each other")
        flat = torch.zeros(numbers, dtype=values.dtype)
        flat[keep] = values
        dense[name] = flat.view(*shape.tolist())
    return dense


class BitmaskShards(Shards):
    """The tensors of a folder that `compress_folder` wrote, by the names and shapes that they have when expanded."""

    def __init__(self, stored: Shards) -> None:
        dense = {name: span for name, span in stored.spans.items() if _part(name) is None}
        for name in sorted({part for part in map(_part, stored.spans) if part is not None}):
            values, _ = (_stored_part(stored.spans, name, part) for part in ("values", "shape"))
            dense[name] = Span(values.file, values.offset, values.dtype, tuple(stored.read(f"{name}.shape").tolist()))
        super().__init__(dense)
        self._stored = stored

    def read(self, name: str) -> Tensor:
        """A tensor, expanded."""
        of_name = {key: self._stored.read(key) for key in self._stored.spans if name in (key, _part(key))}
        return expand(of_name)[name]

    def _parts(self, name: str) -> Iterator[Tensor]:
        yield self.read(name).flatten()


def open_bitmask(folder: Path) -> BitmaskShards:
    """Tensors of a folder. Raises ValueError where its file is damaged."""
    return BitmaskShards(open_file(folder / FILE))


def _stored_part(stored: Mapping[str, _T], name: str, part: str) -> _T:
    try:
        return stored[f"{name}.{part}"]
    except KeyError as error:
        raise ValueError(f"{FILE} lacks {error.args[0]}: the file is not complete") from error


def load(folder: Path, config: Any, **keywords: Any) -> Any:
    """`from_pretrained` of the config's class, for a folder that `compress_folder` wrote."""
    from safetensors.torch import load_file
    from transformers import GenerationConfig

    weights = expand(load_file(folder / FILE))
    loaded: Any = model_class(config).from_pretrained(None, config=config, state_dict=weights, **keywords)
    if (folder / "generation_config.json").is_file():
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return loaded


def _part(name: str) -> str | None:
    """The matrix that a stored tensor is a part of."""
    stem, _, last = name.rpartition(".")
    return stem if last in _PARTS else None
