"""Single weights of lowest score, zeroed in every block."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import Field, asdict, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from prune_lab.dense_cache import DenseCache
from prune_lab.errors import Refused
from prune_lab.models.anatomy import Anatomy, out_in
from prune_lab.pruning import allocation, scores, sensitivity
from prune_lab.pruning.calibration import Calibrator
from prune_lab.pruning.masks import Masks, clear
from prune_lab.pruning.pattern import Pattern
from prune_lab.pruning.pruned import LayerRow, Pruned
from prune_lab.pruning.seen import Seen
from prune_lab.pruning.selection import count_to_remove, keep_global, keep_layer, keep_pattern, keep_rows
from prune_lab.pruning.thresholds import Counts
from prune_lab.pruning.walk import walk


class WeightRule(Protocol):
    """What says which weights go: methods/weights.py, where each of these is explained."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def pattern(self) -> str | None:
        """N:M kept."""

    @property
    def scope(self) -> str:
        """The weights that are ranked together."""

    @property
    def allocation(self) -> str:
        """How the amount is spread over blocks."""

    @property
    def is_global(self) -> bool:
        """Whether all weights of all blocks are ranked together."""

    @property
    def seen_by_score(self) -> frozenset[str]:
        """The fields of Seen that the score goes by."""

    @property
    def score(self) -> Any:
        """The name of its score, or its own score as a function of a weight and what was seen."""

    @property
    def named_score(self) -> scores.Score | None:
        """The score of that name."""

    def prune_linear(self, name: str, linear: Any, amount: float, seen: Seen, pruned: Pruned) -> Tensor:
        """Zeroes weights of one Linear in place and returns its keep-mask, (out, in)."""


@torch.no_grad()
def prune(rule: WeightRule, anatomy: Anatomy, amount: float, seed: int, calibrator: Calibrator | None) -> Pruned:
    """Zeroes weights of every prunable Linear and returns the masks that keep them so."""
    _check_pattern(rule, anatomy)
    linears, pruned, keep = anatomy.linears_by_block(), Pruned(), dict[str, Tensor]()
    if rule.is_global:
        seen = list(_walk(rule, anatomy, seed, calibrator, dense=True))
        values = {name: _checked_score(rule, name, linear, seen[b][name]) for b, name, linear in _each(linears)}
        facts = _facts_of_counts(rule, anatomy)
        counts = None if facts is None else facts.in_process(f"{rule.score} of all", Counts)
        keep = dict(zip(values, keep_global(list(values.values()), amount, counts), strict=True))
        pruned.rows = [_row(name, mask) for name, mask in keep.items()]
        if calibrator is not None and calibrator.propagate == "pruned":
            pruned.warnings.append(
                "one ranking over all blocks: all were calibrated before any was pruned to this amount, whatever "
                "dataset.calibration.propagate"
            )
    else:
        amounts = _allocate(rule, anatomy, amount, seed, calibrator, pruned)
        for index, of_block in enumerate(_walk(rule, anatomy, seed, calibrator)):
            for name, linear in linears[index]:
                mask = rule.prune_linear(name, linear, amounts[index], of_block[name], pruned)
                pruned.rows.append(_row(name, mask))
                if not anatomy.is_on_disk:  # masks take a byte for each weight, and only training needs them
                    keep[name] = mask
    pruned.masks = Masks({name: out_in(linear, keep[name]) for _, name, linear in _each(linears) if name in keep})
    pruned.masks.hold(anatomy.model)
    if rule.pattern is not None and abs(pruned.realized - amount) > 1e-6:
        pruned.warnings.append(
            f"method.pattern={rule.pattern} fixes the amount at {pruned.realized:g}; amount={amount:g} was not used"
        )
    return pruned


def prune_linear(rule: WeightRule, name: str, linear: Any, amount: float, seen: Seen) -> Tensor:
    """Zeroes weights of lowest score of one Linear in place and returns its keep-mask, shape (out, in)."""
    values = _checked_score(rule, name, linear, seen)
    if rule.pattern is not None:
        keep = keep_pattern(values, Pattern.parse(rule.pattern))
    elif rule.scope == "row":
        keep = keep_rows(values, count_to_remove(values.shape[1], amount))
    else:
        keep = keep_layer(values, amount, seen.counts)
    clear(out_in(linear, linear.weight), keep)
    return keep


