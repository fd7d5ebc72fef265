"""model.stream=true: a model built without its blocks' weights, which stay in the safetensors they came in."""

from __future__ import annotations

import ctypes
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prune_lab.errors import Refused
from prune_lab.models.auto_class import auto_class, model_class
from prune_lab.models.checkpoint import Checkpoint
from prune_lab.models.families import family_of
from prune_lab.models.formats import format_of
from prune_lab.models.offload.on_disk import DiskWeights, as_parameter, weights_on_disk
from prune_lab.models.offload.stored import Converted, Stored, stored_tensors
from prune_lab.models.rebuild import become, tensors_of, weights_on_meta
from prune_lab.models.shards import Shards
from prune_lab.system.device import Device

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc


def check(folder: Path, config: Any, name: str) -> None:
    """Raises Refused where weights are not dense; `name` is what a person calls the folder."""
    if (reason := format_of(folder, config).not_streamed) is not None:
        raise Refused(f"model.name={name!r} {reason}: model.stream=true reads dense weights only")


def build(folder: Path, config: Any, checkpoint: Checkpoint, device: Device) -> Any:
    """The model of a described family of a folder in the Hub's layout, its blocks' weights on disk."""
    _give_freed_memory_back()
    model = _without_weights(folder, config, device)
    blocks, source = family_of(config.model_type).blocks, Stored(Shards(checkpoint.places), device.dtype)
    return _with_blocks_on_disk(model, blocks, source, device)


def build_other(folder: Path, config: Any, device: Device) -> tuple[Any, dict[str, Any]]:
    """The model of any other type with its blocks' weights on disk, and what transformers says of files and config.

    Where tensors are missing it is not complete. Raises Refused where its blocks cannot be told or not be read one by
    one.
    """
    _give_freed_memory_back()
    shards = format_of(folder, config).open(folder)
    empty = {name: torch.empty(span.shape, dtype=span.dtype, device="meta") for name, span in shards.spans.items()}
    made: Any = model_class(config).from_pretrained(
        None, config=config, dtype=device.dtype, state_dict=empty, output_loading_info=True, device_map={"": "meta"},
        ignore_mismatched_sizes=True,
    )  # fmt: skip
    like, report = made
    if report["missing_keys"] or report["mismatched_keys"]:
        return like, report
    model, source = _without_weights(folder, config, device), Converted(shards, like)
    take_types(model, like)
    model._weight_conversions = like._weight_conversions
    blocks = _list_of_blocks(like)
    _check_apart(like, blocks, source)
    model = _with_blocks_on_disk(model, blocks, source, device, like)
    if model.device.type == "meta":
        raise _refused(config, "its first weights are those of a block, which is not in memory")
    return model, report


def take_types(model: Any, like: Any) -> None:
    """Gives the parameters of a model, on meta, the number types that those of another one have."""
    for module, other in zip(model.modules(), like.modules(), strict=True):
        for key, parameter in other._parameters.items():
            if parameter is not None and module._parameters[key].dtype != parameter.dtype:
                module._parameters[key] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
    model.tie_weights()


class CutCopy:
    """A copy on disk that is cut block by block: `model` is what it becomes, on meta but for a block that is filled."""

    def __init__(self, before: DiskWeights, model: Any, like: Any) -> None:
        self.model, self._before, self.weights = model, before, before.for_cut(model, like)

    def put(self, block: str, cut: Collection[str]) -> None:
        """Writes tensors of the block that is filled: those that were cut, and those that were not the source's."""
        names = [f"{block}.{name}" for name, _ in self.model.get_submodule(block).named_parameters()]
        self.weights.put(self.model, [name for name in names if name in cut or self._before.was_written(name)])


