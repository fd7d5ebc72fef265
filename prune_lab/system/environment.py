"""Environment of a run: hardware and versions."""

from __future__ import annotations

import platform
import subprocess
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import prune_lab
from prune_lab.system import launch
from prune_lab.system.device import Device

_PACKAGES = ("transformers", "tokenizers", "safetensors", "datasets", "hydra-core", "mlflow", "lm-eval")
_CLOCKS = ("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem")  # as nvidia-smi names them


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
        "sharded": launch.is_sharded(),
        "gpu": torch.cuda.get_device_name(device.torch_device) if device.is_cuda else None,
        "cuda": torch.version.cuda if device.is_cuda else None,
        "gpu_clocks_mhz": gpu_clocks(_uuid(device)) if device.is_cuda else None,
    }


def gpu_clocks(uuid: str, command: str = "nvidia-smi") -> dict[str, int] | None:
    """Clocks of the GPU with this UUID in MHz, now and at most; None where `command` cannot say.

    They are read before anything is timed, from an idle GPU. A clock below its maximum is no fault then; a lower
    maximum is what tells two machines apart.
    """
    query = [command, f"--id={uuid}", f"--query-gpu={','.join(_CLOCKS)}", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout
        values = [int(value) for value in said.strip().split(",")]
        return dict(zip(_CLOCKS, values, strict=True))
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def _uuid(device: Device) -> str:
    """Identifier of the GPU for nvidia-smi, whose numbers are not CUDA's where CUDA_VISIBLE_DEVICES hides some."""
    return f"GPU-{torch.cuda.get_device_properties(device.torch_device).uuid}"


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
