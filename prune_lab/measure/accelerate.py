"""measure.accelerate: how models are made ready before they are timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from prune_lab.errors import Refused

if TYPE_CHECKING:
    from prune_lab.measure.inference import Inference
    from prune_lab.system.device import Device

CHOICES = ("none", "cuda_graphs", "compile")
# Each model of a pair, stage and length is one more compilation of the same code of its family.
_COMPILATIONS = 64


def check_acceleration(how: str, device: Device) -> None:
    """Raises Refused where the device is not one that `how` is meant for."""
    if how != "none" and not device.is_cuda:
        why = "there are none on" if how == "cuda_graphs" else "it would time what this machine's C++ compiler made on"
        raise Refused(
            f"measure.accelerate={how!r} is for GPUs: {why} {device.torch_device}; use measure.accelerate=none or "
            "device=cuda"
        )


@contextmanager
def accelerator(how: str, backend: str = "inductor") -> Iterator[Callable[[Any], Inference]]:
    """Preparation of a model for timing: none, CUDA graphs (replayed.py), or torch.compile.

    Capturing and compiling happen in the first calls, so in the warm-up pairs. A model that would silently run
    uncompiled, because it was compiled too often, raises instead. Nothing compiled outlives the context: each prompt's
    shape starts anew, or later ones would get more general, slower code than the first.
    """
    from prune_lab.measure.inference import Inference

    if how == "none":
        yield Inference
        return
    if how == "cuda_graphs":
        from prune_lab.measure.replayed import Replayed

        yield Replayed
        return
    import torch._dynamo.config

    torch._dynamo.reset()
    try:
        with torch._dynamo.config.patch(recompile_limit=_COMPILATIONS, fail_on_recompile_limit_hit=True):
            yield lambda model: Inference(torch.compile(model, backend=backend))
    finally:
        torch._dynamo.reset()
