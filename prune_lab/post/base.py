"""What every post-compression option has in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from prune_lab.device import Device
from prune_lab.models.anatomy import Anatomy


@dataclass(frozen=True)
class Post:
    """A post-compression option: turns the pruned model into the one that is measured and exported.

    `exact`: whether its export, reloaded, computes the same logits; otherwise they are compared as other kernels are.
    `storage`: how its weights are written, `dense` (tensors as they are) or `bitmask`.
    """

    exact: ClassVar[bool] = True
    storage: ClassVar[str] = "dense"

    def check(self, device: Device) -> None:
        """Raises Refused where the device has no backend for it, before anything is loaded."""

    def compress(self, anatomy: Anatomy) -> list[str]:
        """Changes the model in place and returns notes worth telling; raises Refused where a layer does not fit."""
        raise NotImplementedError
