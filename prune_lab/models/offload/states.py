"""Hidden states of many windows, in memory as far as a bound allows and in a file beyond it."""

from __future__ import annotations

import tempfile
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor

from prune_lab.cache import cache_folder
from prune_lab.models.shards import read_tensor, write_tensor

IN_MEMORY = 2**28  # bytes; more states than that go through a file in the cache folder
OF_FREE = 0.25  # of a GPU's memory that is free when the first ones come, if that is more


class StateList(Protocol):
    """A list of batches as far as streams need it."""

    def __len__(self) -> int: ...
    def __getitem__(self, number: int, /) -> Tensor: ...
    def __setitem__(self, number: int, states: Tensor, /) -> None: ...
    def append(self, states: Tensor, /) -> None:
        """Adds a batch at the end."""


class States:
    """Batches of states: the first ones in memory, up to a bound, the others in a file that goes with this object.

    What is put in the place of a batch must have its shape, type and device.
    """

    def __init__(self) -> None:
        self._batches: list[Tensor] = []  # of one in the file, its shape alone
        self._offsets: dict[int, int] = {}  # of those in the file
        self._bytes, self._bound, self._device = 0, IN_MEMORY, torch.device("cpu")
        self._file: Any = None

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, number: int) -> Tensor:
        states = self._batches[number]
        if number not in self._offsets:
            return states
        found = read_tensor(self._file, self._offsets[number], tuple(states.shape), states.dtype)
        return found.to(self._device)

    def __setitem__(self, number: int, states: Tensor) -> None:
        if number in self._offsets:
            write_tensor(self._file, self._offsets[number], states)
        else:
            self._batches[number] = states

    def append(self, states: Tensor) -> None:
        """Adds a batch at the end."""
        if states.is_cuda and not self._batches:
            self._bound = max(IN_MEMORY, int(torch.cuda.mem_get_info(states.device)[0] * OF_FREE))
        self._device = states.device
        begins, self._bytes = self._bytes, self._bytes + states.nbytes
        self._batches.append(states)
        if self._bytes <= self._bound:
            return
        if self._file is None:
            cache_folder().mkdir(parents=True, exist_ok=True)
            self._file = file = tempfile.TemporaryFile(dir=cache_folder(), buffering=0)  # noqa: SIM115 - as long as this object
            weakref.finalize(self, file.close)
        number = len(self._batches) - 1
        self._offsets[number], self._batches[number] = begins, states.to("meta")
        write_tensor(self._file, begins, states)
