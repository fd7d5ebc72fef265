"""method=structured: whole units, removed from every block alike."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prune_lab.errors import Refused
from prune_lab.methods.base import LayerRow, Method, Pruned
from prune_lab.models.anatomy import Anatomy, UnitLinear
from prune_lab.pruning.selection import count_to_remove, keep_rows
from prune_lab.pruning.surgery import remove_units, unit_masks, unit_weights, zero_units

KINDS = ("mlp", "heads")
SCORES = ("l2", "l1", "random")


@dataclass(frozen=True)
class Structured(Method):
    """MLP channels and KV groups of lowest norm (Li et al., 1608.08710), the same count in every block.

    A stock config holds one width for all blocks, so each block drops its own units, but as many as the others.
    """

    units: tuple[str, ...] = ("mlp",)
    score: str = "l2"
    round_to: int | None = None
    physical: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "units", tuple(self.units))
        if not self.units or set(self.units) - set(KINDS) or len(set(self.units)) != len(self.units):
            raise ValueError(f"units={list(self.units)} must be one or both of {', '.join(KINDS)}")
        if self.score not in SCORES:
            raise ValueError(f"score={self.score!r} is none of {', '.join(SCORES)}")
        if self.round_to is not None and self.round_to < 1:
            raise ValueError(f"round_to={self.round_to} must be at least 1")

    @torch.no_grad()
    def prune(self, anatomy: Anatomy, amount: float, seed: int) -> Pruned:
        """Removes (or zeroes) units of every chosen kind and returns what went from each Linear."""
        pruned, generator = Pruned(), torch.Generator().manual_seed(seed)
        kept = {kind: self._count_to_keep(anatomy, kind, amount) for kind in self.units}
        for kind, count in kept.items():
            total = anatomy.unit_count(kind)
            scores = [self._score(parts, total, generator) for parts in anatomy.unit_linears(kind)]
            keep = [keep_rows(s[None], total - count)[0] for s in scores]
            pruned.rows += _rows(anatomy, kind, total, count)
            if self.physical:
                remove_units(anatomy, kind, keep)
            else:
                zero_units(anatomy, kind, keep)
                pruned.masks.keep.update(unit_masks(anatomy, kind, keep))
        return pruned

    def _count_to_keep(self, anatomy: Anatomy, kind: str, amount: float) -> int:
        total = anatomy.unit_count(kind)
        count = max(1, total - count_to_remove(total, amount))
        if kind == "mlp" and self.round_to is not None and amount > 0:
            if self.round_to > total:
                raise Refused(f"method.round_to={self.round_to} is more than the {total} MLP channels of a block")
            count = min(max(1, round(count / self.round_to)), total // self.round_to) * self.round_to
        possible = anatomy.possible_counts(kind)
        if self.physical and count not in possible:
            amounts = ", ".join(f"{n} (amount={1 - n / total:g})" for n in possible)
            raise Refused(
                f"method.amount={amount:g} leaves {count} of {total} KV groups, which a stock "
                f"{anatomy.config.model_type} config cannot hold: possible are {amounts}"
            )
        return count

    def _score(self, parts: list[UnitLinear], units: int, generator: torch.Generator) -> Tensor:
        """Importance of each unit of a block, shape (units,), fp32: a norm over all weights of the unit."""
        if self.score == "random":
            return torch.rand(units, generator=generator)
        weights = [unit_weights(part).float() for part in parts]
        if self.score == "l1":
            return torch.stack([w.abs().sum(1) for w in weights]).sum(0).cpu()
        return torch.stack([w.square().sum(1) for w in weights]).sum(0).sqrt().cpu()


def _rows(anatomy: Anatomy, kind: str, total: int, count: int) -> list[LayerRow]:
    """The per-layer table, before the cut: a unit owns an equal share of each of its Linears."""
    rows = []
    for parts in anatomy.unit_linears(kind):
        for part in parts:
            owned = part.linear.weight.numel()
            if part.side == "rows" and part.linear.bias is not None:
                owned += part.linear.bias.numel()
            rows.append(LayerRow(part.name, owned, owned // total * (total - count)))
    return rows
