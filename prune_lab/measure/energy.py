"""Energy of inference by the machine's own counters: RAPL of the CPU packages, NVML of an NVIDIA GPU.

A counter counts everything that its package or GPU does, other processes and idling included, and nothing outside it:
RAPL's packages leave out memory modules, fans and power supply; a GPU's counter leaves out the CPU that drives it.
Where there is no counter that can be read there is no figure: nothing is estimated from a nominal power.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prune_lab.measure.accelerate import accelerator
from prune_lab.measure.inference import Inference
from prune_lab.measure.settings import Measure
from prune_lab.system.device import Device

POWERCAP = Path("/sys/class/powercap")
Counter = Callable[[], float]  # joules since some moment in the past; to be called again before it wraps twice


class _CounterError(Exception):
    """A counter that cannot be read, now or any more."""


@dataclass(frozen=True)
class Energy:
    """Joules per decoded token, its share of the prefill included, by the whole package or GPU."""

    dense: float
    compressed: float


def measure_energy(
    dense: Any, compressed: Any, prompt: Tensor, settings: Measure, device: Device, powercap: Path = POWERCAP
) -> Energy | None:
    """Energy of `pairs` times two prefills of `prompt`, shape (1, tokens), each with `decode_tokens` tokens decoded.

    The models run in blocks of `pairs` repeats, dense, compressed, compressed, dense: long enough for counters that
    move a few times a second, and alike in a machine that gets warmer. None where no counter can be read.
    """
    prompt = prompt.to(device.torch_device)
    joules = {"dense": 0.0, "compressed": 0.0}
    try:
        counter = _nvml(device) if device.is_cuda else _rapl(powercap)
        if counter is None:
            return None
        with accelerator(settings.accelerate) as ready:
            models = {"dense": ready(dense), "compressed": ready(compressed)}
            for model in models.values():  # to warm up
                _repeat(model, prompt, settings, settings.warmup, counter, device)
            for name in ("dense", "compressed", "compressed", "dense"):
                joules[name] += _repeat(models[name], prompt, settings, settings.pairs, counter, device)
    except _CounterError:
        return None
    tokens = 2 * settings.pairs * settings.decode_tokens
    return Energy(joules["dense"] / tokens, joules["compressed"] / tokens)


def _repeat(model: Inference, prompt: Tensor, settings: Measure, times: int, counter: Counter, device: Device) -> float:
    """Joules of `times` prefills and decodes; the counter is read after each, so that none of its turns is missed."""
    device.synchronize()
    began = ended = counter()
    for _ in range(times):
        model.decode(model.prefill(prompt), settings.decode_tokens)
        device.synchronize()
        ended = counter()
    return ended - began


class _Package:
    """One RAPL domain: a folder with energy_uj, a counter that begins again at 0 after max_energy_range_uj."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "energy_uj"
        self._range = _number(folder / "max_energy_range_uj")
        self._last, self._sum = _number(self._file), 0

    def joules(self) -> float:
        """Joules since this object was made."""
        now = _number(self._file)
        self._sum += now - self._last + (self._range if now < self._last else 0)
        self._last = now
        return self._sum / 1e6


def _rapl(powercap: Path) -> Counter | None:
    """All CPU packages together, or None without any; raises _CounterError where one cannot be read.

    Only domains named package-N: cores and memory are parts of one or come beside it, psys holds them all.
    """
    folders = sorted(powercap.glob("intel-rapl:*"))  # the name is the same on AMD
    packages = [_Package(folder) for folder in folders if _text(folder / "name").startswith("package-")]
    return (lambda: sum(package.joules() for package in packages)) if packages else None


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise _CounterError(str(file)) from error


def _number(file: Path) -> int:
    try:
        return int(_text(file))
    except ValueError as error:
        raise _CounterError(str(file)) from error


def _nvml(device: Device) -> Counter | None:
    """The GPU's own counter (Volta or later), or None without pynvml (extra `energy`)."""
    try:
        import pynvml
    except ImportError:
        return None

    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device.torch_device).uuid}")
    except pynvml.NVMLError:
        return None

    def joules() -> float:
        try:
            return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3  # it counts millijoules
        except pynvml.NVMLError as error:  # before Volta there is no counter
            raise _CounterError("NVML") from error

    return joules
