"""Units of a block: which of them stay, their scores, and their rows in the per-layer table."""

from __future__ import annotations

import torch
from torch import Tensor

from prune_lab.errors import Refused
from prune_lab.models.anatomy import Anatomy, UnitLinear
from prune_lab.pruning.obs import per_step, remove_inputs
from prune_lab.pruning.pruned import LayerRow
from prune_lab.pruning.scores import SCORES
from prune_lab.pruning.selection import keep_rows
from prune_lab.pruning.statistics import LinearStatistics
from prune_lab.pruning.surgery import unit_sums


def choose_units(
    criterion: str,
    linears: list[UnitLinear],
    statistics: dict[str, LinearStatistics],
    remove: int,
    centred: bool,
    groups: int = 1,
) -> tuple[Tensor, float]:
    """The units that stay when `remove` go, bools (units,), on the CPU; and the damping of the gram, if it was solved.

    criterion: a score, of which the lowest go, or obs, which removes them in order. centred: the bias of the Linear
    that reads the units makes up for what those that go gave on average. groups: number of equal groups of units, one
    behind the other, each of which loses the same number.
    """
    if criterion in SCORES:
        scores = unit_scores(criterion, linears, statistics).view(groups, -1)
        return keep_rows(scores, remove // groups).flatten(), 0.0
    return _choose_by_removal(linears[-1], statistics[linears[-1].name], remove, centred, groups)


def _choose_by_removal(
    reader: UnitLinear, statistics: LinearStatistics, remove: int, centred: bool, groups: int
) -> tuple[Tensor, float]:
    units, device = reader.weight.shape[1] // sum(reader.widths), reader.weight.device
    keep = torch.ones(units, dtype=torch.bool)
    if remove == 0:
        return keep, 0.0
    assert statistics.gram is not None
    assert statistics.tokens is not None
    assert statistics.mean is not None or not centred
    unit_of_column = reader.lines(torch.arange(units))
    columns = unit_of_column.argsort(stable=True).view(units, -1).to(device)
    mean, tokens = (statistics.mean, int(statistics.tokens)) if centred else (None, 0)
    at_once = per_step(columns.shape[1], remove) if groups == 1 else 1
    removal = remove_inputs(
        reader.weight.detach(),
        statistics.gram,
        columns,
        remove,
        mean,
        tokens,
        at_once=at_once,
        name=reader.name,
        parts=groups,
    )
    keep[removal.order.cpu()] = False
    return keep, removal.damping


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


def rows_of_table(anatomy: Anatomy, group: str, total: int, count: int) -> list[LayerRow]:
    """Rows of the per-layer table, before shapes change: of each Linear the weights that units own.

    total: units of the dense model. count: those that stay.
    """
    rows = []
    for s in anatomy.unit_sets(group):
        for part in s.parts:
            lines = part.weight.shape[0 if part.side == "rows" else 1]
            owned = part.linear.weight.numel() // lines
            if part.side == "rows" and part.linear.bias is not None:
                owned += 1
            unit = owned * sum(part.widths) * s.multiple
            rows.append(LayerRow(part.name, unit * total, unit * (total - count)))
    return rows
