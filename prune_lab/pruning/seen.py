"""What a score may go by beside the weight: its names, and the record that holds it for one Linear."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from prune_lab.pruning.thresholds import Counts

NEEDS = ("input_norm", "variance", "gram")  # of a Linear's inputs: prune_lab/pruning/statistics.py
GRADIENTS = ("saliency", "saliency2")  # of the whole model's loss: prune_lab/pruning/gradients.py


def _no_generator() -> torch.Generator:
    import torch

    return torch.Generator()


@dataclass(frozen=True)
class Seen:
    """What a score may go by beside the weight (out, in); a field that was not asked for is None.

    input_norm: L2 norm of each input over all tokens, (in,). mean, variance: of each input over all tokens, (in,),
    the variance unbiased. gram: X^T X over all tokens, (in, in). saliency: mean over windows of |w * gradient|,
    saliency2: of (w * gradient)^2, both (out, in). random: the run's generator, for scores that draw. counts: of
    scores that go by the weight alone, for all amounts.
    """

    input_norm: Tensor | None = None
    mean: Tensor | None = None
    variance: Tensor | None = None
    gram: Tensor | None = None
    saliency: Tensor | None = None
    saliency2: Tensor | None = None
    random: torch.Generator = field(default_factory=_no_generator)
    counts: Counts | None = None
