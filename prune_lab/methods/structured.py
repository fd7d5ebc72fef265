"""method=structured: whole units, removed from every block alike."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from prune_lab.errors import Refused
from prune_lab.methods.base import LayerRow, Method, Pruned
from prune_lab.models.anatomy import Anatomy, UnitLinear
from prune_lab.models.resize import dense_count
from prune_lab.pruning import sensitivity
from prune_lab.pruning.calibration import Calibrator
from prune_lab.pruning.scores import OF_UNITS, SCORES
from prune_lab.pruning.selection import count_to_remove, keep_rows
from prune_lab.pruning.statistics import GRADIENTS, Seen
from prune_lab.pruning.surgery import compensate, remove_units, unit_masks, unit_sums, zero_units

KINDS = ("mlp", "heads")


@dataclass(frozen=True)
class Structured(Method):
    """MLP channels and KV groups of lowest score (by L2 norm: Li et al., 1608.08710), the same count in every block.

    A stock config holds one width for all blocks, so each block drops its own units, but as many as the others.
    """

    units: tuple[str, ...] = ("mlp",)
    score: str = "l2"
    round_to: int | None = None
    compensate: bool = False
    physical: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "units", tuple(self.units))
        if not self.units or set(self.units) - set(KINDS) or len(set(self.units)) != len(self.units):
            raise ValueError(f"units={list(self.units)} must be one or both of {', '.join(KINDS)}")
        if self.score not in OF_UNITS:
            raise ValueError(f"score={self.score!r} is none of {', '.join(OF_UNITS)}")
        if self.round_to is not None and self.round_to < 1:
            raise ValueError(f"round_to={self.round_to} must be at least 1")

    @property
    def calibrated(self) -> bool:
        """Whether the score or the compensation looks at calibration text."""
        return bool(SCORES[self.score].needs) or self.compensate

    @torch.no_grad()
    def prune(self, anatomy: Anatomy, amount: float, seed: int, calibrator: Calibrator | None = None) -> Pruned:
        """Removes (or zeroes) units of every chosen kind and returns what went from each Linear.

        Block by block units are zeroed, so that later blocks are calibrated on what the pruned ones pass on; shapes
        change at the end, all at once.
        """
        pruned = Pruned()
        kept = {kind: self._count_to_keep(anatomy, kind, amount) for kind in self.units}
        keep: dict[str, list[Tensor]] = {kind: [] for kind in self.units}
        parts_of = {kind: anatomy.unit_linears(kind) for kind in self.units}
        for index, seen in enumerate(self._walk(anatomy, seed, calibrator)):
            for kind, count in kept.items():
                parts = parts_of[kind][index]
                scores = self.unit_scores(parts, seen)
                keep[kind].append(keep_rows(scores[None], max(0, len(scores) - count))[0])
                self._zero(parts, keep[kind][-1], seen, pruned)
        for kind, count in kept.items():
            pruned.rows += _rows(anatomy, kind, dense_count(anatomy, kind), count)
            if self.physical:
                pruned.cuts += remove_units(anatomy, kind, keep[kind])
            else:
                for parts, mask in zip(parts_of[kind], keep[kind], strict=True):
                    pruned.masks.keep.update(unit_masks(parts, mask))
        pruned.notes = list(dict.fromkeys(pruned.notes))
        return pruned

    def scan(
        self, anatomy: Anatomy, kind: str, amounts: tuple[float, ...], seed: int, calibrator: Calibrator
    ) -> list[list[float]]:
        """What zeroing units of one kind in each block alone costs: see pruning/sensitivity.py."""
        parts_of = anatomy.unit_linears(kind)

        def prune_block(block: int, seen: dict[str, Seen], amount: float) -> None:
            scores = self.unit_scores(parts_of[block], seen)
            zero_units(parts_of[block], keep_rows(scores[None], count_to_remove(len(scores), amount))[0])

        def scan() -> list[list[float]]:
            walk = self._walk(anatomy, seed, calibrator, dense=True)
            return sensitivity.scan(anatomy, walk, prune_block, calibrator, amounts)

        of = {"score": self.score, "compensate": self.compensate, "kind": kind, "amounts": amounts, "seed": seed}
        rises: list[list[float]] = calibrator.remember(anatomy, "scan", of, scan, sensitivity.source(type(self)))
        return rises

    def _zero(self, parts: list[UnitLinear], keep: Tensor, seen: dict[str, Seen], pruned: Pruned) -> None:
        reader = next(part for part in parts if part.side == "columns")
        if self.compensate and not keep.all():
            mean = seen[reader.name].mean
            if reader.linear.bias is not None and mean is not None:
                compensate(reader, keep, mean)
            else:
                pruned.notes.append(f"nothing compensated: {reader.name.rpartition('.')[2]} has no bias in this model")
        zero_units(parts, keep)

    def _walk(
        self, anatomy: Anatomy, seed: int, calibrator: Calibrator | None, dense: bool = False
    ) -> Iterator[dict[str, Seen]]:
        """What was seen at each Linear, block by block, as the score and the compensation need it."""
        random, needs = torch.Generator().manual_seed(seed), SCORES[self.score].needs
        if not self.calibrated:
            yield from ({name: Seen(random=random) for name, _ in linears} for linears in anatomy.linears_by_block())
            return
        assert calibrator is not None, "a calibrated method needs a calibrator"
        sums: dict[str, dict[str, Any]] = {
            field: self._saliency(anatomy, order, calibrator)
            for order, field in enumerate(GRADIENTS, 1)
            if field in needs
        }
        for of_block in calibrator.walk(anatomy, needs | ({"variance"} if self.compensate else set()), dense):
            yield {
                name: replace(seen, random=random, **{field: of[name] for field, of in sums.items() if name in of})
                for name, seen in of_block.items()
            }

    def _saliency(self, anatomy: Anatomy, order: int, calibrator: Calibrator) -> dict[str, Tensor]:
        """Saliency of each unit's weights by Linear, (units,): summed up at once, no gradient is kept."""
        parts = {part.name: part for kind in self.units for of_block in anatomy.unit_linears(kind) for part in of_block}
        return calibrator.saliency(
            anatomy,
            order,
            " ".join(("units", *self.units)),
            lambda name, values: unit_sums(parts[name], values),
            set(parts),
        )

    def unit_scores(self, parts: list[UnitLinear], seen: dict[str, Seen]) -> Tensor:
        """Importance of each unit of a block, shape (units,), fp32, on the CPU: a sum over weights of the unit."""
        score = SCORES[self.score]
        if self.score == "random":
            reader = parts[-1]
            units = reader.weight.shape[1] // sum(reader.widths)
            return torch.rand(units, generator=seen[reader.name].random)
        sums = []
        for part in parts:
            if part.side == "columns" or not score.output_only:
                values = score.function(part.weight, seen[part.name])
                sums.append(values if values.ndim == 1 else unit_sums(part, values))
        total = torch.stack(sums).sum(0).cpu()
        if not total.isfinite().all():
            raise Refused(
                f"the scores of {parts[-1].name} are not finite: weights or activations overflow; give another dtype"
            )
        return total

    def _count_to_keep(self, anatomy: Anatomy, kind: str, amount: float) -> int:
        total = dense_count(anatomy, kind)
        count = max(1, total - count_to_remove(total, amount))
        if kind == "mlp" and self.round_to is not None and amount > 0:
            if self.round_to > total:
                raise Refused(f"method.round_to={self.round_to} is more than the {total} MLP channels of a block")
            count = min(max(1, round(count / self.round_to)), total // self.round_to) * self.round_to
        possible, count = anatomy.possible_counts(kind), min(count, anatomy.unit_count(kind))
        if self.physical and count not in possible:
            amounts = ", ".join(f"{n} (amount={1 - n / total:g})" for n in possible)
            raise Refused(
                f"method.amount={amount:g} leaves {count} of {total} KV groups, which a stock "
                f"{anatomy.config.model_type} config cannot hold: possible are {amounts}"
            )
        return count


def _rows(anatomy: Anatomy, kind: str, total: int, count: int) -> list[LayerRow]:
    """The per-layer table, before the cut: a unit owns an equal share of each of its Linears; `total` were dense."""
    rows, present = [], anatomy.unit_count(kind)
    for parts in anatomy.unit_linears(kind):
        for part in parts:
            owned = part.linear.weight.numel()
            if part.side == "rows" and part.linear.bias is not None:
                owned += part.linear.bias.numel()
            unit = owned // present
            rows.append(LayerRow(part.name, unit * total, unit * (total - count)))
    return rows
