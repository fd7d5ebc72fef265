"""Units of lowest score, MLP channels and KV groups, removed from every block alike."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from prune_lab.errors import Refused
from prune_lab.models.anatomy import Anatomy, UnitKind, UnitLinear, unit_kind
from prune_lab.models.resize import dense_count
from prune_lab.pruning import sensitivity
from prune_lab.pruning.calibration import Calibrator
from prune_lab.pruning.pruned import LayerRow, Pruned
from prune_lab.pruning.scores import SCORES
from prune_lab.pruning.seen import Seen
from prune_lab.pruning.selection import count_to_remove, keep_rows
from prune_lab.pruning.surgery import compensate, remove_units, unit_masks, unit_sums, zero_units
from prune_lab.pruning.walk import walk


class UnitRule(Protocol):
    """What says which units go: the keys of methods/structured.py."""

    @property
    def units(self) -> tuple[str, ...]:
        """Their kinds."""

    @property
    def score(self) -> str:
        """A name in pruning/scores.py."""

    @property
    def round_to(self) -> int | None:
        """What the number of MLP channels that stay must be a multiple of."""

    @property
    def compensate(self) -> bool:
        """Whether the bias behind the units gets what they gave on average."""

    @property
    def physical(self) -> bool:
        """Whether shapes change."""


@torch.no_grad()
def prune(rule: UnitRule, anatomy: Anatomy, amount: float, seed: int, calibrator: Calibrator | None) -> Pruned:
    """Removes (or zeroes) units of every chosen kind and returns what went from each Linear.

    Block by block units are zeroed, so that later blocks are calibrated on what the pruned ones pass on; shapes
    change at the end, all at once.
    """
    pruned = Pruned()
    kept = {kind: _count_to_keep(rule, anatomy, kind, amount) for kind in rule.units}
    keep: dict[str, list[Tensor]] = {kind: [] for kind in rule.units}
    parts_of = {kind: anatomy.unit_linears(kind) for kind in rule.units}
    for index, seen in enumerate(_walk(rule, anatomy, seed, calibrator)):
        for kind, count in kept.items():
            parts = parts_of[kind][index]
            scores = unit_scores(rule.score, parts, seen)
            keep[kind].append(keep_rows(scores[None], max(0, len(scores) - count))[0])
            _zero(rule, parts, keep[kind][-1], seen, pruned)
    for kind, count in kept.items():
        pruned.rows += _rows(anatomy, kind, dense_count(anatomy, kind), count)
        if rule.physical:
            pruned.cuts += remove_units(anatomy, kind, keep[kind])
        else:
            for parts, mask in zip(parts_of[kind], keep[kind], strict=True):
                pruned.masks.keep.update(unit_masks(parts, mask))
    pruned.warnings = list(dict.fromkeys(pruned.warnings))
    return pruned


@torch.no_grad()
def scan(
    rule: UnitRule, anatomy: Anatomy, kind: str, seed: int, calibrator: Calibrator, amounts: tuple[float, ...]
) -> list[list[float]]:
    """What zeroing units of one kind in each block alone costs: see pruning/sensitivity.py."""
    parts_of = anatomy.unit_linears(kind)

    def prune_block(block: int, seen: dict[str, Seen], amount: float) -> None:
        scores = unit_scores(rule.score, parts_of[block], seen)
        zero_units(parts_of[block], keep_rows(scores[None], count_to_remove(len(scores), amount))[0])

    of = {"score": rule.score, "compensate": rule.compensate, "kind": kind, "seed": seed}
    blocks = _walk(rule, anatomy, seed, calibrator, dense=True)
    return sensitivity.scan(anatomy, blocks, prune_block, calibrator, amounts, type(rule), of)


def unit_scores(name: str, parts: list[UnitLinear], seen: dict[str, Seen]) -> Tensor:
    """Importance of each unit of a block, (units,), fp32, on the CPU: the sum of a named score over its weights."""
    score = SCORES[name]
    if name == "random":
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


def _zero(rule: UnitRule, parts: list[UnitLinear], keep: Tensor, seen: dict[str, Seen], pruned: Pruned) -> None:
    reader = next(part for part in parts if part.side == "columns")
    if rule.compensate and not keep.all():
        mean = seen[reader.name].mean
        if reader.linear.bias is not None and mean is not None:
            compensate(reader, keep, mean)
        else:
            pruned.warnings.append(f"nothing compensated: {reader.name.rpartition('.')[2]} has no bias in this model")
    zero_units(parts, keep)


def _walk(
    rule: UnitRule, anatomy: Anatomy, seed: int, calibrator: Calibrator | None, dense: bool = False
) -> Iterator[dict[str, Seen]]:
    """What was seen at each Linear, block by block, as the score and the compensation need it."""

    def saliency(order: int) -> dict[str, Tensor]:
        """Of each unit's weights by Linear, (units,): summed up at once, no gradient is kept."""
        assert calibrator is not None
        parts = {part.name: part for kind in rule.units for of_block in anatomy.unit_linears(kind) for part in of_block}
        of_units = " ".join(("units", *rule.units))
        return calibrator.saliency(anatomy, order, of_units, lambda name, v: unit_sums(parts[name], v), set(parts))

    needs = SCORES[rule.score].needs | ({"variance"} if rule.compensate else set())
    return walk(anatomy, needs, seed, calibrator, dense, saliency)


def check(rule: UnitRule, config: Any, amounts: Iterable[float]) -> None:
    """Raises Refused for what the model has no units of, and where its config cannot hold what an amount leaves.

    config: of transformers, before any weight is loaded. amounts: cumulative.
    """
    for kind in rule.units:
        units = unit_kind(config, kind)
        total = getattr(config, units.counts[0], None)
        if total is None:  # left to a default: known when the model is there
            continue
        for amount in amounts:
            _check_count(rule, config, kind, amount, _count(rule, units, total, amount), total)


def _count_to_keep(rule: UnitRule, anatomy: Anatomy, kind: str, amount: float) -> int:
    total, units = dense_count(anatomy, kind), unit_kind(anatomy.config, kind)
    count = min(_count(rule, units, total, amount), anatomy.unit_count(kind))
    _check_count(rule, anatomy.config, kind, amount, count, total)
    return count


def _count(rule: UnitRule, units: UnitKind, total: int, amount: float) -> int:
    """How many of `total` units stay."""
    count = max(1, total - count_to_remove(total, amount))
    if units.rounds and rule.round_to is not None and amount > 0:
        if rule.round_to > total:
            raise Refused(f"method.round_to={rule.round_to} is more than the {total} {units.label} of a block")
        count = min(max(1, round(count / rule.round_to)), total // rule.round_to) * rule.round_to
    return count


def _check_count(rule: UnitRule, config: Any, kind: str, amount: float, count: int, total: int) -> None:
    """Raises Refused where a config that holds `total` units of a kind, or fewer by now, cannot hold `count`."""
    units = unit_kind(config, kind)
    possible = units.possible(config, getattr(config, units.counts[0], None) or total)
    if not rule.physical or count in possible:
        return
    amounts = ", ".join(f"{n} (amount={1 - n / total:g})" for n in possible)
    others = [other for other in rule.units if other != kind]
    without = f"method.units=[{','.join(others)}] or " if others else ""
    raise Refused(
        f"method.units=[{','.join(rule.units)}]: method.amount={amount:g} leaves {count} of {total} {units.label}, "
        f"which a stock {config.model_type} config cannot hold: possible are {amounts}; or give {without}"
        "method.physical=false, which leaves zeros"
    )


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
