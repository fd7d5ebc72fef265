"""The Linears of the decoder blocks of a model in memory, replaced by Linears of fewer bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from prune_lab.errors import Refused
from prune_lab.models.anatomy import Anatomy, out_in
from prune_lab.models.found import Layout, evaluating, forget_layout, is_same, probe_tokens, uncalled_linears
from prune_lab.models.low_bit.compressed_tensors import linear_names, replace_linear
from prune_lab.models.low_bit.experts import (
    LowBitExperts,
    conversions_of,
    empty_experts,
    is_read_by_stock,
    keep_conversions,
    parts_of,
    put_experts,
)  # fmt: skip
from prune_lab.models.low_bit.linears import Int8Linear, LowBitLinear
from prune_lab.models.low_bit.scheme import Scheme
from prune_lab.models.products import FusedMatrix, eager_experts

EXPANDED = "the weights are expanded to the inputs' type before each product, which takes time of its own"
OWN_EXPORT = "only prune_lab can load the export: other software knows low-bit layouts of Linears, and these are {}s"

OWN_EXPERTS = (
    "only prune_lab can load the export: of experts transformers 5 reads 4 bits and 8-bit floats, not 8-bit integers, "
    "and of a few types (Kimi Linear) neither"
)


def check_found(anatomy: Anatomy, layout: Layout, scheme: Scheme) -> None:
    """Raises Refused for a layout that was found and whose matrices a scheme has no place for.

    These are experts that files do not hold as Linears, or whose inputs would be rounded, and Linears whose weights the
    model uses without calling them, as recurrent cores do.
    """
    model, conversions = anatomy.model, conversions_of(anatomy.model)
    for name in _parameters_of_experts(anatomy):
        parts_of(model, name, scheme, conversions)
    if missed := uncalled_linears(model, layout):
        raise Refused(
            f"{model.config.model_type} models use the weights of {missed[0]} without calling it, which fewer bits do "
            "not allow: give post=none"
        )


def _parameters_of_experts(anatomy: Anatomy) -> list[str]:
    matrices = anatomy.found.matrices if anatomy.found is not None else ()
    return list(dict.fromkeys(m.place.parameter for of_block in matrices for m in of_block if not m.is_linear))


@torch.no_grad()
def quantize(anatomy: Anatomy, scheme: Scheme) -> list[str]:
    """Replaces every prunable Linear and expert by one of the scheme, and returns notes on its speed and its export.

    Raises Refused where a group does not divide a matrix's inputs, or where experts are stored as no Linears are;
    RuntimeError if a zero did not stay a zero.
    """
    model: Any = anatomy.model
    matrices, without_product, notes = list(anatomy.linears()), 0, list[str]()
    check_groups(matrices, scheme.group_size)
    _quantize_experts(model, _parameters_of_experts(anatomy), scheme)
    linears = [(name, linear) for name, linear in matrices if not isinstance(linear, FusedMatrix)]
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
    if any(isinstance(m, LowBitExperts) for m in model.modules()) and not is_read_by_stock(model, scheme):
        notes.append(OWN_EXPERTS)
    strange = next((linear for _, linear in linears if not isinstance(linear, nn.Linear)), None)
    notes += [] if strange is None else [OWN_EXPORT.format(type(strange).__name__)]
    if scheme.dynamic and without_product:
        notes.append(
            f"{without_product} of {len(linears)} layers have widths for which the device has no product: {EXPANDED}"
        )
    return notes if scheme.dynamic else [_speed(model, scheme), *notes]


def _quantize_experts(model: Any, names: list[str], scheme: Scheme) -> None:
    """Replaces parameters of experts; raises Refused where their modules do more with them than take one by one."""
    if not names:
        return
    tokens, conversions = probe_tokens(model)[:1], conversions_of(model)

    def stored(name: str) -> LowBitExperts:
        weight = model.get_parameter(name)
        new = empty_experts(model, name, scheme, weight.dtype, conversions)
        new.store(weight)
        if bool(new.codes()[weight == 0].any()):
            raise RuntimeError(f"{name}: weights that were zero are not zero after quantization")
        return new

    # Those of one module are compared with what its rounded weights give; all are of one class of transformers.
    owner = names[0].rpartition(".")[0]
    first = {name: stored(name) for name in names if name.rpartition(".")[0] == owner}
    for name, new in first.items():
        model.get_parameter(name).copy_(torch.stack([new[expert] for expert in range(len(new))]))
    with evaluating(model), eager_experts(model):
        wanted = model(input_ids=tokens, use_cache=False).logits
    for name, new in first.items():
        put_experts(model, name, new)
    forget_layout(model)
    keep_conversions(model)
    try:
        with evaluating(model):
            alike = is_same(model(input_ids=tokens, use_cache=False).logits, wanted)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # of any modelling code of transformers
        alike = False
    if not alike:
        raise Refused(
            f"experts of {model.config.model_type} models are not multiplied one after the other, as weights of fewer "
            "bits need it: give post=none"
        )
    for name in names:
        if name not in first:
            put_experts(model, name, stored(name))


def check_groups(linears: list[tuple[str, Any]], group_size: int | None) -> None:
    """Raises Refused where a group does not divide the inputs of a matrix."""
    widths = {out_in(linear, linear.weight).shape[1] for _, linear in linears}
    for name, linear in linears:
        inputs = out_in(linear, linear.weight).shape[1]
        if group_size is not None and inputs % group_size:
            fitting = [size for size in (256, 128, 64, 32, 16, 8) if not any(width % size for width in widths)]
            instead = f"give {' or '.join(map(str, fitting))}" if fitting else "give another post"
            raise Refused(
                f"post.group_size={group_size} does not divide the {inputs} inputs of {name}: {instead}, or, where a "
                f"structured method removes channels, method.round_to={group_size}"
            )


def _speed(model: Any, scheme: Scheme) -> str:
    """Warning about products whose inputs keep their type."""
    option = f"int{scheme.bits}_weight_only"
    linears = [module for module in model.modules() if isinstance(module, LowBitLinear)]
    with_kernel = sum(isinstance(linear, Int8Linear) and linear.has_weight_kernel for linear in linears)
    if not with_kernel:
        return f"{option}: {EXPANDED}"
    of_which = "" if with_kernel == len(linears) else f" in {with_kernel} of {len(linears)} layers"
    return f"{option}: a kernel for few rows (decoding){of_which}; elsewhere {EXPANDED}"
