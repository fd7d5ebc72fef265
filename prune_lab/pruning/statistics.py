"""What is gathered about the inputs of a Linear while calibration text passes: running sums in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from prune_lab.pruning.seen import Seen

# Columns of a gram matrix that are computed at once, from the diagonal on (the rest is their mirror); and on a GPU.
PANEL, PANEL_ON_GPU = 256, 1024
IN_CACHE = 2**19  # numbers
# Products of bfloat16 or float16 numbers are exact in float32, in which a GPU's tensor cores add them up.
_ADDS_IN_FLOAT32 = "dtype" in torch.ops.aten.mm.overloads()  # from PyTorch 2.8 on


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
        with torch.autocast(rows.device.type, enabled=False):
            if "input_norm" in self._needs:
                squares = _squares(rows)
                self._squares = squares if self._squares is None else self._squares + squares
            if "variance" in self._needs:
                self._add_moments(rows.float())
            if "gram" in self._needs:
                self._add_gram(rows)
        self._tokens += len(rows)

    def _add_gram(self, rows: Tensor) -> None:
        width = rows.shape[1]
        if self._gram is None:
            self._gram = torch.zeros(width, width, dtype=torch.float32, device=rows.device)
        panel = PANEL_ON_GPU if rows.is_cuda else PANEL
        narrow = rows.is_cuda and _ADDS_IN_FLOAT32 and rows.dtype in (torch.bfloat16, torch.float16)
        rows = rows if narrow else rows.float()
        for first in range(0, width, panel):
            left, right = rows[:, first : first + panel].T, rows[:, first:]
            if narrow:
                self._gram[first : first + panel, first:] += torch.mm(left, right, out_dtype=torch.float32)
            else:
                self._gram[first : first + panel, first:].addmm_(left, right)

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


def _squares(rows: Tensor) -> Tensor:
    """The sum of each column's squares, float32."""
    if rows.is_cuda:  # in one pass over them, as they are
        return torch.linalg.vector_norm(rows, dim=0, dtype=torch.float32).square()
    if rows.dtype == torch.float32:
        return rows.square().sum(0)
    # In parts that stay in the processor's cache: ten times as fast as a float32 copy of all.
    parts = rows.split(max(1, IN_CACHE // rows.shape[1]))
    return torch.stack([part.float().square_().sum(0) for part in parts]).sum(0)
