"""What methods for single weights have in common: a score, the weights that are ranked together, an allocation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from prune_lab.errors import Refused
from prune_lab.methods.base import LayerRow, Method, Pruned
from prune_lab.models.anatomy import Anatomy, out_in
from prune_lab.pruning import allocation, scores, sensitivity
from prune_lab.pruning.calibration import Calibrator
from prune_lab.pruning.cuts import Counts
from prune_lab.pruning.masks import Masks, clear
from prune_lab.pruning.selection import Pattern, count_to_remove, keep_global, keep_layer, keep_pattern, keep_rows
from prune_lab.pruning.statistics import GRADIENTS, Seen

ALLOCATIONS = ("uniform", "global", "owl", "sensitivity")


@dataclass(frozen=True)
class WeightMethod(Method):
    """Zeroes single weights of lowest score; subclasses give the score.

    pattern: N:M kept, such as 2:4; it fixes the amount. scope: the weights that are ranked together. allocation: how
    the amount is spread over blocks; "global" is one ranking over all of them, whatever the scope.
    """

    pattern: str | None = None
    scope: str = "layer"
    allocation: str = "uniform"

    needs: ClassVar[tuple[str, ...]] = ()  # fields of Seen that the score goes by
    scopes: ClassVar[tuple[str, ...]] = ("row", "layer", "global")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scope not in self.scopes:
            raise ValueError(f"scope={self.scope!r} is none of {', '.join(self.scopes)}")
        if self.allocation not in ALLOCATIONS:
            raise ValueError(f"allocation={self.allocation!r} is none of {', '.join(ALLOCATIONS)}")
        if self.scope == "global" and self.allocation not in ("uniform", "global"):
            raise ValueError(
                f"allocation={self.allocation!r} with scope=global: one ranking over all blocks is itself an "
                "allocation; give scope=layer or row"
            )
        if self.pattern is not None:
            Pattern.parse(self.pattern)
            if self.allocation != "uniform":
                raise ValueError(
                    f"allocation={self.allocation!r} with pattern={self.pattern!r}: a pattern takes the same share of "
                    "every block; give allocation=uniform"
                )

    @property
    def seen_by_score(self) -> frozenset[str]:
        """The fields of Seen that the score goes by."""
        return frozenset(self.needs)

    @property
    def counted_score(self) -> str | None:
        """The name of its score where that goes by the weight alone: it is counted once, and cut for all amounts."""
        return None

    @property
    def calibrated(self) -> bool:
        """Whether the score or the allocation looks at calibration text."""
        return bool(self.seen_by_score) or self.allocation in ("owl", "sensitivity")

    @property
    def is_global(self) -> bool:
        """Whether all weights of all blocks are ranked together."""
        return self.pattern is None and "global" in (self.scope, self.allocation)

    @property
    def needs_whole_model(self) -> str | None:
        """One ranking, gradients, or losses are of the whole model; everything else is of a block."""
        if self.is_global:
            return "one ranking over all blocks needs all scores at once; give method.scope=layer or row, or owl"
        if self.allocation == "sensitivity":
            return "method.allocation=sensitivity takes the model's loss again and again; give uniform or owl"
        if of := self.seen_by_score & frozenset(GRADIENTS):
            return f"the score goes by {', '.join(sorted(of))}, gradients of the whole model; give another score"
        return None

    def score(self, weight: Tensor, seen: Seen) -> Tensor:
        """Importance of each weight, shape (out, in) as `weight`; the lowest are pruned first."""
        raise NotImplementedError

    def importance(self, weight: Tensor, seen: Seen) -> Tensor:
        """The score, for options whose key `score` names one."""
        return self.score(weight, seen)

    @torch.no_grad()
    def prune(self, anatomy: Anatomy, amount: float, seed: int, calibrator: Calibrator | None = None) -> Pruned:
        """Zeroes weights of every prunable Linear and returns the masks that keep them so."""
        self._check_pattern(anatomy)
        linears, pruned, keep = anatomy.linears_by_block(), Pruned(), dict[str, Tensor]()
        if self.is_global:
            seen = list(self._walk(anatomy, seed, calibrator, dense=True))
            values = {name: self._checked_score(name, linear, seen[b][name]) for b, name, linear in _each(linears)}
            facts = anatomy.facts if self.counted_score else None
            counts = None if facts is None else facts.in_process(f"{self.counted_score} of all", Counts)
            keep = dict(zip(values, keep_global(list(values.values()), amount, counts), strict=True))
            pruned.rows = [_row(name, mask) for name, mask in keep.items()]
            if calibrator is not None and calibrator.propagate == "pruned":
                pruned.notes.append("one ranking over all blocks: every block was seen with dense ones before it")
        else:
            amounts = self._allocate(anatomy, amount, seed, calibrator, pruned)
            for index, of_block in enumerate(self._walk(anatomy, seed, calibrator)):
                for name, linear in linears[index]:
                    mask = self.prune_linear(name, linear, amounts[index], of_block[name], pruned)
                    pruned.rows.append(_row(name, mask))
                    if not anatomy.is_on_disk:  # masks take a byte for each weight, and only training needs them
                        keep[name] = mask
        pruned.masks = Masks({name: out_in(linear, keep[name]) for _, name, linear in _each(linears) if name in keep})
        pruned.masks.hold(anatomy.model)
        if self.pattern is not None and abs(pruned.realized - amount) > 1e-6:
            pruned.notes.append(
                f"method.pattern={self.pattern} fixes the amount at {pruned.realized:g}; amount={amount:g} was not used"
            )
        return pruned

    def prune_linear(self, name: str, linear: Any, amount: float, seen: Seen, pruned: Pruned) -> Tensor:
        """Zeroes weights of one Linear in place and returns its keep-mask, shape (out, in)."""
        values = self._checked_score(name, linear, seen)
        if self.pattern is not None:
            keep = keep_pattern(values, Pattern.parse(self.pattern))
        elif self.scope == "row":
            keep = keep_rows(values, count_to_remove(values.shape[1], amount))
        else:
            keep = keep_layer(values, amount, seen.counts)
        clear(out_in(linear, linear.weight), keep)
        return keep

    def _walk(
        self, anatomy: Anatomy, seed: int, calibrator: Calibrator | None, dense: bool = False
    ) -> Iterator[dict[str, Seen]]:
        """What was seen at each Linear, block by block, as the score needs it."""
        random = torch.Generator().manual_seed(seed)
        if not self.seen_by_score:
            facts = anatomy.facts if self.counted_score else None
            for index, linears in enumerate(anatomy.linears_by_block()):
                seen = {name: Seen(random=random) for name, _ in linears}
                if facts is not None:
                    known = {name: facts.in_process(f"{self.counted_score} of {name}", Counts) for name in seen}
                    seen = {name: replace(seen[name], counts=known[name]) for name in seen}
                with anatomy.at_hand(index):
                    yield seen
            return
        assert calibrator is not None, "a calibrated method needs a calibrator"
        of_gradients: dict[str, dict[str, Any]] = {
            field: calibrator.saliency(anatomy, order)
            for order, field in enumerate(GRADIENTS, 1)
            if field in self.seen_by_score
        }
        for of_block in calibrator.walk(anatomy, self.seen_by_score, dense):
            yield {
                name: replace(seen, random=random, **{field: of[name] for field, of in of_gradients.items()})
                for name, seen in of_block.items()
            }

    def _allocate(
        self, anatomy: Anatomy, amount: float, seed: int, calibrator: Calibrator | None, pruned: Pruned
    ) -> list[float]:
        """The amount of each block."""
        linears = anatomy.linears_by_block()
        sizes = [sum(linear.weight.numel() for _, linear in of_block) for of_block in linears]
        if self.allocation == "owl":
            assert calibrator is not None
            ratios = []
            for of_block, seen in zip(linears, calibrator.walk(anatomy, frozenset({"input_norm"}), True), strict=True):
                values = [scores.wanda(out_in(linear, linear.weight), seen[name]) for name, linear in of_block]
                ratios.append(allocation.outlier_ratio(values))
            amounts = allocation.owl(ratios, amount, sizes)
        elif self.allocation == "sensitivity":
            assert calibrator is not None
            rises = self.scan(anatomy, seed, calibrator)
            amounts = allocation.by_sensitivity(rises, sensitivity.AMOUNTS, amount, sizes)
        else:
            return [amount] * len(linears)
        pruned.notes.append(f"{self.allocation} gives the blocks " + ", ".join(f"{a:.3f}" for a in amounts))
        return amounts

    def scan(
        self, anatomy: Anatomy, seed: int, calibrator: Calibrator, amounts: tuple[float, ...] = sensitivity.AMOUNTS
    ) -> list[list[float]]:
        """What pruning each block alone costs: see pruning/sensitivity.py. The model stays as it is."""
        linears = anatomy.linears_by_block()

        def prune_block(block: int, seen: dict[str, Seen], amount: float) -> None:
            for name, linear in linears[block]:
                self.prune_linear(name, linear, amount, seen[name], Pruned())

        def scan() -> list[list[float]]:
            walk = self._walk(anatomy, seed, calibrator, dense=True)
            return sensitivity.scan(anatomy, walk, prune_block, calibrator, amounts)

        keys = asdict(self) | {"amount": None, "allocation": None}
        of = {"method": keys, "amounts": amounts, "seed": seed}
        rises: list[list[float]] = calibrator.remember(anatomy, "scan", of, scan, sensitivity.source(type(self)))
        return rises

    def _checked_score(self, name: str, linear: Any, seen: Seen) -> Tensor:
        weight = out_in(linear, linear.weight)
        values = self.importance(weight, seen)
        if not values.isfinite().all():
            raise Refused(
                f"the scores of {name} are not finite: its weights or activations overflow; give another dtype"
            )
        return values.masked_fill(weight == 0, -1)  # below every score: what is gone stays gone

    def _check_pattern(self, anatomy: Anatomy) -> None:
        if self.pattern is None:
            return
        m = Pattern.parse(self.pattern).m
        for name, linear in anatomy.linears():
            inputs = out_in(linear, linear.weight).shape[1]
            if inputs % m:
                raise Refused(f"method.pattern={self.pattern}: {name} has {inputs} inputs, not a multiple of {m}")


def _row(name: str, keep: Tensor) -> LayerRow:
    return LayerRow(name, keep.numel(), keep.numel() - int(keep.sum()))


def _each(linears: list[list[tuple[str, Any]]]) -> Iterator[tuple[int, str, Any]]:
    """Block, name and Linear of every one."""
    for block, of_block in enumerate(linears):
        for name, linear in of_block:
            yield block, name, linear
