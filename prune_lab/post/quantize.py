"""post=int8_dynamic, int8_weight_only, int4_weight_only, fp8: fewer bits in the Linears of the decoder blocks.

Embeddings, norms and the output layer keep their floats, as in the published exports of this kind.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from prune_lab.errors import Refused
from prune_lab.models.anatomy import Anatomy, out_in
from prune_lab.models.low_bit_format import Scheme, linear_names, replace_linear
from prune_lab.models.low_bits import LowBitLinear
from prune_lab.post.base import Post
from prune_lab.system.device import Device

EXPANDED = "the weights are expanded before each product: smaller, and slower"
OWN_EXPORT = "only prune_lab can load the export: other software knows low-bit layouts of Linears, and these are {}s"


@dataclass(frozen=True)
class LowBitPost(Post):
    """An option whose export is in the layout of the compressed-tensors library."""

    reading: ClassVar[str] = (
        "prune_lab, or stock transformers with the package compressed-tensors: `from_pretrained(folder, "
        "quantization_config=CompressedTensorsConfig(run_compressed=False))`, unless a note here says otherwise"
    )


@dataclass(frozen=True)
class Int8Dynamic(LowBitPost):
    """8-bit weights, and inputs rounded to 8 bits token by token as they come (LLM.int8's plain case, 2208.07339)."""

    def compress(self, anatomy: Anatomy) -> list[str]:
        """Replaces every prunable Linear."""
        return quantize(anatomy, Scheme(bits=8, dynamic=True))


@dataclass(frozen=True)
class Int8WeightOnly(LowBitPost):
    """8-bit weights; inputs and products keep their type."""

    def compress(self, anatomy: Anatomy) -> list[str]:
        """Replaces every prunable Linear."""
        notes = quantize(anatomy, Scheme(bits=8))
        weight = next(anatomy.model.parameters())
        if weight.device.type == "cpu" and weight.dtype == torch.bfloat16:
            return [f"int8_weight_only: a kernel for few rows (decoding); for many, {EXPANDED}", *notes]
        return [f"int8_weight_only: {EXPANDED}", *notes]


@dataclass(frozen=True)
class Int4WeightOnly(LowBitPost):
    """4-bit weights, a step for each `group_size` inputs; inputs and products keep their type."""

    not_applicable: ClassVar[tuple[str, ...]] = ()

    def compress(self, anatomy: Anatomy) -> list[str]:
        """Replaces every prunable Linear; raises Refused where its inputs are no multiple of the group."""
        for name, linear in anatomy.linears():
            inputs = out_in(linear, linear.weight).shape[1]
            if inputs % self.group_size:
                raise Refused(
                    f"post.group_size={self.group_size} does not divide the {inputs} inputs of {name}: give a group "
                    f"that does, or cut to multiples of it with method.round_to={self.group_size}"
                )
        notes = quantize(anatomy, Scheme(bits=4, group_size=self.group_size))
        return [f"int4_weight_only: {EXPANDED}", *notes]


@dataclass(frozen=True)
class Fp8(LowBitPost):
    """8-bit floats (e4m3, 2209.05433) for weights and for inputs, token by token as they come; GPUs only."""

    def check(self, device: Device) -> None:
        """Raises Refused where the GPU multiplies no 8-bit floats."""
        if not device.is_cuda or torch.cuda.get_device_capability(device.torch_device) < (8, 9):
            raise Refused(
                "post=fp8 needs a GPU that multiplies 8-bit floats (compute capability 8.9: Ada, Hopper and later); "
                f"here is {device.name}: post=int8_dynamic runs everywhere"
            )

    def compress(self, anatomy: Anatomy) -> list[str]:
        """Replaces every prunable Linear."""
        return quantize(anatomy, Scheme(bits=8, type="float", dynamic=True))


@torch.no_grad()
def quantize(anatomy: Anatomy, scheme: Scheme) -> list[str]:
    """Replaces every prunable Linear by one of the scheme, and returns notes about its export.

    Raises RuntimeError if a zero did not stay a zero.
    """
    model: Any = anatomy.model
    linears, without_product = list(anatomy.linears()), 0
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
    return notes
