"""Sets of units that were found in a model's blocks, and the groups in which they are cut together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prune_lab.models.found import Matrix, read_matrix


@dataclass(frozen=True)
class Side:
    """Rows or columns of a matrix that units are made of: `widths` of each unit in each run (models/families.py)."""

    matrix: Matrix
    side: str  # "rows" | "columns"
    widths: tuple[int, ...]

    @property
    def lines(self) -> int:
        """Number of rows or columns."""
        return self.matrix.place.shape[0 if self.side == "rows" else 1]


@dataclass(frozen=True)
class Beside:
    """A tensor that goes with units and is no matrix of theirs: a bias, a sink for each head, those of all experts.

    sets: numbers of the sets in their group: one, or one for each index of the first dimension.
    """

    tensor: str
    dim: int
    sets: tuple[int, ...]
    widths: tuple[int, ...]


@dataclass(frozen=True)
class FoundSet:
    """Units that one matrix of a block reads, which comes last in `sides`; `multiple` of them for one of the group.

    groups: number of equal groups that they come in, one behind the other, each of which loses the same number.
    """

    block: int
    units: int
    sides: tuple[Side, ...]
    multiple: int = 1
    groups: int = 1


@dataclass(frozen=True)
class FoundGroup:
    """Units whose number the same config fields hold, which are cut together.

    count: their number as the fields have it. fields: number of a part of the config (text_parts) and key.
    writes_head_dim: whether a config with another count must say the size of a head.
    """

    name: str
    kind: str
    count: int
    fields: tuple[tuple[int, str], ...]
    sets: tuple[FoundSet, ...]
    beside: tuple[Beside, ...]
    writes_head_dim: bool = False


def dimension(parameter: Tensor, side: Side) -> int:
    """The dimension of a parameter along which the rows or columns of a matrix lie."""
    stride = side.matrix.place.strides[0 if side.side == "rows" else 1]
    fitting = [d for d in range(parameter.dim()) if parameter.stride(d) == stride and parameter.shape[d] >= side.lines]
    return fitting[-1]


def unit_of_line(widths: tuple[int, ...], units: int) -> Tensor:
    """The unit of each row or column of a matrix, (lines,)."""
    return torch.cat([torch.arange(units).repeat_interleave(width) for width in widths])


def read_group(of: dict[str, Any]) -> FoundGroup:
    """The group that asdict and JSON made this of."""
    sets = tuple(
        FoundSet(
            s["block"],
            s["units"],
            tuple(Side(read_matrix(side["matrix"]), side["side"], tuple(side["widths"])) for side in s["sides"]),
            s["multiple"],
            s["groups"],
        )
        for s in of["sets"]
    )
    beside = tuple(Beside(b["tensor"], b["dim"], tuple(b["sets"]), tuple(b["widths"])) for b in of["beside"])
    fields = tuple((number, key) for number, key in of["fields"])
    return FoundGroup(**{**of, "sets": sets, "beside": beside, "fields": fields})
