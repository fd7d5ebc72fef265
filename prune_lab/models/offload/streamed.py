"""model.stream=true: a model built without its blocks' weights, which stay in the safetensors they came in."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from prune_lab.errors import Refused
from prune_lab.models.checkpoint import Checkpoint
from prune_lab.models.families import family_of
from prune_lab.models.formats import format_of
from prune_lab.models.offload.on_disk import DiskWeights, stored_tensors
from prune_lab.models.rebuild import weights_on_meta
from prune_lab.models.shards import Shards
from prune_lab.system.device import Device

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc


def check(folder: Path, config: Any, name: str) -> None:
    """Raises Refused where weights are not dense; `name` is what a person calls the folder."""
    if (reason := format_of(folder, config).not_streamed) is not None:
        raise Refused(f"model.name={name!r} {reason}: model.stream=true reads dense weights only")


def build(folder: Path, config: Any, checkpoint: Checkpoint, device: Device) -> Any:
    """The model of a folder in the Hub's layout, its blocks' weights on disk."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    _give_freed_memory_back()
    with weights_on_meta():
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False, dtype=device.dtype)
    model.tie_weights()
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    path = family_of(config.model_type).blocks
    source = Shards(checkpoint.places)
    for key, tensor in stored_tensors(model).items():
        if not key.startswith(f"{path}.") or not tensor.is_meta:
            _put(model, key, source.read(key).to(device.torch_device, device.dtype))
    model.tie_weights()
    for module in model.modules():
        for key, buffer in module._buffers.items():
            module._buffers[key] = None if buffer is None else buffer.to(device.torch_device)
    blocks = [f"{path}.{index}" for index in range(len(model.get_submodule(path)))]
    DiskWeights(source, blocks, device).attach(model)
    return model


def _give_freed_memory_back() -> None:
    """Has glibc return freed blocks to the system at once: by default it keeps those of up to 32 MiB for later.

    For the rest of the process. Seen with blocks of 122 MB: 90 MB less held after loading. Other C libraries have no
    mallopt, or ignore it.
    """
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 2**20)
        libc.mallopt(M_TRIM_THRESHOLD, 2**20)
    except (AttributeError, OSError, TypeError):
        return


def _put(model: Any, name: str, tensor: Tensor) -> None:
    owner, _, last = name.rpartition(".")
    module = model.get_submodule(owner)
    if last in module._parameters:
        module._parameters[last] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[last] = tensor
