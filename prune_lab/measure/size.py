"""Four sizes that are never mixed: non-zero weights, parameters, bytes in memory, bytes on disk."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from prune_lab.models.anatomy import Anatomy
from prune_lab.models.contents import count_nonzero, count_weights
from prune_lab.models.found import ROUTER
from prune_lab.models.low_bit.experts import LowBitExperts
from prune_lab.models.low_bit.linears import LowBitLinear
from prune_lab.models.watched_experts import experts_of_a_token, modules_of_experts

MB = 1e6


@dataclass(frozen=True)
class Size:
    """Counts of a model's own tensors, and their megabytes (10^6 bytes); a tied matrix counts once.

    kv_cache_bytes: what the key-value cache holds of each token; None where the layout of attention is not known.
    read_mb: what decoding a token reads of the weights. active: parameters that a token is multiplied by or added to,
    of a mixture of experts; None of other models.
    """

    params: int
    nonzero: int
    weights_mb: float
    disk_mb: float
    read_mb: float
    kv_cache_bytes: int | None
    active: int | None = None


def held_bytes(tensor: Any) -> int:
    """Bytes that a tensor holds; of one made of others (2:4 values and their places), those of its parts."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(held_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return int(tensor.numel() * tensor.element_size())


def measure_size(model: Any, files: Iterable[Path]) -> Size:
    """Sizes of `model` and of the files that hold its weights."""
    held = [*model.parameters(), *model.buffers()]  # a tied matrix once
    return Size(
        params=count_weights(model),
        nonzero=count_nonzero(model),
        weights_mb=sum(held_bytes(t) for t in held) / MB,
        disk_mb=sum(file.stat().st_size for file in files) / MB,
        read_mb=read_bytes(Anatomy(model)) / MB,
        kv_cache_bytes=kv_cache_bytes(Anatomy(model)),
        active=active_parameters(Anatomy(model)),
    )


def active_parameters(anatomy: Anatomy) -> int | None:
    """All parameters, less those of experts that a token does not go to; None of a model without experts."""
    if anatomy.found is None or ROUTER not in anatomy.found.left_alone.values():
        return None
    return count_weights(anatomy.model) - round(sum(weights for weights, _ in _idle_weights(anatomy)))


def read_bytes(anatomy: Anatomy) -> int:
    """Bytes of weights that one token of one sequence reads: of a table of embeddings its row, of experts its own.

    A table that is the head as well is read as a whole.
    """
    model = anatomy.model
    held = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    head = model.get_output_embeddings()
    tables = {id(m.weight): m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    if head is not None and hasattr(head, "weight"):
        tables.pop(id(head.weight), None)
    rows = sum(held_bytes(table) // table.shape[0] * (table.shape[0] - 1) for table in tables.values())
    idle = sum(size for _, size in _idle_weights(anatomy))
    return sum(map(held_bytes, held.values())) - rows - round(idle)


def _idle_weights(anatomy: Anatomy) -> Iterator[tuple[float, float]]:
    """Of each matrix of experts the mean number of weights that a token does not come to, and their bytes."""
    model = anatomy.model
    for of_block in anatomy.found.matrices if anatomy.found is not None else ():
        for matrix in of_block:
            if not matrix.is_linear and matrix.active < 1:
                idle = (1 - matrix.active) * matrix.place.shape[0] * matrix.place.shape[1]
                yield idle, idle * model.get_parameter(matrix.place.parameter).element_size()
    for module, active in low_bit_experts(anatomy):
        yield (1 - active) * module.codes().numel(), (1 - active) * sum(map(held_bytes, module.buffers()))


def low_bit_experts(anatomy: Anatomy) -> list[tuple[LowBitExperts, float]]:
    """Matrices of experts in few bits, each with the share of its experts that a token goes to."""
    held = [(name, module) for name, module in anatomy.model.named_modules() if isinstance(module, LowBitExperts)]
    if not held or anatomy.found is None:
        return []
    modules, counts = modules_of_experts(anatomy.model, anatomy.found), dict[str, int]()
    for name, module in held:
        owner = name.rpartition(".")[0]
        counts[owner] = min(counts.get(owner, len(module)), len(module))
    chosen = experts_of_a_token(anatomy.model, modules, counts)
    return [(module, chosen[name.rpartition(".")[0]] / len(module)) for name, module in held]


def kv_cache_bytes(anatomy: Anatomy) -> int | None:
    """Bytes of keys and values that generation keeps for a token, over all blocks, in the number type of the model.

    Counted from the shapes of the attention's Linears. A block with a sliding window keeps a token while it is within
    the window, and counts as the others.
    """
    if anatomy.found is not None:
        return None
    family, width = anatomy.family, 0
    for block in anatomy.blocks:
        written = {slot.linear for slot in family.units["heads"].slots if slot.side == "rows"}
        rows = sum(_shape(block.get_submodule(name))[0] for name in written)
        width += rows - _shape(block.get_submodule(family.attention_output))[1]  # without those of the query heads
    return width * int(anatomy.model.get_input_embeddings().weight.element_size())


def _shape(module: Any) -> tuple[int, int]:
    """Outputs and inputs of a Linear of any kind."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, LowBitLinear):
        return module.out_features, module.in_features
    first, second = module.weight.shape
    return (second, first) if isinstance(module, Conv1D) else (first, second)