@torch.no_grad()
def scan(
    rule: WeightRule, anatomy: Anatomy, seed: int, calibrator: Calibrator, amounts: tuple[float, ...]
) -> list[list[float]]:
    """What pruning each block alone costs: see pruning/sensitivity.py. The model stays as it is."""
    linears = anatomy.linears_by_block()

    def prune_block(block: int, seen: dict[str, Seen], amount: float) -> None:
        for name, linear in linears[block]:
            rule.prune_linear(name, linear, amount, seen[name], Pruned())

    of = {"method": asdict(rule) | {"amount": None, "allocation": None}, "seed": seed}
    blocks = _walk(rule, anatomy, seed, calibrator, dense=True)
    return sensitivity.scan(anatomy, blocks, prune_block, calibrator, amounts, type(rule), of)


def _walk(
    rule: WeightRule, anatomy: Anatomy, seed: int, calibrator: Calibrator | None, dense: bool = False
) -> Iterator[dict[str, Seen]]:
    """What was seen at each Linear, block by block, as the score needs it."""
    facts = _facts_of_counts(rule, anatomy)
    for of_block in walk(anatomy, rule.seen_by_score, seed, calibrator, dense):
        if facts is None:
            yield of_block
        else:
            counts = {name: facts.in_process(f"{rule.score} of {name}", Counts) for name in of_block}
            yield {name: replace(seen, counts=counts[name]) for name, seen in of_block.items()}


def _facts_of_counts(rule: WeightRule, anatomy: Anatomy) -> DenseCache | None:
    """Where scores are counted once and cut for all amounts: those that go by the weight alone, of the dense model."""
    named = rule.named_score
    return anatomy.dense_cache if named is not None and named.by_weight_alone else None


def _allocate(
    rule: WeightRule, anatomy: Anatomy, amount: float, seed: int, calibrator: Calibrator | None, pruned: Pruned
) -> list[float]:
    """The amount of each block."""
    linears = anatomy.linears_by_block()
    sizes = [sum(linear.weight.numel() for _, linear in of_block) for of_block in linears]
    if rule.allocation == "owl":
        assert calibrator is not None
        ratios = []
        for of_block, seen in zip(linears, calibrator.walk(anatomy, frozenset({"input_norm"}), True), strict=True):
            values = [scores.wanda(out_in(linear, linear.weight), seen[name]) for name, linear in of_block]
            ratios.append(allocation.outlier_ratio(values))
        amounts = allocation.owl(ratios, amount, sizes)
    elif rule.allocation == "sensitivity":
        assert calibrator is not None
        rises = scan(rule, anatomy, seed, calibrator, sensitivity.AMOUNTS)
        amounts = allocation.by_sensitivity(rises, sensitivity.AMOUNTS, amount, sizes)
    else:
        return [amount] * len(linears)
    pruned.warnings.append(f"{rule.allocation} gives the blocks " + ", ".join(f"{a:.3f}" for a in amounts))
    return amounts


def _checked_score(rule: WeightRule, name: str, linear: Any, seen: Seen) -> Tensor:
    weight = out_in(linear, linear.weight)
    named = rule.named_score
    values: Tensor = rule.score(weight, seen) if named is None else named.function(weight, seen)
    if not values.isfinite().all():
        raise Refused(f"the scores of {name} are not finite: its weights or activations overflow; give another dtype")
    return values.masked_fill(weight == 0, -1)  # below every score: what is gone stays gone


def _check_pattern(rule: WeightRule, anatomy: Anatomy) -> None:
    if rule.pattern is None:
        return
    m = Pattern.parse(rule.pattern).m
    for name, linear in anatomy.linears():
        inputs = out_in(linear, linear.weight).shape[1]
        if inputs % m:
            raise Refused(f"method.pattern={rule.pattern}: {name} has {inputs} inputs, not a multiple of {m}")


def _row(name: str, keep: Tensor) -> LayerRow:
    return LayerRow(name, keep.numel(), keep.numel() - int(keep.sum()))


def _each(linears: list[list[tuple[str, Any]]]) -> Iterator[tuple[int, str, Any]]:
    """Block, name and Linear of every one."""
    for block, of_block in enumerate(linears):
        for name, linear in of_block:
            yield block, name, linear
