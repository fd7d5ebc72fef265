"""Linears that compute with two of every four weights, in the kernels that GPUs from Ampere on have for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as apply_linear

from prune_lab.errors import Refused
from prune_lab.models.anatomy import Anatomy


class SparseLinear(nn.Module):
    """A Linear, shape (out, in), that computes with a semi-structured weight."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = torch.sparse.to_sparse_semi_structured(linear.weight.detach())
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = linear.bias

    def forward(self, inputs: Tensor) -> Tensor:
        """x W^T + b, shape (..., out)."""
        return apply_linear(inputs, self.weight, self.bias)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight.to_dense()
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias


def replace_linears(anatomy: Anatomy) -> None:
    """Puts a SparseLinear in the place of every prunable Linear; raises Refused where one is not 2:4."""
    for name, linear in list(anatomy.linears()):
        check_pattern(name, linear)
        parent, _, leaf = name.rpartition(".")
        setattr(anatomy.model.get_submodule(parent), leaf, SparseLinear(linear))


def check_pattern(name: str, linear: Any) -> None:
    """Raises Refused unless a Linear's weight, shape (out, in), has two zeros in every four inputs."""
    if not isinstance(linear, nn.Linear):
        raise Refused(f"post=sparse_2_4: {name} is a {type(linear).__name__}, which the 2:4 kernels do not take")
    if linear.weight.shape[1] % 4 or bool((linear.weight.unflatten(1, (-1, 4)) != 0).sum(dim=2).gt(2).any()):
        raise Refused(f"post=sparse_2_4: {name} keeps more than 2 of 4 inputs: prune with method.pattern=2:4")
