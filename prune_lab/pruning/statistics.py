"""What is gathered about the inputs of a Linear while calibration text passes: running sums in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from prune_lab.pruning.seen import Seen

PANEL = 256  # columns of a gram matrix that are computed at once, from the diagonal on: the rest is their mirror


@contextmanager
def _tf32(wanted: bool) -> Iterator[None]:
    """Within it, if wanted, a GPU multiplies float32 matrices in TF32, on its tensor cores, and adds in float32.

    TF32 holds every bit of a number that was bfloat16 or float16: the products are exact.
    """
    before = torch.get_float32_matmul_precision()
    if wanted:
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        if wanted:
            torch.set_float32_matmul_precision(before)


class InputStatistics:
    """Running statistics of one input, float32, fed with rows of activations; only what `needs` names is kept."""

    def __init__(self, needs: frozenset[str]) -> None:
        self._needs = needs
        self._tokens = 0
        self._squares: Tensor | None = None
        self._mean: Tensor | None = None
        self._deviations: Tensor | None = None  # sum of squared distances from the mean
        self._gram: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        """Takes in activations of shape (tokens, in)."""
        narrow, rows = rows.dtype in (torch.bfloat16, torch.float16), rows.float()
        with torch.autocast(rows.device.type, enabled=False):
            if "input_norm" in self._needs:
                squares = rows.square().sum(0)
                self._squares = squares if self._squares is None else self._squares + squares
            if "variance" in self._needs:
                self._add_moments(rows)
            if "gram" in self._needs:
                with _tf32(narrow and rows.is_cuda):
                    self._add_gram(rows)
        self._tokens += len(rows)

    def _add_gram(self, rows: Tensor) -> None:
        if self._gram is None:
            self._gram = rows.new_zeros(rows.shape[1], rows.shape[1])
        for first in range(0, rows.shape[1], PANEL):
            panel = rows[:, first : first + PANEL]
            self._gram[first : first + PANEL, first:].addmm_(panel.T, rows[:, first:])

    def _add_moments(self, rows: Tensor) -> None:
        """Welford's update, a batch at a time (Chan, Golub & LeVeque, 1979)."""
        mean = rows.mean(0)
        deviations = (rows - mean).square().sum(0)
        if self._mean is None or self._deviations is None:
            self._mean, self._deviations = mean, deviations
            return
        n, more = self._tokens, len(rows)
        apart = mean - self._mean
        self._deviations = self._deviations + deviations + apart.square() * (n * more / (n + more))
        self._mean = self._mean + apart * (more / (n + more))

    def seen(self) -> Seen:
        """What was gathered."""
        return Seen(
            input_norm=None if self._squares is None else self._squares.sqrt(),
            mean=self._mean,
            variance=None if self._deviations is None else self._deviations / max(1, self._tokens - 1),
            gram=None if self._gram is None else self._gram.triu() + self._gram.triu(1).T,
        )
