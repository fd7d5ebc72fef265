"""The Linears of the decoder blocks of a model in memory, replaced by Linears of fewer bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from prune_lab.errors import Refused
from prune_lab.models.anatomy import Anatomy, out_in
from prune_lab.models.low_bit.compressed_tensors import Scheme, linear_names, replace_linear
from prune_lab.models.low_bit.linears import Int8Linear, LowBitLinear

EXPANDED = "the weights are expanded to the inputs' type before each product, which takes time of its own"
OWN_EXPORT = "only prune_lab can load the export: other software knows low-bit layouts of Linears, and these are {}s"


@torch.no_grad()
def quantize(anatomy: Anatomy, scheme: Scheme) -> list[str]:
    """Replaces every prunable Linear by one of the scheme, and returns notes on its speed and its export.

    Raises Refused where a group does not divide a Linear's inputs, RuntimeError if a zero did not stay a zero.
    """
    model: Any = anatomy.model
    linears, without_product = list(anatomy.linears()), 0
    _check_groups(linears, scheme.group_size)
    for name, linear in linears:
        weight = out_in(linear, linear.weight)
        new = replace_linear(model, name, scheme, weight.dtype)
        new.store(weight)
        if new.bias is not None:
            new.bias.copy_(linear.bias)
        if bool(new.codes()[weight == 0].any()):
            raise RuntimeError(f"{name}: weights that were zero are not zero after quantization")
        without_product += not new.has_product
    untouched = [n for n in linear_names(model) if not isinstance(model.get_submodule(n), LowBitLinear)]
    model.config.quantization_config = scheme.to_config(untouched)
    strange = next((linear for _, linear in linears if not isinstance(linear, nn.Linear)), None)
    notes = [] if strange is None else [OWN_EXPORT.format(type(strange).__name__)]
    if scheme.dynamic and without_product:
        notes.append(
            f"{without_product} of {len(linears)} layers have widths that the device has no product for: {EXPANDED}"
        )
    return notes if scheme.dynamic else [_speed(model, scheme), *notes]


def _check_groups(linears: list[tuple[str, Any]], group_size: int | None) -> None:
    for name, linear in linears:
        inputs = out_in(linear, linear.weight).shape[1]
        if group_size is not None and inputs % group_size:
            raise Refused(
                f"post.group_size={group_size} does not divide the {inputs} inputs of {name}: give a group "
                f"that does, or cut to multiples of it with method.round_to={group_size}"
            )


def _speed(model: Any, scheme: Scheme) -> str:
    """What becomes of products whose inputs keep their type."""
    option = f"int{scheme.bits}_weight_only"
    linears = [module for module in model.modules() if isinstance(module, LowBitLinear)]
    with_kernel = sum(isinstance(linear, Int8Linear) and linear.has_weight_kernel for linear in linears)
    if not with_kernel:
        return f"{option}: {EXPANDED}"
    of_which = "" if with_kernel == len(linears) else f" in {with_kernel} of {len(linears)} layers"
    return f"{option}: a kernel for few rows (decoding){of_which}; elsewhere {EXPANDED}"
