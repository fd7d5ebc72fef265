"""Processes that train one model together: started by `accelerate launch -m prune_lab ...` or by torchrun."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from prune_lab import launch

T = TypeVar("T")
PATIENCE = timedelta(hours=12)  # the others wait while the first one measures


@dataclass(frozen=True)
class World:
    """This process among `size`: each has a copy of the model and takes its share of every batch (data parallel)."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the process that measures, tracks and writes."""
        return self.rank == 0

    def share(self, batch: Tensor) -> Tensor:
        """This process's rows of a batch; shares are equal, since batch_size is a multiple of `size`."""
        return batch.chunk(self.size)[self.rank]

    def average(self, tensors: list[Tensor]) -> None:
        """Replaces tensors, of equal shapes in every process, by their mean over the processes."""
        if self.size == 1:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        flat /= self.size
        for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(mean.view_as(tensor))

    def from_main(self, value: T) -> T:
        """The value that the main process has."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]


def join(is_cuda: bool) -> World:
    """Meets the other processes, once; nccl on GPUs, gloo on CPUs."""
    if launch.size() > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if is_cuda else "gloo", timeout=PATIENCE)
    return World(launch.rank(), launch.size())
