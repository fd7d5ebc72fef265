"""Gram matrices of calibration inputs, X^T X: damping, and the Cholesky factor that SparseGPT and refits use."""

from __future__ import annotations

import torch
from torch import Tensor

from prune_lab.errors import Refused

DAMPING = 0.01  # of the mean of the gram's diagonal
LARGEST_DAMPING = 1e4


def centred(gram: Tensor, mean: Tensor, tokens: int) -> Tensor:
    """X^T X of the inputs less their mean (in,), from that of the inputs and the number of tokens."""
    return gram - tokens * torch.outer(mean, mean)


def damped_cholesky(matrix: Tensor, mean: Tensor, damping: float) -> tuple[Tensor, float]:
    """Lower Cholesky factor of a matrix plus `damping` times `mean` on its diagonal, and the damping that was used.

    Damping grows tenfold until the factor exists; raises Refused where it never does.
    """
    used = damping
    while used <= LARGEST_DAMPING:
        damped = matrix.clone()
        damped.diagonal().add_(used * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed and lower.isfinite().all():
            return lower, used
        used = 10 * used or DAMPING
    raise Refused(
        f"the gram matrix of a Linear's inputs has no Cholesky factor even with damping {LARGEST_DAMPING:g} of its "
        "mean diagonal: the activations are not finite; give dtype=float32"
    )
