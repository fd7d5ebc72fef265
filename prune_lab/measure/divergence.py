"""Differences of a compressed model from the dense one at the same positions, which perplexity does not show.

Pure functions of logits, losses and answers; measure/perplexity.py runs the models.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

POSITIONS = "KL(dense || compressed) in nats at every target of the first {windows} windows"  # of the protocol
NORMAL_95 = 1.959964  # standard errors on either side of a mean that hold 95 % of a normal distribution


@dataclass(frozen=True)
class Divergence:
    """Difference of next-token distributions over positions, KL(dense || compressed) in nats.

    Each field is a metric of its name: the mean, the median and the 99th percentile of the KL divergence, and the share
    of positions at which both models find the same token likeliest.
    """

    kl: float
    kl_p50: float
    kl_p99: float
    same_top: float


def position_divergences(dense: Tensor, compressed: Tensor) -> tuple[Tensor, Tensor]:
    """KL divergence of each position (float64, nats), and whether the likeliest token is the same (bool).

    dense, compressed: logits, shape (positions, vocabulary), fp32. Of equally likely tokens the first counts. The sum
    over the vocabulary is in float64, of terms in float32. A position with logits that are NaN has a divergence of NaN
    and no likeliest token.
    """
    same = dense.argmax(-1) == compressed.argmax(-1)
    terms, other = dense.log_softmax(-1), compressed.log_softmax(-1)
    share = terms.exp()
    terms.sub_(other).mul_(share).masked_fill_(share == 0, 0)  # 0 ln 0 = 0, also where both are ln 0
    del other, share  # a vocabulary wide each, and so is the float64 copy that is summed
    kl = terms.sum(-1, dtype=torch.float64).clamp_min_(0)  # below it by rounding alone
    return kl, same & ~kl.isnan()


def divergence_of(kl: Tensor, same: Tensor) -> Divergence:
    """Divergence over positions; kl, same: shape (positions,), at least one, of `position_divergences`."""
    ordered = kl.double().sort().values  # NaN last
    mean = float(ordered.mean())
    middle, high = (math.nan if math.isnan(mean) else quantile(ordered, share) for share in (0.5, 0.99))
    return Divergence(mean, middle, high, float(same.double().mean()))


def quantile(ordered: Tensor, share: float) -> float:
    """Quantile of ascending values, shape (n,), between the two nearest in proportion; torch's own ends at 2^24."""
    place = share * (len(ordered) - 1)
    below = int(place)
    low, high = float(ordered[below]), float(ordered[min(below + 1, len(ordered) - 1)])
    return low if place == below else low + (high - low) * (place - below)


def paired_error(dense: Tensor, compressed: Tensor) -> float:
    """Standard error of the mean difference of paired values, each of any shape with n elements: s / sqrt(n).

    s is the standard deviation of the differences with n - 1 in its denominator; NaN for one pair.
    """
    differences = (compressed.double() - dense.double()).flatten()
    return float(differences.std(correction=1)) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan


def ratio_interval(dense: Tensor, compressed: Tensor) -> tuple[float, float] | None:
    """95 % interval of the ratio of perplexities, compressed / dense, from the losses of the same tokens in nats.

    exp of the mean difference of the tokens' losses -/+ 1.96 paired standard errors. None for one token.
    """
    if dense.numel() < 2:
        return None
    center, reach = float((compressed.double() - dense.double()).mean()), NORMAL_95 * paired_error(dense, compressed)
    return perplexity_of(center - reach), perplexity_of(center + reach)


def perplexity_of(loss: float) -> float:
    """exp of a loss in nats; of a diverged model infinite, never an OverflowError."""
    return math.exp(loss) if loss < 700 else math.inf


def flips(dense: str, compressed: str) -> float:
    """Share of a task's documents that one model answers rightly and the other does not (2407.09141).

    Each is a text with "1" for every document that is answered rightly, in order, and "0" for the others.
    """
    return sum(a != b for a, b in zip(dense, compressed, strict=True)) / len(dense)
