"""What every pruning method has in common, and what it answers with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from prune_lab.checks import check_amount
from prune_lab.errors import Refused
from prune_lab.models.anatomy import Anatomy, out_in
from prune_lab.pruning.masks import Masks
from prune_lab.pruning.selection import Pattern, keep_global, keep_layer, keep_pattern

SCOPES = ("layer", "global")


@dataclass(frozen=True)
class LayerRow:
    """One line of the per-layer table: what was removed from a Linear, in weights."""

    layer: str
    before: int
    removed: int


@dataclass
class Pruned:
    """What a method did: the table of its scope, the masks to hold, and notes worth telling."""

    rows: list[LayerRow] = field(default_factory=list)
    masks: Masks = field(default_factory=Masks)
    notes: list[str] = field(default_factory=list)

    @property
    def realized(self) -> float:
        """Fraction of the weights in scope that were removed or zeroed."""
        before = sum(row.before for row in self.rows)
        return sum(row.removed for row in self.rows) / before if before else 0.0


@dataclass(frozen=True)
class Method:
    """A method option: prunes a model to a cumulative amount.

    `not_applicable` names keys that are accepted so that sweeps compose, and are not used.
    """

    amount: float = 0.5

    not_applicable: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        check_amount(self.amount)

    def prune(self, anatomy: Anatomy, amount: float, seed: int) -> Pruned:
        """Removes, in place, `amount` of what the dense model had in scope; raises Refused where it cannot."""
        raise NotImplementedError


@dataclass(frozen=True)
class WeightMethod(Method):
    """Zeroes single weights of lowest score; subclasses give the score.

    pattern: N:M kept, such as 2:4; it fixes the amount. scope: the weights that are ranked together.
    """

    pattern: str | None = None
    scope: str = "layer"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scope not in SCOPES:
            raise ValueError(f"scope={self.scope!r} is none of {', '.join(SCOPES)}")
        if self.pattern is not None:
            Pattern.parse(self.pattern)

    def score(self, weight: Tensor, generator: torch.Generator) -> Tensor:
        """Importance of each weight, shape (out, in) as `weight`; the lowest are pruned first."""
        raise NotImplementedError

    @torch.no_grad()
    def prune(self, anatomy: Anatomy, amount: float, seed: int) -> Pruned:
        """Zeroes weights of every prunable Linear and returns the masks that keep them so."""
        layers = dict(anatomy.linears())
        generator = torch.Generator().manual_seed(seed)
        scores = {name: self.score(out_in(linear, linear.weight), generator) for name, linear in layers.items()}
        if self.pattern is not None:
            pattern, keep = Pattern.parse(self.pattern), {}
            for name, values in scores.items():
                if values.shape[1] % pattern.m:
                    raise Refused(
                        f"method.pattern={self.pattern}: {name} has {values.shape[1]} inputs, not a multiple of "
                        f"{pattern.m}"
                    )
                keep[name] = keep_pattern(values, pattern)
        elif self.scope == "global":
            keep = dict(zip(scores, keep_global(list(scores.values()), amount), strict=True))
        else:
            keep = {name: keep_layer(values, amount) for name, values in scores.items()}
        pruned = Pruned(masks=Masks({name: out_in(layers[name], mask) for name, mask in keep.items()}))
        pruned.masks.hold(anatomy.model)
        for name, mask in keep.items():
            pruned.rows.append(LayerRow(name, mask.numel(), mask.numel() - int(mask.sum())))
        if self.pattern is not None and abs(pruned.realized - amount) > 1e-6:
            pruned.notes.append(
                f"method.pattern={self.pattern} fixes the amount at {pruned.realized:g}; amount={amount:g} was not used"
            )
        return pruned
