"""Bringing the tensors of the next block while the present one is at work."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

Read = Callable[[], dict[str, Tensor]]


class Prefetch:
    """Reads a block's tensors in a thread of its own and puts them on the device.

    On a GPU by way of pinned memory and a stream of its own, so that the copy runs beside what the device computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._thread = ThreadPoolExecutor(1)
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._coming: tuple[str, Future[dict[str, Tensor]]] | None = None

    def start(self, block: str, read: Read) -> None:
        """Begins to bring what `read` gives, to be taken under the name of its block."""
        self._coming = block, self._thread.submit(self._bring, read)

    def take(self, block: str, read: Read) -> dict[str, Tensor]:
        """The tensors of a block: those that are coming, else brought now."""
        coming, self._coming = self._coming, None
        if coming is not None and coming[0] == block:
            tensors = coming[1].result()
        else:
            tensors = self._thread.submit(self._bring, read).result()  # after what is still coming of another block
        if self._stream is not None:
            present = torch.cuda.current_stream(self._device)
            present.wait_stream(self._stream)
            for tensor in tensors.values():
                tensor.record_stream(present)  # its memory is free again when this stream is done with it
        return tensors

    def _bring(self, read: Read) -> dict[str, Tensor]:
        tensors = read()
        if self._stream is None:
            return tensors
        with torch.cuda.stream(self._stream):
            pinned = {name: tensor.pin_memory() for name, tensor in tensors.items()}
            moved = {name: tensor.to(self._device, non_blocking=True) for name, tensor in pinned.items()}
        self._stream.synchronize()  # this thread waits, not the device: the pinned memory is free from here on
        return moved
