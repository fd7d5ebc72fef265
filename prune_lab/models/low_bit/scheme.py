"""Scheme of quantization: bits, number type, groups and inputs, as config.json's quantization_config says them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from prune_lab.models.low_bit.linears import Fp8Linear, Int4Linear, Int8Linear, LowBitLinear


@dataclass(frozen=True)
class Scheme:
    """Weights of `bits`, of `type` int or float; 8 bits: `dynamic` inputs or not; 4 bits: inputs that share a step."""

    bits: int
    type: str = "int"
    dynamic: bool = False
    group_size: int | None = None

    def __post_init__(self) -> None:
        kind = (self.bits, self.type, self.dynamic, self.group_size is not None)
        known = ((8, "int", True, False), (8, "int", False, False), (8, "float", True, False), (4, "int", False, True))
        if kind not in known:
            raise ValueError(f"no Linear computes {self}")

    def empty(self, in_features: int, out_features: int, has_bias: bool, dtype: torch.dtype) -> LowBitLinear:
        """A Linear of this scheme, its weights still to be stored or loaded."""
        if self.type == "float":
            return Fp8Linear(in_features, out_features, has_bias, dtype)
        if self.group_size is None:
            return Int8Linear(in_features, out_features, has_bias, dtype, self.dynamic)
        return Int4Linear(in_features, out_features, has_bias, dtype, self.group_size)

    def to_config(self, untouched: list[str]) -> dict[str, Any]:
        """The quantization_config for config.json; `untouched` are the Linears that keep their floats."""
        weights = {"num_bits": self.bits, "type": self.type, "symmetric": True, "dynamic": False}
        weights |= {"strategy": "group", "group_size": self.group_size} if self.group_size else {"strategy": "channel"}
        inputs = {"num_bits": 8, "type": self.type, "symmetric": True, "dynamic": True, "strategy": "token"}
        layout = "pack-quantized" if self.group_size else f"{self.type}-quantized"
        # Without a format in the group the library guesses it anew, and takes 8-bit weights alone for packed ones.
        group: dict[str, Any] = {"targets": ["Linear"], "weights": weights, "format": layout}
        group["input_activations"] = inputs if self.dynamic else None
        return {
            "quant_method": "compressed-tensors",
            "format": layout,
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": untouched,
        }