@contextmanager
def cut_on_disk(model: Any, made: Any, like: Any) -> Iterator[CutCopy]:
    """Context in which a copy on disk is cut, at whose end the object `model` is the cut one.

    made, like: models of the new config without values (rebuild.skeleton), which are used up.
    """
    before = weights_on_disk(model)
    assert before is not None
    for one in (made, like):
        take_types(one, model)
        one._weight_conversions = model._weight_conversions
    cut_copy, blocks = CutCopy(before, made, like), before.list_of_blocks
    yield cut_copy
    tensors = tensors_of(model)
    for name, module in made.named_modules():
        if f"{name}.".startswith(f"{blocks}."):
            continue
        prefix = f"{name}." if name else ""
        for key in module._parameters:
            module._parameters[key] = tensors.get(prefix + key)
        for key, buffer in module._buffers.items():
            module._buffers[key] = None if buffer is None else tensors.get(prefix + key, buffer).to(model.device)
    become(model, made)
    cut_copy.weights.attach(model)
    before.discard()


def _without_weights(folder: Path, config: Any, device: Device) -> Any:
    """The model of a config, its buffers computed and its parameters on meta."""
    from transformers import GenerationConfig

    with weights_on_meta():
        model = auto_class(config).from_config(config, trust_remote_code=False, dtype=device.dtype)
    model.tie_weights()
    if model.can_generate():  # without a file of its own, of what config.json says, as from_pretrained does it
        has_own = (folder / "generation_config.json").is_file()
        of_config: dict[str, Any] = {} if has_own else {"config_file_name": "config.json", "_from_model_config": True}
        model.generation_config = GenerationConfig.from_pretrained(folder, **of_config)
    return model


def _with_blocks_on_disk(model: Any, blocks: str, source: Stored, device: Device, like: Any = None) -> Any:
    """Reads what is not in a block, and leaves the blocks on disk; `blocks` is the full name of their list."""
    rest = [name for name, t in stored_tensors(model).items() if not name.startswith(f"{blocks}.") or not t.is_meta]
    named = dict[int, list[str]]()
    for name, tensor in model.state_dict(keep_vars=True).items():
        named.setdefault(id(tensor), []).append(name)
    places = {names[index]: names for names in named.values() for index in range(len(names))}
    for name, tensor in source.read(rest):
        _put(model, places[name], tensor.to(device.torch_device))
    model.tie_weights()
    for module in model.modules():
        for key, buffer in module._buffers.items():
            module._buffers[key] = None if buffer is None else buffer.to(device.torch_device)
    names = [f"{blocks}.{index}" for index in range(len(model.get_submodule(blocks)))]
    DiskWeights(source, names, device, like).attach(model)
    return model


def _list_of_blocks(like: Any) -> str:
    """Full name of the outermost list of modules with most parameters in the decoder; that it runs is seen later."""
    sizes, inside = dict[str, int](), {id(module) for module in (like.get_decoder() or like).modules()}
    for name, module in like.named_modules():
        if (
            isinstance(module, nn.ModuleList)
            and id(module) in inside
            and not any(name.startswith(f"{outer}.") for outer in sizes)
        ):
            sizes[name] = sum(parameter.numel() for parameter in module.parameters())
    if not sizes:
        raise _refused(like.config, "it has no list of decoder blocks")
    return max(sizes, key=lambda name: sizes[name])


def _check_apart(like: Any, blocks: str, source: Converted) -> None:
    """Raises Refused where a block shares parameters, or tensors in files, with others."""
    owner, of_tensor = dict[str, str](), dict[int, str]()
    for name, tensor in like.state_dict(keep_vars=True).items():
        place = ".".join(name.removeprefix(f"{blocks}.").split(".")[:1]) if name.startswith(f"{blocks}.") else ""
        if of_tensor.setdefault(id(tensor), place) != place:
            raise _refused(like.config, f"{name} is shared with another block or with what is in none")
        for stored in source.sources_of(name):
            if owner.setdefault(stored, place) != place:
                raise _refused(like.config, f"{stored} holds weights of several blocks")


def _refused(config: Any, reason: str) -> Refused:
    return Refused(f"model.stream=true: blocks of this {config.model_type} model cannot be read one by one: {reason}; "
                   "give model.stream=false")  # fmt: skip


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


def _put(model: Any, names: list[str], tensor: Tensor) -> None:
    """Puts a tensor in all places of a model that have it."""
    parameter = as_parameter(tensor)
    for name in names:
        owner, _, last = name.rpartition(".")
        module = model.get_submodule(owner)
        if last in module._parameters:
            module._parameters[last] = parameter
        else:
            module._buffers[last] = tensor
