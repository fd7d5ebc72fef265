"""What a run ran on."""

from __future__ import annotations

import platform
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import prune_lab
from prune_lab import launch
from prune_lab.device import Device

_PACKAGES = ("transformers", "tokenizers", "safetensors", "datasets", "hydra-core", "mlflow", "lm-eval")


def describe_environment(device: Device) -> dict[str, Any]:
    """Versions and hardware, as plain values."""
    return {
        "prune_lab": prune_lab.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: _version(name) for name in _PACKAGES},
        "platform": f"{sys.platform}-{platform.machine()}",
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "processes": launch.size(),
        "gpu": torch.cuda.get_device_name(device.torch_device) if device.is_cuda else None,
        "cuda": torch.version.cuda if device.is_cuda else None,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@cache
def _cpu_name() -> str:
    """The processor's name, or "unknown": never a guess."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        return names[0] if names else "unknown"
    return platform.processor() or "unknown"
