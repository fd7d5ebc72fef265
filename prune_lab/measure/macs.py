"""Multiply-accumulates of a forward pass, counted from shapes: what a change of the model could save at best."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prune_lab.models.anatomy import Anatomy, out_in
from prune_lab.models.low_bits import LowBitLinear


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates per token. `effective` leaves out those of Linears whose weight is zero."""

    total: int
    effective: int


def count_macs(anatomy: Anatomy, context: int) -> Macs:
    """Multiply-accumulates of one token among `context` tokens: Linears of the blocks, attention, and the head.

    By the dense formula: a Linear costs inputs x outputs; attention costs each query head head_dim for every token of
    the context in QK^T and again in AV, without a discount for the causal mask or a sliding window. Embeddings, norms,
    activations, softmax and biases are left out. Attention is effective in full.
    """
    matrices = [
        matrix for block in anatomy.blocks for module in block.modules() if (matrix := _matrix(module)) is not None
    ]
    head = anatomy.model.get_output_embeddings().weight
    # The inputs of a block's output projection are its query heads one after the other, however many are left.
    projections = [_matrix(block.get_submodule(anatomy.family.attention[-1].linear)) for block in anatomy.blocks]
    attention = 2 * context * sum(matrix.shape[1] for matrix in projections if matrix is not None)
    return Macs(
        total=sum(matrix.numel() for matrix in (*matrices, head)) + attention,
        effective=sum(int(torch.count_nonzero(matrix)) for matrix in (*matrices, head)) + attention,
    )


def _matrix(module: nn.Module) -> Tensor | None:
    """What a module multiplies by, shape (out, in), if it is a Linear of any kind."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, LowBitLinear):
        return module.codes()
    return out_in(module, module.weight) if isinstance(module, nn.Linear | Conv1D) else None
