"""Gram matrices of calibration inputs, X^T X: products, damping, and the Cholesky factor of SparseGPT and refits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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


@contextmanager
def multiplying_in_bfloat16(wanted: bool = True) -> Iterator[None]:
    """Context in which float32 products on a CPU with AMX take their factors as bfloat16.

    They are added up in float32, in which products of bfloat16 numbers are exact: of factors that were bfloat16 nothing
    is lost. On a CPU that has avx512_bf16 alone, PyTorch 2.13 multiplies in float32 all the same. wanted: False changes
    nothing.
    """
    if not wanted or not hasattr(torch.backends.mkldnn, "matmul"):  # before PyTorch 2.9
        yield
        return
    settings: Any = torch.backends.mkldnn.matmul
    before, settings.fp32_precision = settings.fp32_precision, "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before
