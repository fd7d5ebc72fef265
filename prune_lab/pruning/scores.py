"""What single weights are worth: pure functions of a weight (out, in) and of what calibration saw at its Linear.

A unit (an MLP channel, a KV group) is worth the sum over its weights, so every score serves single weights and
structures alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from prune_lab.pruning.seen import Seen

_SMALLEST = 2.0**-126  # normal number in float32


def magnitude(weight: Tensor, seen: Seen) -> Tensor:
    """|W|, in the weight's own number type (Han et al., 1506.02626)."""
    return weight.abs()


def square(weight: Tensor, seen: Seen) -> Tensor:
    """W^2, float32: its sum over a unit ranks as the unit's L2 norm (Li et al., 1608.08710)."""
    return weight.float().square()


def random(weight: Tensor, seen: Seen) -> Tensor:
    """Uniform in [0, 1), drawn on the CPU so that every device prunes the same weights."""
    import torch

    return torch.rand(weight.shape, generator=seen.random).to(weight.device)


def wanda(weight: Tensor, seen: Seen) -> Tensor:
    """|W_ij| * ||X_j||, float32 (Sun et al., 2306.11695)."""
    assert seen.input_norm is not None
    return weight.float().abs() * seen.input_norm


def ria(weight: Tensor, seen: Seen) -> Tensor:
    """(|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|) * ||X_j||^0.5, float32 (RIA: Zhang et al., ICLR 2024)."""
    assert seen.input_norm is not None
    size = weight.float().abs()
    # In a row or column of zeros every share is zero, not undefined.
    columns, rows = (size.sum(dim, keepdim=True).clamp(min=_SMALLEST) for dim in (0, 1))
    share = size / columns + size / rows
    return share * seen.input_norm.sqrt()


def taylor(weight: Tensor, seen: Seen) -> Tensor:
    """|w * g|, averaged over windows (Molchanov et al., 1611.06440; LLM-Pruner, 2305.11627)."""
    assert seen.saliency is not None
    return seen.saliency


def taylor2(weight: Tensor, seen: Seen) -> Tensor:
    """w^2 * F with F the mean squared gradient of a window (LLM-Pruner, 2305.11627)."""
    assert seen.saliency2 is not None
    return seen.saliency2


def wifv(weight: Tensor, seen: Seen) -> Tensor:
    """W_ij^2 * variance of x_j, float32: weighted input feature variance (FLAP: An et al., 2312.11983)."""
    assert seen.variance is not None
    return weight.float().square() * seen.variance


@dataclass(frozen=True)
class Score:
    """A score, what it needs calibration to observe, and which Linears of a unit it is summed over.

    output_only: only the Linear that reads the unit (an MLP's down projection, attention's output projection). Scores
    by activations are: there the activation is the unit's own. by_weight_alone: it is the same for the same weight.
    """

    function: Callable[[Tensor, Seen], Tensor]
    needs: frozenset[str] = frozenset()
    output_only: bool = False
    by_weight_alone: bool = False


SCORES = {
    "magnitude": Score(magnitude, by_weight_alone=True),
    "l1": Score(magnitude, by_weight_alone=True),
    "l2": Score(square, by_weight_alone=True),
    "random": Score(random),
    "wanda": Score(wanda, frozenset({"input_norm"}), output_only=True),
    "ria": Score(ria, frozenset({"input_norm"}), output_only=True),
    "wifv": Score(wifv, frozenset({"variance"}), output_only=True),
    "taylor": Score(taylor, frozenset({"saliency"})),
    "taylor2": Score(taylor2, frozenset({"saliency2"})),
}
OF_WEIGHTS = ("magnitude", "random", "wanda", "ria", "taylor", "taylor2", "wifv")
OF_UNITS = ("l2", "l1", "random", "wanda", "ria", "taylor", "taylor2", "wifv")
