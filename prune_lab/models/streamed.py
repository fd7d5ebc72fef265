"""model.stream=true: a model built without its blocks' weights, which stay in the safetensors they came in."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from prune_lab.errors import Refused
from prune_lab.models.anatomy import family_of
from prune_lab.models.on_disk import DiskWeights, stored_tensors
from prune_lab.models.shards import Shards, open_shards
from prune_lab.system.device import Device

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc


def build(folder: Path, config: Any, device: Device, name: str) -> Any:
    """The model of a folder in the Hub's layout, its blocks' weights on disk. Raises Refused where it cannot be.

    `name` is what a person calls the folder.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    if getattr(config, "quantization_config", None) is not None:
        raise Refused(f"model.name={name!r} has its weights in few bits: model.stream=true reads dense weights only")
    _give_freed_memory_back()
    with _weights_on_meta():
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False, dtype=device.dtype)
    model.tie_weights()
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    path = family_of(config.model_type).blocks
    source = _places(model, open_shards(folder), name)
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


@contextmanager
def _weights_on_meta() -> Iterator[None]:
    """Within it modules are made without memory for their parameters; buffers, which no file holds, are computed."""

    def move(module: nn.Module, name: str, parameter: nn.Parameter | None) -> Any:
        if parameter is None or parameter.is_meta:
            return None
        return nn.Parameter(parameter.to("meta"), requires_grad=False)

    hook = register_module_parameter_registration_hook(move)
    try:
        yield
    finally:
        hook.remove()


def _places(model: Any, stored: Shards, name: str) -> Shards:
    """Where each tensor of the model is stored; checkpoints may leave out the base model's prefix of its name."""
    wanted, prefix = stored_tensors(model), f"{model.base_model_prefix}."
    found = {}
    for key, tensor in wanted.items():
        place = stored.spans.get(key) or stored.spans.get(key.removeprefix(prefix))
        if place is None:
            raise Refused(
                f"model.name={name!r} has no {key} of its own: model.stream=true reads each tensor by the name that "
                "the model has for it; load the model with stock transformers and save it anew, or give "
                "model.stream=false"
            )
        if place.shape != tuple(tensor.shape) or not place.dtype.is_floating_point:
            raise Refused(
                f"model.name={name!r}: {key} is stored as {place.dtype} of shape {list(place.shape)}, and a float "
                f"tensor of shape {list(tensor.shape)} is needed: the weights do not belong to this config.json"
            )
        found[key] = place
    source = Shards(found)
    for key in (model.state_dict().keys() - wanted.keys()) & stored.spans.keys():
        if not torch.equal(stored.read(key), source.read(_twin(model, key))):
            raise Refused(f"model.name={name!r}: {key} differs from what config.json says it is tied to")
    return source


def _twin(model: Any, name: str) -> str:
    """The first name of the tensor that is tied to this one."""
    tensors = model.state_dict(keep_vars=True)
    return next(key for key, tensor in tensors.items() if tensor is tensors[name])


def _put(model: Any, name: str, tensor: Tensor) -> None:
    owner, _, last = name.rpartition(".")
    module = model.get_submodule(owner)
    if last in module._parameters:
        module._parameters[last] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[last] = tensor
