"""Experts of a mixture with weights of 8 or 4 bits, stored as a Linear for each expert, as compressed-tensors has it.

transformers keeps a matrix of all experts as one parameter (experts, out, in), which its files hold expert by expert.
In its place is a module that expands an expert's matrix when the model's own code asks for it by its number.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prune_lab.errors import Refused
from prune_lab.models.low_bit.linears import LowBitLinear, LowBitWeights
from prune_lab.models.products import set_experts

if TYPE_CHECKING:
    from prune_lab.models.low_bit.scheme import Scheme


class LowBitExperts(LowBitWeights):
    """One matrix of every expert, (experts, out, in), as codes times steps; [i] is that of expert i, expanded.

    Buffers: those of a Linear of the scheme, each with the experts as its first dimension. parts: matrices of a file
    that lie one below the other in it (gate and up).
    """

    def __init__(self, scheme: Scheme, shape: tuple[int, int, int], parts: int, dtype: torch.dtype) -> None:
        super().__init__()
        experts, out_features, in_features = shape
        one = scheme.empty(in_features, out_features, False, dtype)
        self.experts, self.bits, self._template = experts, one.bits, (one,)  # in a tuple: no part of the model
        for name, buffer in one.named_buffers():
            if name == "weight_shape":
                buffer = torch.tensor([out_features // parts, in_features] * parts)
            self.register_buffer(name, buffer.expand(experts, *buffer.shape).clone())

    def _of(self, expert: int | Tensor) -> LowBitLinear:
        """The Linear of an expert, until the next is asked for."""
        (one,) = self._template
        for name in [name for name, _ in one.named_buffers()]:
            setattr(one, name, getattr(self, name)[expert])
        return one

    @torch.no_grad()
    def store(self, weight: Tensor) -> None:
        """Rounds float weights, (experts, out, in), to the nearest codes."""
        for expert, of_expert in enumerate(weight):
            self._of(expert).store(of_expert)  # into views of the buffers

    def codes(self) -> Tensor:
        """The weights before their steps, (experts, out, in)."""
        return torch.stack([self._of(expert).codes() for expert in range(self.experts)])

    def __getitem__(self, expert: int | Tensor) -> Tensor:
        """The matrix of an expert in the type of the steps, (out, in)."""
        return self._of(expert).expand()

    def __len__(self) -> int:
        return self.experts


def parts_of(model: Any, name: str, scheme: Scheme, conversions: list[Any]) -> int:
    """Number of matrices of a file that lie one below the other in each expert's part of a parameter of a mixture.

    conversions: of `conversions_of`. Raises Refused where files do not hold it as a matrix for each expert, or where
    the scheme rounds inputs.
    """
    if scheme.dynamic:
        raise Refused(
            f"the inputs of experts ({name}) cannot be rounded: give post=int8_weight_only or post=int4_weight_only"
        )
    conversion = next((c for c in conversions if _is_of(c, name)), None)
    if conversion is None or model.get_parameter(name).dim() != 3:
        raise Refused(
            f"files of {model.config.model_type} models hold {name} neither as the weight of a Linear nor as a matrix "
            "for each expert, and the layout of compressed-tensors has places for those alone: give post=none"
        )
    return len(conversion._original_source_patterns)


def empty_experts(model: Any, name: str, scheme: Scheme, dtype: torch.dtype, conversions: list[Any]) -> LowBitExperts:
    """Codes for a parameter of a module of experts, still to be stored or loaded; raises Refused as `parts_of`."""
    parts, parameter = parts_of(model, name, scheme, conversions), model.get_parameter(name)
    experts, out_features, in_features = parameter.shape
    return LowBitExperts(scheme, (experts, out_features, in_features), parts, dtype).to(parameter.device)


def put_experts(model: Any, name: str, new: LowBitExperts) -> None:
    """Puts codes in the place of the parameter `name` of a module of experts, which then takes one after the other."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    delattr(module, leaf)
    setattr(module, leaf, new)
    set_experts(model, "eager")


def put_all_experts(model: Any, scheme: Scheme, dtype: torch.dtype) -> None:
    """Puts empty codes in the place of every matrix of experts of a model that is to be loaded."""
    conversions = conversions_of(model)
    for name, parameter in list(model.named_parameters()):
        if parameter.dim() == 3 and any(_is_of(c, name) for c in conversions):
            put_experts(model, name, empty_experts(model, name, scheme, dtype, conversions))


def conversions_with_codes(model: Any, conversions: list[Any]) -> list[Any]:
    """transformers' conversions between a model and its files, with those of experts for each buffer of their codes."""
    held = {name: module for name, module in model.named_modules() if isinstance(module, LowBitExperts)}
    found = list[Any]()
    for conversion in conversions:
        module = next((module for name, module in held.items() if _is_of(conversion, name)), None)
        if module is None:
            found.append(conversion)
            continue
        for buffer, _ in module.named_buffers():
            sources = [source.removesuffix("weight") + buffer for source in conversion._original_source_patterns]
            targets = [f"{target}.{buffer}" for target in conversion._original_target_patterns]
            found.append(conversion.copy(sources, targets, operations=list(conversion.operations)))
    return found


def keep_conversions(model: Any) -> None:
    """Has save_pretrained write the codes of experts under the names of each expert's matrices."""
    model._weight_conversions = conversions_with_codes(model, conversions_of(model))


def is_read_by_stock(model: Any, scheme: Scheme) -> bool:
    """True where transformers reads a model with experts of a scheme, as it has been seen to.

    Not 8-bit integers, nor types whose conversions have escaped patterns (Kimi Linear, with transformers 5.24).
    """
    sources = [s for c in conversions_of(model) for s in c._original_source_patterns if ".experts." in s]
    return scheme.bits == 4 and not any("\\" in source for source in sources)


def conversions_of(model: Any) -> list[Any]:
    """transformers' conversions between a model and its files."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    kept = getattr(model, "_weight_conversions", None)
    return kept if kept is not None else get_model_conversion_mapping(model, add_legacy=False)


def _is_of(conversion: Any, name: str) -> bool:
    """True for a conversion that stacks the matrices of experts, and lays parts below each other, to this parameter."""
    from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

    if not isinstance(conversion, WeightConverter):
        return False
    stacks = [op for op in conversion.operations if isinstance(op, MergeModulelist) and op.dim == 0]
    below = [op for op in conversion.operations if isinstance(op, Concatenate) and op.dim == 1]
    return (
        len(stacks) == 1
        and len(stacks) + len(below) == len(conversion.operations)
        and all(source.endswith(".weight") for source in conversion._original_source_patterns)
        and any(re.search(f"{target}$", name) for target in conversion._original_target_patterns)  # regular expressions
    )
