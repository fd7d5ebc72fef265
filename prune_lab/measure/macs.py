"""Multiply-accumulates of a forward pass, counted from shapes: what a change of the model could save at best."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prune_lab.measure.size import low_bit_experts
from prune_lab.models.anatomy import Anatomy, out_in
from prune_lab.models.found import Layout
from prune_lab.models.low_bit.linears import LowBitLinear


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

    Of a model whose layout was found: its matrices, routed experts by the share of tokens that each saw, and the head;
    what attention or a recurrence multiplies without a matrix is not in it.
    """
    if anatomy.found is not None:
        return _of_found(anatomy, anatomy.found)
    head = anatomy.model.get_output_embeddings().weight
    total, effective, heads = head.numel(), int(torch.count_nonzero(head)), 0
    for index, block in enumerate(anatomy.blocks):
        with anatomy.at_hand(index):
            matrices = {id(module): matrix for module in block.modules() if (matrix := _matrix(module)) is not None}
            total += sum(matrix.numel() for matrix in matrices.values())
            effective += sum(int(torch.count_nonzero(matrix)) for matrix in matrices.values())
            # The inputs of the output projection are the query heads one after the other, however many are left.
            heads += matrices[id(block.get_submodule(anatomy.family.attention_output))].shape[1]
    attention = 2 * context * heads
    return Macs(total + attention, effective + attention)


def _of_found(anatomy: Anatomy, layout: Layout) -> Macs:
    head = anatomy.model.get_output_embeddings()
    counts: list[tuple[float, float]] = (
        [] if head is None else [(head.weight.numel(), int(torch.count_nonzero(head.weight)))]
    )
    for index, of_block in enumerate(layout.matrices):
        with anatomy.at_hand(index):
            for matrix, (_, linear) in zip(of_block, layout.modules(anatomy.model, index), strict=True):
                if isinstance(linear, LowBitLinear):
                    continue
                weight: Any = _matrix(linear) if matrix.is_linear else linear.weight
                counts.append((matrix.active * weight.numel(), matrix.active * int(torch.count_nonzero(weight))))
    for index in range(len(anatomy.blocks)):  # those that are quantized are no matrices to be pruned
        low_bit = [module for module in anatomy.blocks[index].modules() if isinstance(module, LowBitLinear)]
        counts += [(linear.codes().numel(), int(torch.count_nonzero(linear.codes()))) for linear in low_bit]
    for of_experts, active in low_bit_experts(anatomy):
        codes = of_experts.codes()
        counts.append((active * codes.numel(), active * int(torch.count_nonzero(codes))))
    return Macs(round(sum(total for total, _ in counts)), round(sum(effective for _, effective in counts)))


def _matrix(module: nn.Module) -> Tensor | None:
    """Matrix of a module that is a Linear of any kind, shape (out, in)."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, LowBitLinear):
        return module.codes()
    return out_in(module, module.weight) if isinstance(module, nn.Linear | Conv1D) else None
