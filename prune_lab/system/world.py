"""Processes that train one model together: started by `accelerate launch -m prune_lab ...` or by torchrun."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from prune_lab.errors import Refused
from prune_lab.system import launch
from prune_lab.system.device import Device

T = TypeVar("T")
PATIENCE = timedelta(hours=12)  # the others wait while the first one measures
_NOT_BUILT = {  # what accelerate's FSDP may be asked for beside sharding, and what there is in its place
    "FSDP_OFFLOAD_PARAMS": "the shards stay on their device",
    "FSDP_ACTIVATION_CHECKPOINTING": "use recovery.gradient_checkpointing=true",
}


@dataclass(frozen=True)
class World:
    """This process among `size`: each takes its share of every batch (data parallel).

    sharded: each has a part of the model while it trains (FSDP), in place of a copy.
    """

    rank: int = 0
    size: int = 1
    sharded: bool = False

    @property
    def is_main(self) -> bool:
        """True in the process that measures, tracks and writes."""
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


def join(device: Device) -> World:
    """Meets the other processes, once; nccl on GPUs, gloo on CPUs. Raises Refused for a way to shard that is not built.

    Of accelerate's settings of FSDP only whether to shard is followed: weights and their optimizer state are sharded
    over all processes, and a block's weights are put together for its forward and its backward pass.
    """
    for name, instead in _NOT_BUILT.items():
        if launch.is_sharded() and os.environ.get(name, "").lower() in ("1", "true"):
            raise Refused(f"{name}=true is not built: {instead}")
    os.environ.pop("FSDP_CPU_RAM_EFFICIENT_LOADING", None)  # transformers would load no weights but in one process
    if launch.size() > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.is_cuda else "gloo", timeout=PATIENCE)
    return World(launch.rank(), launch.size(), launch.is_sharded())
