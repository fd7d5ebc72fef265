"""Parameters that took others' places because something was cut out of them, and the part of a tensor that stays."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Selection:
    """The part of a tensor that stays along a dimension.

    index: (kept,), or (parts, kept) with one for each part of the first dimension.
    """

    dim: int
    index: Tensor

    def of(self, tensor: Tensor) -> Tensor:
        """The part of a tensor, contiguous."""
        index = self.index.to(tensor.device)
        if index.dim() == 1:
            return tensor.index_select(self.dim, index)
        parts = [part.index_select(self.dim - 1, of) for part, of in zip(tensor, index, strict=True)]
        return torch.stack(parts)


@dataclass(frozen=True)
class Cut:
    """A parameter that took another's place: what `old` has where the selections say, one after the other."""

    old: nn.Parameter
    new: nn.Parameter
    selections: tuple[Selection, ...]

    def of(self, tensor: Tensor) -> Tensor:
        """The part that stays of a tensor of the old one's shape, such as a moment of an optimizer."""
        return selected(tensor, self.selections)


def cut(old: nn.Parameter, *selections: Selection) -> Cut:
    """The cut of a parameter, with the new one."""
    return Cut(old, nn.Parameter(selected(old.detach(), selections), requires_grad=old.requires_grad), selections)


def selected(tensor: Tensor, selections: tuple[Selection, ...]) -> Tensor:
    """The part of a tensor that stays, contiguous."""
    for selection in selections:
        tensor = selection.of(tensor)
    return tensor.contiguous()
