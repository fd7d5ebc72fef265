"""Importance scores: pure functions of a weight (out, in) and of the calibration statistics of its Linear.

The lowest scores are removed first. The score of a unit (an MLP channel, a KV group) is the sum over its weights, so
every score serves unstructured and structured pruning. Units have a criterion more that is no score: obs, an order in
which they go (obs.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from prune_lab.pruning.statistics import LinearStatistics

# Fields of LinearStatistics that come from gradients of the whole model's loss (gradients.py).
GRADIENTS = ("saliency", "saliency2")
_SMALLEST = 2.0**-126  # normal number in float32


def magnitude(weight: Tensor, statistics: LinearStatistics) -> Tensor:
    """|W|, in the weight's own number type (Han et al., 1506.02626)."""
    return weight.abs()


def square(weight: Tensor, statistics: LinearStatistics) -> Tensor:
    """W^2, float32: its sum over a unit ranks as the unit's L2 norm (Li et al., 1608.08710)."""
    return weight.float().square()


def random(weight: Tensor, statistics: LinearStatistics) -> Tensor:
    """Uniform in [0, 1), drawn on the CPU so that every device prunes the same weights."""
    import torch

    return torch.rand(weight.shape, generator=statistics.random).to(weight.device)


def wanda(weight: Tensor, statistics: LinearStatistics) -> Tensor:
    """|W_ij| * ||X_j||, float32 (Sun et al., 2306.11695)."""
    assert statistics.input_norm is not None
    return weight.float().abs() * statistics.input_norm


def moe_pruner(weight: Tensor, statistics: LinearStatistics) -> Tensor:
    """|W_ij| * ||(g * X)_j||, float32, g the gates of an expert's tokens (MoE-Pruner: 2410.12013); else Wanda's."""
    assert statistics.gated_norm is not None
    return weight.float().abs() * statistics.gated_norm


def ria(weight: Tensor, statistics: LinearStatistics) -> Tensor:
    """(|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|) * ||X_j||^0.5, float32 (RIA: Zhang et al., ICLR 2024)."""
    assert statistics.input_norm is not None
    size = weight.float().abs()
    # In a row or column of zeros every share is zero, not undefined.
    columns, rows = (size.sum(dim, keepdim=True).clamp(min=_SMALLEST) for dim in (0, 1))
    share = size / columns + size / rows
    return share * statistics.input_norm.sqrt()


def taylor(weight: Tensor, statistics: LinearStatistics) -> Tensor:
    """|w * g|, averaged over windows (Molchanov et al., 1611.06440; LLM-Pruner, 2305.11627)."""
    assert statistics.saliency is not None
    return statistics.saliency


def taylor2(weight: Tensor, statistics: LinearStatistics) -> Tensor:
    """w^2 * F with F the mean squared gradient of a window (LLM-Pruner, 2305.11627)."""
    assert statistics.saliency2 is not None
    return statistics.saliency2


def wifv(weight: Tensor, statistics: LinearStatistics) -> Tensor:
    """W_ij^2 * variance of x_j, float32: weighted input feature variance (FLAP: An et al., 2312.11983)."""
    assert statistics.variance is not None
    return weight.float().square() * statistics.variance


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """Choice of weights or units: the calibration statistics that it needs, and the Linears of a unit that it reads.

    output_only: only the Linear that reads the unit (an MLP's down projection, attention's output projection), where
    the activation is the unit's own.
    """

    needs: frozenset[str] = frozenset()
    output_only: bool = False


@dataclass(frozen=True)
class Score(Criterion):
    """A number for each weight, summed over a unit's. by_weight_alone: it depends on nothing but the weight."""

    function: Callable[[Tensor, LinearStatistics], Tensor]
    by_weight_alone: bool = False


SCORES = {
    "magnitude": Score(magnitude, by_weight_alone=True),
    "l1": Score(magnitude, by_weight_alone=True),
    "l2": Score(square, by_weight_alone=True),
    "random": Score(random),
    "wanda": Score(wanda, needs=frozenset({"input_norm"}), output_only=True),
    "moe_pruner": Score(moe_pruner, needs=frozenset({"gated_norm"}), output_only=True),
    "ria": Score(ria, needs=frozenset({"input_norm"}), output_only=True),
    "wifv": Score(wifv, needs=frozenset({"variance"}), output_only=True),
    "taylor": Score(taylor, needs=frozenset({"saliency"})),
    "taylor2": Score(taylor2, needs=frozenset({"saliency2"})),
}
OF_WEIGHTS = ("magnitude", "random", "wanda", "moe_pruner", "ria", "taylor", "taylor2", "wifv")
OF_HIDDEN = ("minitron", "random")  # of channels of the hidden size (hidden.py)
OF_UNITS: dict[str, Criterion] = {
    **{name: SCORES[name] for name in ("l2", "l1", "random", "wanda", "ria", "taylor", "taylor2", "wifv")},
    "obs": Criterion(needs=frozenset({"gram"}), output_only=True),
}
