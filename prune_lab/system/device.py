"""Devices: the device of a run, its number type, seeds, and synchronisation."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from prune_lab.errors import Refused
from prune_lab.system import launch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Device:
    """A device and the number type of the weights on it, both decided."""

    torch_device: torch.device
    dtype: torch.dtype

    @property
    def dtype_name(self) -> str:
        """float32, bfloat16 or float16."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def name(self) -> str:
        """Name of the device for people."""
        return torch.cuda.get_device_name(self.torch_device) if self.is_cuda else "a CPU"

    @property
    def is_cuda(self) -> bool:
        """True for a GPU."""
        return self.torch_device.type == "cuda"

    @property
    def compute_capability(self) -> tuple[int, int]:
        """Compute capability of a GPU; (0, 0) for other devices."""
        return torch.cuda.get_device_capability(self.torch_device) if self.is_cuda else (0, 0)

    def synchronize(self) -> None:
        """Waits until the device has done what was asked of it."""
        if self.is_cuda:
            torch.cuda.synchronize(self.torch_device)


def resolve(device: str, dtype: str) -> Device:
    """The device and number type that the keys `device` and `dtype` name; raises Refused.

    A GPU has its number, and is from here on PyTorch's current one, by whose stream the timing goes, and nccl and FSDP.
    """
    name = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = numbered(torch.device(name))
    except RuntimeError:
        place = None
    if place is None or place.type not in ("cpu", "cuda"):
        raise Refused(f"device={device!r} is not one of auto, cpu, cuda, cuda:N")
    if place.type == "cuda":
        if place.index >= (count := torch.cuda.device_count()):
            raise Refused(f"device={device!r}: this machine has {count} CUDA devices; use device=auto")
        torch.cuda.set_device(place)
    return Device(place, _resolve_dtype(dtype, place))


def numbered(place: torch.device) -> torch.device:
    """The device with its number: a GPU that has none is the first one, or of several processes each has its own."""
    if place.type != "cuda" or place.index is not None:
        return place
    return torch.device("cuda", launch.local_rank() if launch.size() > 1 else 0)


def _resolve_dtype(dtype: str, place: torch.device) -> torch.dtype:
    if dtype == "auto":
        if place.type == "cpu":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if dtype not in DTYPES:
        raise Refused(f"dtype={dtype!r} is not one of auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def native_bfloat16(place: torch.device) -> bool:
    """True where the device multiplies bfloat16 matrices in hardware."""
    if place.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def uses_bfloat16(autocast: str, place: torch.device) -> bool:
    """True where a setting of a key `autocast` has the device multiply in bfloat16; "auto": where that is native."""
    return native_bfloat16(place) if autocast == "auto" else autocast == "bfloat16"


def seed_all(seed: int) -> None:
    """Seeds every generator a run could draw from."""
    random.seed(seed)
    torch.manual_seed(seed)
