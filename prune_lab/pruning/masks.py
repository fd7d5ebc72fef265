"""Which weights are pruned, held at zero while a model trains."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Masks:
    """Keep-masks (True: kept) of a model's Linears by name, each of its weight's shape."""

    def __init__(self, keep: dict[str, Tensor] | None = None) -> None:
        self.keep = dict(keep or {})

    @torch.no_grad()
    def hold(self, model: Any) -> None:
        """Sets every pruned weight to exactly zero; after each optimizer step, since momentum moves them."""
        for name, keep in self.keep.items():
            weight = model.get_submodule(name).weight
            weight.masked_fill_(~keep.to(weight.device), 0)
