"""Base class of the post-compression options."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from prune_lab.models.anatomy import Anatomy
    from prune_lab.system.device import Device


@dataclass(frozen=True)
class Post:
    """A post-compression option: turns the pruned model into the one that is measured and exported.

    All options share `group_size` (inputs that share a step of a 4-bit weight), so that sweeps over them compose;
    `not_applicable` names it where it is not used.

    `is_low_bit`: it quantizes the weights, which not every export can hold.
    `own_kernels`: its model computes with kernels that no file holds, so that what is read back from an export adds in
    another order.
    """

    group_size: int = 32

    not_applicable: ClassVar[tuple[str, ...]] = ("group_size",)
    is_low_bit: ClassVar[bool] = False
    own_kernels: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.group_size < 8 or self.group_size % 8:
            raise ValueError(f"group_size={self.group_size} must be a multiple of 8: 16, 32, 64, 128 are usual")

    def check(self, device: Device) -> None:
        """Raises Refused where the device has no backend for it, before anything is loaded."""

    def check_model(self, anatomy: Anatomy, cuts: Collection[str]) -> None:
        """Raises Refused for a model that it is not for, before anything is pruned.

        cuts: kinds of units that will be removed from it.
        """

    def compress(self, anatomy: Anatomy) -> list[str]:
        """Changes the model in place and returns warnings; raises Refused where a layer does not fit."""
        raise NotImplementedError
