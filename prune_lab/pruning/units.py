"""Units of a block: their scores, and their rows in the per-layer table."""

from __future__ import annotations

import torch
from torch import Tensor

from prune_lab.errors import Refused
from prune_lab.models.anatomy import Anatomy, UnitLinear
from prune_lab.pruning.pruned import LayerRow
from prune_lab.pruning.scores import SCORES
from prune_lab.pruning.statistics import LinearStatistics
from prune_lab.pruning.surgery import unit_sums


def unit_scores(name: str, linears: list[UnitLinear], statistics: dict[str, LinearStatistics]) -> Tensor:
    """Importance of each unit of a block, (units,), fp32, on the CPU: the sum of a named score over its weights."""
    score = SCORES[name]
    if name == "random":
        reader = linears[-1]
        units = reader.weight.shape[1] // sum(reader.widths)
        return torch.rand(units, generator=statistics[reader.name].random)
    sums = []
    for linear in linears:
        if linear.side == "columns" or not score.output_only:
            values = score.function(linear.weight.detach(), statistics[linear.name])
            sums.append(values if values.ndim == 1 else unit_sums(linear, values))
    total = torch.stack(sums).sum(0).cpu()
    if not total.isfinite().all():
        raise Refused(
            f"the scores of {linears[-1].name} are not finite: weights or activations overflow; give another dtype"
        )
    return total


def rows_of_table(anatomy: Anatomy, kind: str, total: int, count: int) -> list[LayerRow]:
    """Rows of the per-layer table, before shapes change: a unit owns an equal share of each of its Linears.

    total: units of the dense model. count: those that stay.
    """
    rows, present = [], anatomy.unit_count(kind)
    for linears in anatomy.unit_linears(kind):
        for linear in linears:
            owned = linear.linear.weight.numel()
            if linear.side == "rows" and linear.linear.bias is not None:
                owned += linear.linear.bias.numel()
            unit = owned // present
            rows.append(LayerRow(linear.name, unit * total, unit * (total - count)))
    return rows
