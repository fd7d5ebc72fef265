"""The order in which training reads its text: a function of the step alone, so that resuming needs no state."""

from __future__ import annotations

import torch
from torch import Tensor


class WindowOrder:
    """Batches of windows of a token stream.

    Each pass over the text cuts it at another offset and shuffles the windows, both drawn from (seed, pass), so
    that no two passes see the same windows.
    """

    def __init__(self, stream: Tensor, seq_len: int, batch_size: int, seed: int) -> None:
        self._stream, self._seq_len, self._batch_size, self._seed = stream, seq_len, batch_size, seed
        self.windows_per_pass = max(1, (len(stream) - seq_len + 1) // seq_len)
        self._pass = -1
        self._starts = torch.empty(0, dtype=torch.int64)

    def batch(self, step: int) -> Tensor:
        """The batch of a step, shape (batch_size, seq_len), int64."""
        first = step * self._batch_size
        return torch.stack([self._window(number) for number in range(first, first + self._batch_size)]).long()

    def _window(self, number: int) -> Tensor:
        of_pass, index = divmod(number, self.windows_per_pass)
        if of_pass != self._pass:
            generator = torch.Generator().manual_seed((self._seed * 1_000_003 + of_pass) % 2**63)
            slack = len(self._stream) - self.windows_per_pass * self._seq_len
            offset = int(torch.randint(slack + 1, (1,), generator=generator))
            order = torch.randperm(self.windows_per_pass, generator=generator)
            self._starts, self._pass = offset + order * self._seq_len, of_pass
        start = int(self._starts[index])
        return self._stream[start : start + self._seq_len]
