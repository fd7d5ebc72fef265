"""Processes that compress one model together: started by `accelerate launch -m prune_lab ...` or by torchrun.

What is computed from many windows of text is shared out: each process takes its windows, and what it found is added up
or put together in their order. Every process then has the same figures, from which it computes the same model.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
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
PATIENCE_WITH_FAILURES = timedelta(seconds=20)
_NOT_BUILT = {  # what accelerate's FSDP may be asked for beside sharding, and what there is in its place
    "FSDP_OFFLOAD_PARAMS": "the shards stay on their device",
    "FSDP_ACTIVATION_CHECKPOINTING": "use recovery.gradient_checkpointing=true",
}


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of a number


@dataclass(frozen=True)
class World:
    """This process among `size`: each takes its share of every batch of a training, and of the windows (data parallel).

    sharded: each has a part of the model while it trains (FSDP), in place of a copy. What the processes do together
    (`sum`, `gather`, `all`, `average`, `from_main`) every one of them must call, in the same order.
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

    def over(self, count: int) -> World:
        """The processes among which `count` windows are shared out: this one alone where they are fewer than those.

        Then each process takes all windows, and nothing is added up.
        """
        return self if self.size <= count else World()

    def part(self, windows: Tensor) -> Tensor:
        """This process's windows of all, in their order: numbers of them that differ by one at most."""
        return windows.tensor_split(self.size)[self.rank]

    def sum(self, tensors: Iterable[Tensor]) -> None:
        """Replaces tensors, of equal shapes in every process, by their sum over the processes; one after the other.

        The sum has the same bits in every process.
        """
        if self.size == 1:
            return
        for tensor in tensors:
            placed = _placed(tensor.contiguous())
            dist.all_reduce(placed)
            if placed is not tensor:
                tensor.copy_(placed)

    def gather(self, part: Tensor) -> Tensor:
        """The parts of all processes, one after the other along the first dimension, in which alone they may differ."""
        if self.size == 1:
            return part
        counts = torch.zeros(self.size, dtype=torch.int64)
        counts[self.rank] = len(part)
        self.sum([counts])
        padded = part.new_zeros(int(counts.max()), *part.shape[1:])
        padded[: len(part)] = part
        placed = _placed(padded)
        parts = [torch.empty_like(placed) for _ in range(self.size)]
        dist.all_gather(parts, placed)
        return torch.cat([found[:count] for found, count in zip(parts, counts.tolist(), strict=True)]).to(part.device)

    def all(self, value: bool) -> bool:
        """True where it is true in every process."""
        missing = torch.tensor([not value], dtype=torch.int64)
        self.sum([missing])
        return not missing.item()

    def has_same(self, tensors: Iterable[Tensor]) -> bool:
        """True where tensors have the same bits in every process, by the sums of their rows and of their columns."""
        if self.size == 1:
            return True
        digest = hashlib.sha256()
        for tensor in tensors:
            rows = tensor.detach().reshape(-1, tensor.shape[-1] if tensor.numel() and tensor.dim() else 1)
            bits = rows.contiguous().view(_BITS[tensor.element_size()])
            for dim in (0, 1):
                digest.update(bits.sum(dim, dtype=torch.int64).cpu().numpy().tobytes())
        mine = digest.hexdigest()
        return self.all(mine == self.from_main(mine))

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


def failed_alike(job: str) -> bool:
    """True where all processes have failed in this job of a sweep, or none has met the others yet: the next can begin.

    Those that have failed wait for the others some seconds. Where one has not, it may be waiting in the middle of the
    job, for ever, and nccl may have begun what it waits for. Processes that have not met compare their jobs when they
    do (`runner.run`).
    """
    if not dist.is_initialized():
        return True
    if dist.get_backend() == "nccl":
        return False
    store, size = dist.distributed_c10d._get_default_store(), launch.size()
    store.set(f"prune_lab/failed/{job}/{launch.rank()}", "")
    try:
        store.wait([f"prune_lab/failed/{job}/{rank}" for rank in range(size)], PATIENCE_WITH_FAILURES)
    except RuntimeError:  # some have not, or are gone
        return False
    return True


def _placed(tensor: Tensor) -> Tensor:
    """A tensor where the processes can exchange it: nccl moves those of GPUs alone."""
    return tensor.cuda() if dist.get_backend() == "nccl" else tensor


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
