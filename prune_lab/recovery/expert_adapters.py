"""Low-rank adapters of the experts of a mixture, which share a parameter: an update for each expert's matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from prune_lab.models.anatomy import Anatomy
from prune_lab.models.products import FusedMatrix
from prune_lab.pruning.masks import Masks

_KEPT = "_expert_adapters"  # where a model keeps them
_A, _B = "_lora_a", "_lora_b"  # after the parameter's name


def drawn(generator: torch.Generator, *shape: int) -> Tensor:
    """A new A, (..., rank, in), uniform from +-1/sqrt(in)."""
    found: Tensor = (torch.rand(*shape, generator=generator) * 2 - 1) / shape[-1] ** 0.5
    return found


class ExpertAdapter:
    """Update scale * B A of every matrix in a parameter: A (matrices, rank, in), B (matrices, out, rank).

    While they are computed with, the updated weights stand in the parameter's place, as large as it is.
    """

    def __init__(self, model: Any, matrices: list[tuple[str, FusedMatrix]], masks: Masks, scale: float) -> None:
        place = matrices[0][1].place
        self.name, self._scale, self._shape = place.parameter, scale, place.shape
        self._is_transposed = place.strides[1] != 1
        owner, _, self._leaf = self.name.rpartition(".")
        self._owner: nn.Module = model.get_submodule(owner)
        self._weight, self._count = model.get_parameter(self.name), len(matrices)
        self._keep: Tensor | None = None
        if any(name in masks.keep for name, _ in matrices):
            self._keep = torch.ones_like(self._weight, dtype=torch.bool)
            for name, matrix in matrices:
                matrix.of(self._keep).copy_(masks.keep[name])

    def register(self, rank: int, generator: torch.Generator) -> None:
        """Gives the module that has the parameter an A, drawn uniformly from +-1/sqrt(in), and a B of zeros."""
        out_features, in_features = self._shape
        a = drawn(generator, self._count, rank, in_features)
        like = {"device": self._weight.device, "dtype": self._weight.dtype}
        self._owner.register_parameter(f"{self._leaf}{_A}", nn.Parameter(a.to(**like)))
        b = torch.zeros(self._count, out_features, rank, **like)
        self._owner.register_parameter(f"{self._leaf}{_B}", nn.Parameter(b))

    def updated(self) -> Tensor:
        """The weights with their updates, through the masks."""
        a, b = (self._owner.get_parameter(f"{self._leaf}{part}") for part in (_A, _B))
        update = self._scale * (b @ a)
        update = (update.mT if self._is_transposed else update).reshape(self._weight.shape)
        if self._keep is not None:
            update = update.masked_fill(~self._keep, 0)
        return self._weight + update

    def put_updated(self) -> None:
        """Has the module compute with the updated weights."""
        self._owner._parameters[self._leaf] = self.updated()  # type: ignore[assignment]  # no leaf: gradients pass it

    def put_back(self) -> None:
        """Has the module hold its own weights again."""
        self._owner._parameters[self._leaf] = self._weight

    @torch.no_grad()
    def merge(self) -> None:
        """Adds the updates to the weights and takes A and B off."""
        self._weight.copy_(self.updated())
        del self._owner._parameters[f"{self._leaf}{_A}"], self._owner._parameters[f"{self._leaf}{_B}"]


def attach(anatomy: Anatomy, masks: Masks, rank: int, scale: float, generator: torch.Generator) -> None:
    """Gives every parameter that holds experts an adapter, which is used while the block's part with it computes.

    Not while the block does: what is computed again in the backward pass (gradient checkpointing) is within it.
    """
    model, made, hooks = anatomy.model, list[ExpertAdapter](), list[Any]()
    for index, of_block in enumerate(anatomy.linears_by_block()):
        matrices = dict[str, list[tuple[str, FusedMatrix]]]()
        for name, matrix in of_block:
            if isinstance(matrix, FusedMatrix):
                matrices.setdefault(matrix.place.parameter, []).append((name, matrix))
        adapters = [ExpertAdapter(model, of_parameter, masks, scale) for of_parameter in matrices.values()]
        for adapter in adapters:
            adapter.register(rank, generator)
        for adapter in adapters:
            path = f"{anatomy.family.blocks}.{index}."
            part = model.get_submodule(f"{path}{adapter.name.removeprefix(path).partition('.')[0]}")
            hooks.append(part.register_forward_pre_hook(_before(adapter)))
            hooks.append(part.register_forward_hook(_after(adapter), always_call=True))
        made += adapters
    model.__dict__[_KEPT] = made, hooks


def updated(model: Any) -> dict[str, Tensor]:
    """The weights by name as `merge` would leave them."""
    made, _ = model.__dict__.get(_KEPT, ((), ()))
    return {adapter.name: adapter.updated().detach() for adapter in made}


def merge(model: Any) -> None:
    """Adds every update to its weights and takes the adapters off."""
    made, hooks = model.__dict__.pop(_KEPT, ((), ()))
    for hook in hooks:
        hook.remove()
    for adapter in made:
        adapter.merge()


def is_of_adapter(name: str) -> bool:
    """True for the name of a parameter of an adapter."""
    return name.endswith((_A, _B))


def _before(adapter: ExpertAdapter) -> Any:
    return lambda *_: adapter.put_updated()


def _after(adapter: ExpertAdapter) -> Any:
    return lambda *_: adapter.put_back()
