"""post=sparse_2_4: the kernels for two of every four weights, of GPUs from Ampere on.

In memory such a weight is its values and two bits of place for each (torch.sparse.to_sparse_semi_structured). On disk
it is dense: stock transformers loads the export, without the kernels. (Serving stacks dropped sparse weight formats.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as apply_linear

from prune_lab.errors import Refused
from prune_lab.models.anatomy import Anatomy
from prune_lab.post.base import Post
from prune_lab.system.device import Device


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


@dataclass(frozen=True)
class Sparse24(Post):
    """Semi-structured weights (2104.08378) in every prunable Linear."""

    exact: ClassVar[bool] = False  # the export is dense: other kernels add in another order

    def check(self, device: Device) -> None:
        """Raises Refused where the GPU has no 2:4 kernels, or none for the number type."""
        if not device.is_cuda or torch.cuda.get_device_capability(device.torch_device) < (8, 0):
            raise Refused(
                f"post=sparse_2_4 needs a GPU with 2:4 kernels (compute capability 8.0: Ampere and later); here is "
                f"{device.name}: zeros in dense tensors cost what other weights cost there"
            )
        if device.dtype == torch.float32:
            raise Refused("post=sparse_2_4 has no kernels for dtype=float32: give dtype=bfloat16 or float16")

    def compress(self, anatomy: Anatomy) -> list[str]:
        """Replaces every prunable Linear; raises Refused where one does not keep 2 of every 4 inputs."""
        for name, linear in list(anatomy.linears()):
            check_pattern(name, linear)
            parent, _, leaf = name.rpartition(".")
            setattr(anatomy.model.get_submodule(parent), leaf, SparseLinear(linear))
        return []


def check_pattern(name: str, linear: Any) -> None:
    """Raises Refused unless a Linear's weight, shape (out, in), has two zeros in every four inputs."""
    if not isinstance(linear, nn.Linear):
        raise Refused(f"post=sparse_2_4: {name} is a {type(linear).__name__}, which the 2:4 kernels do not take")
    if linear.weight.shape[1] % 4 or bool((linear.weight.unflatten(1, (-1, 4)) != 0).sum(dim=2).gt(2).any()):
        raise Refused(f"post=sparse_2_4: {name} keeps more than 2 of 4 inputs: prune with method.pattern=2:4")
