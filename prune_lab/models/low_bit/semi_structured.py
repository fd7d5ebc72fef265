"""Linears that compute with two of every four weights, in the kernels that GPUs from Ampere on have for it."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as apply_linear
from torch.nn.functional import pad

from prune_lab.errors import Refused
from prune_lab.models.anatomy import Anatomy

_ROWS = 8  # the kernels take multiples of them


class SparseLinear(nn.Module):
    """A Linear, shape (out, in), that computes with a semi-structured weight.

    search: whether cuSPARSELt's fastest kernel for each shape of inputs is looked for when it is first met; outputs
    then lie as those of a dense Linear do. PyTorch's own call takes the first kernel, and leaves them transposed.
    """

    # The number of the kernel by shape of weight and inputs, number type and whether there is a bias.
    _fastest: ClassVar[dict[tuple[Any, ...], int]] = {}

    def __init__(self, linear: nn.Linear, search: bool) -> None:
        super().__init__()
        with warnings.catch_warnings():  # that its interface may change
            warnings.filterwarnings("ignore", ".*SparseSemiStructuredTensor is in prototype", UserWarning)
            weight = torch.sparse.to_sparse_semi_structured(linear.weight.detach())
        self.weight: Any = nn.Parameter(weight, requires_grad=False)
        self.bias: Any = linear.bias
        self._searches = search and isinstance(weight, torch.sparse.SparseSemiStructuredTensorCUSPARSELT)

    def forward(self, inputs: Tensor) -> Tensor:
        """x W^T + b, shape (..., out)."""
        if not self._searches:
            return apply_linear(inputs, self.weight, self.bias)
        rows = inputs.reshape(-1, inputs.shape[-1])
        columns = pad(rows, (0, 0, 0, -len(rows) % _ROWS)).t()
        kernel = 0 if torch.compiler.is_compiling() else self._kernel_for(columns)
        out = torch._cslt_sparse_mm(self.weight.packed, columns, self.bias, transpose_result=True, alg_id=kernel)
        return out[: len(rows)].view(*inputs.shape[:-1], -1)

    def _kernel_for(self, columns: Tensor) -> int:
        key = tuple(self.weight.shape), tuple(columns.shape), columns.dtype, self.bias is None
        if key not in self._fastest:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*_cslt_sparse_mm_search is deprecated", UserWarning)
                found = torch._cslt_sparse_mm_search(self.weight.packed, columns, self.bias, transpose_result=True)
            self._fastest[key] = found
        return self._fastest[key]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight.to_dense()
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias


def replace_linears(anatomy: Anatomy, search: bool) -> None:
    """Puts a SparseLinear in the place of every prunable Linear; raises Refused where one is not 2:4."""
    for name, linear in list(anatomy.linears()):
        check_pattern(name, linear)
        parent, _, leaf = name.rpartition(".")
        setattr(anatomy.model.get_submodule(parent), leaf, SparseLinear(linear, search))


def check_pattern(name: str, linear: Any) -> None:
    """Raises Refused unless a Linear's weight, shape (out, in), has two zeros in every four inputs."""
    if not isinstance(linear, nn.Linear):
        raise Refused(f"post=sparse_2_4: {name} is a {type(linear).__name__}, which the 2:4 kernels do not take")
    if linear.weight.shape[1] % 4 or bool((linear.weight.unflatten(1, (-1, 4)) != 0).sum(dim=2).gt(2).any()):
        raise Refused(f"post=sparse_2_4: {name} keeps more than 2 of 4 inputs: prune with method.pattern=2:4")
