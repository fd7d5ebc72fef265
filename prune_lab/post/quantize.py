"""post=int8_dynamic, int8_weight_only, int4_weight_only, fp8: fewer bits in the Linears of the decoder blocks.

Embeddings, norms and the output layer keep their floats, as in the published exports of this kind.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from prune_lab.errors import Refused
from prune_lab.post.base import Post

if TYPE_CHECKING:
    from prune_lab.models.anatomy import Anatomy
    from prune_lab.system.device import Device


@dataclass(frozen=True)
class LowBitPost(Post):
    """An option whose export is in the layout of the compressed-tensors library."""

    is_low_bit: ClassVar[bool] = True

    def scheme(self) -> dict[str, Any]:
        """The fields of its Scheme (models/low_bit/scheme.py)."""
        raise NotImplementedError

    def check_model(self, anatomy: Anatomy, cuts: Collection[str]) -> None:
        """Raises Refused for matrices without codes, and for groups that do not divide inputs which no cut changes."""
        from prune_lab.models.low_bit.quantize_model import check_found, check_groups
        from prune_lab.models.low_bit.scheme import Scheme

        scheme = Scheme(**self.scheme())
        if not {"mlp", "heads", "query_heads", "hidden"} & {*cuts}:
            check_groups(list(anatomy.linears()), scheme.group_size)
        if anatomy.found is not None:
            check_found(anatomy, anatomy.found, scheme)

    def compress(self, anatomy: Anatomy) -> list[str]:
        """Replaces every prunable Linear; raises Refused where its inputs are no multiple of the group."""
        from prune_lab.models.low_bit.quantize_model import quantize
        from prune_lab.models.low_bit.scheme import Scheme

        return quantize(anatomy, Scheme(**self.scheme()))


@dataclass(frozen=True)
class Int8Dynamic(LowBitPost):
    """8-bit weights, and inputs rounded to 8 bits token by token as they come (LLM.int8's plain case, 2208.07339)."""

    def scheme(self) -> dict[str, Any]:
        """8-bit integers on both sides."""
        return {"bits": 8, "dynamic": True}


@dataclass(frozen=True)
class Int8WeightOnly(LowBitPost):
    """8-bit weights; inputs and products keep their type."""

    def scheme(self) -> dict[str, Any]:
        """8-bit integers."""
        return {"bits": 8}


@dataclass(frozen=True)
class Int4WeightOnly(LowBitPost):
    """4-bit weights, a step for each `group_size` inputs; inputs and products keep their type."""

    not_applicable: ClassVar[tuple[str, ...]] = ()

    def scheme(self) -> dict[str, Any]:
        """4-bit integers in groups."""
        return {"bits": 4, "group_size": self.group_size}


@dataclass(frozen=True)
class Fp8(LowBitPost):
    """8-bit floats (e4m3, 2209.05433) for weights and for inputs, token by token as they come; GPUs only."""

    def check(self, device: Device) -> None:
        """Raises Refused where the GPU multiplies no 8-bit floats."""
        if device.compute_capability < (8, 9):
            raise Refused(
                "post=fp8 needs a GPU that multiplies 8-bit floats (compute capability 8.9: Ada, Hopper and later); "
                f"here is {device.name}: post=int8_dynamic runs everywhere"
            )

    def scheme(self) -> dict[str, Any]:
        """8-bit floats on both sides."""
        return {"bits": 8, "type": "float", "dynamic": True}
