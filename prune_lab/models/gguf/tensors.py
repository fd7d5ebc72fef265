"""Tensors of a GGUF file: their names, how each is made of a tensor of the model, and back.

Names are those of the package gguf. Three things are stored otherwise than the model has them. Rows of queries and keys
of a Llama stand in pairs, since llama.cpp rotates neighbours where transformers rotates the halves of a head; norms of
a Gemma have the 1 in them that the model adds; fused experts are two tensors, gates and what they gate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prune_lab.models.gguf.families import Architecture, architecture_of, constants

Values = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Piece:
    """A tensor of a file.

    key: name of the tensor of the model that it is made of; a constant has none. source: that tensor. heads: their
    number where its rows stand in pairs. shift: what is added. half: of a fused tensor along its second dimension, 0
    or 1.
    """

    name: str
    key: str | None
    source: Tensor
    heads: int | None = None
    shift: float = 0.0
    half: int | None = None

    @property
    def _part(self) -> Tensor:
        return self.source if self.half is None else self.source.chunk(2, dim=1)[self.half]

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape, as PyTorch has it."""
        return tuple(self._part.shape)

    def values(self) -> Values:
        """Values as the file has them, float32."""
        tensor = self._part.detach().float().cpu()
        if self.heads is not None:
            tensor = in_pairs(tensor, self.heads)
        return (tensor + self.shift if self.shift else tensor).contiguous().numpy()

    def original(self, stored: Tensor) -> Tensor:
        """The tensor, or half of a tensor, of the model for values of the file."""
        tensor = stored - self.shift if self.shift else stored
        return tensor if self.heads is None else in_halves(tensor, self.heads)


def in_pairs(rows: Tensor, heads: int) -> Tensor:
    """Rows of heads whose two halves are interleaved: 0, n/2, 1, n/2 + 1, ... of each head of n rows."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(rows.shape)


def in_halves(rows: Tensor, heads: int) -> Tensor:
    """Rows as they were before `in_pairs`."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(rows.shape)


def pieces_of(model: Any) -> Iterator[Piece]:
    """All tensors of the file of a model, in the order of its blocks; raises ValueError for one that has no name."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    config, architecture = model.config, architecture_of(model.config)
    number = next(number for number, name in MODEL_ARCH_NAMES.items() if name == architecture.name)
    names = get_tensor_name_map(number, config.num_hidden_layers)
    for name, factors in constants(config).items():
        yield Piece(name, None, torch.tensor(factors))
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings and not architecture.own_head:
            continue
        if key.endswith("experts.gate_up_proj"):
            for half, part in enumerate(("gate_proj", "up_proj")):
                whole = key.replace("gate_up_proj", part)
                yield Piece(_name(names, f"{whole}.weight", key), key, tensor, half=half)
            continue
        stored = key if key.endswith((".weight", ".bias")) else f"{key}.weight"
        name = _name(names, stored, key)
        yield Piece(name, key, tensor, _heads(key, config, architecture), _shift(name, architecture))


def _name(names: Any, stored: str, key: str) -> str:
    name = names.get_name(stored, (".weight", ".bias"))
    if name is None:
        raise ValueError(f"export=gguf: GGUF has no name for {key}")
    return str(name)


def _heads(key: str, config: Any, architecture: Architecture) -> int | None:
    part = key.split(".")[-2]
    if not architecture.in_pairs or part not in ("q_proj", "k_proj"):
        return None
    return int(config.num_attention_heads if part == "q_proj" else config.num_key_value_heads)


def _shift(name: str, architecture: Architecture) -> float:
    return 1.0 if architecture.norms_plus_one and name.endswith("_norm.weight") else 0.0


def state_of(model: Any, stored: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """State dict of a model like `model` whose file has the values that `stored` gives by name."""
    found: dict[str, list[Tensor]] = {}
    for piece in pieces_of(model):
        if piece.key is not None:
            found.setdefault(piece.key, []).append(piece.original(stored(piece.name)))
    return {key: parts[0] if len(parts) == 1 else torch.cat(parts, dim=1) for key, parts in found.items()}
