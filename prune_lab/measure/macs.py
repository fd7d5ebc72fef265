"""Multiply-accumulates of a forward pass, counted from shapes: what a change of the model could save at best."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from prune_lab.models.anatomy import Anatomy, out_in


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates per token. `effective` leaves out those of Linears whose weight is zero."""

    total: int
    effective: int


def count_macs(anatomy: Anatomy, context: int) -> Macs:
    """Multiply-accumulates of one token among `context` tokens: Linears of the blocks, attention, and the head.

    By the dense formula: a Linear costs inputs x outputs; attention costs each query head head_dim for every token of
    the context in QK^T and again in AV, without a discount for the causal mask or a sliding window. Embeddings, norms,
    activations, softmax and biases are left out. Attention is effective in full. Linears must hold their weights as
    matrices: count before post-compression packs them.
    """
    head = anatomy.model.get_output_embeddings()
    linears = [out_in(module, module.weight) for module in (*(m for _, m in anatomy.linears()), head)]
    # The inputs of a block's output projection are its query heads one after the other, however many are left.
    queries = sum(units[-1].weight.shape[1] for units in anatomy.unit_linears("heads"))
    attention = 2 * context * queries
    return Macs(
        total=sum(weight.numel() for weight in linears) + attention,
        effective=sum(int(torch.count_nonzero(weight)) for weight in linears) + attention,
    )
