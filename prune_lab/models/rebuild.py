"""A model rebuilt from an edited config: the class of transformers makes the modules, the tensors are the model's own.

So no attribute of a module (counts of heads, sizes of parts) has to be known, and what was built is what stock
transformers builds of the export.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from prune_lab.models.products import experts_of, set_experts

# Attributes of a model that stay when it is rebuilt; hooks do, too.
_STAY = ("generation_config", "training", "_weight_conversions")
_OF_TEXT = re.compile(r"text|decoder|ffn|attn")  # parts of a config that speak of the decoder


def text_parts(data: dict[str, Any]) -> list[dict[str, Any]]:
    """The dictionaries of a config that may speak of its decoder: itself, and its parts for text."""
    inner = [value for key, value in data.items() if isinstance(value, dict) and _OF_TEXT.search(key)]
    return [data, *(part for value in inner for part in text_parts(value))]


def edited(config: Any, edit: Callable[[dict[str, Any]], None]) -> Any | None:
    """A config whose dictionary was changed by `edit`; None where its class does not take it."""
    data = copy.deepcopy(config.to_dict())
    edit(data)
    with _silent():
        try:
            return type(config).from_dict(data)
        except Exception:  # of any config class of transformers
            return None


@contextmanager
def _silent() -> Iterator[None]:
    """Context in which transformers does not print what is wrong with a config that is but tried."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def loaded_dtype(model: Any) -> torch.dtype:
    """Number type that a model was loaded in: a training changes that of its parameters, and leaves its buffers."""
    dtype = model.config.dtype
    dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype  # by name once it was saved
    return dtype if isinstance(dtype, torch.dtype) else model.dtype


def _class_for(model: Any, config: Any) -> Any:
    """The class of a model like `model` of another config: its own, unless that config is of another type."""
    if isinstance(config, type(model.config)):
        return type(model)
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def skeleton(model: Any, config: Any) -> Any:
    """A model like `model` made from another config, its parameters on meta, its buffers computed."""
    of = model.config
    # Parts of a config may have attention of kinds of their own.
    attention = {name: getattr(of, name)._attn_implementation for name in of.sub_configs if getattr(of, name, None)}
    keys = {"dtype": loaded_dtype(model), "attn_implementation": {"": of._attn_implementation, **attention}}
    experts = experts_of(model)
    with weights_on_meta(), torch.random.fork_rng(devices=[]):
        made: Any = _class_for(model, config)._from_config(config, **keys)
    if experts is not None:
        set_experts(made, experts)
    return made


def shapes(model: Any, config: Any) -> dict[str, tuple[int, ...]] | None:
    """Shapes of the tensors of a model of a config by name; None where its class cannot build it."""
    try:
        with torch.device("meta"), _silent():
            made = _class_for(model, config)._from_config(copy.deepcopy(config), dtype=model.dtype)
    except Exception:  # of any modelling code of transformers
        return None
    return {name: tuple(tensor.shape) for name, tensor in made.state_dict().items()}


def tensors_of(model: Any) -> dict[str, Tensor]:
    """Parameters, the objects themselves, and stored buffers of a model by name; a tied one under each of its names."""
    found: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    return found | {name: tensor for name, tensor in model.state_dict().items() if name not in found}


def rebuilt(model: Any, config: Any, tensors: Mapping[str, Tensor]) -> Any:
    """A second model of another config with these parameters and stored buffers, which it may share with the first."""
    second = copy.copy(model)
    rebuild(second, config, tensors)
    return second


@torch.no_grad()
def rebuild(model: Any, config: Any, tensors: Mapping[str, Tensor]) -> None:
    """Turns a model, the object stays, into one of another config with these parameters and stored buffers.

    Raises ValueError where names or shapes differ from those of the config's model: then it is as before.
    """
    made = skeleton(model, config)
    assign(made, tensors, model.device)
    become(model, made)


@torch.no_grad()
def assign(made: Any, tensors: Mapping[str, Tensor], device: torch.device) -> None:
    """Puts parameters, the objects themselves, and stored buffers into a skeleton, whose own buffers move to a device.

    Raises ValueError where its names or shapes are others.
    """
    wanted = {name: tensor.shape for name, tensor in made.state_dict().items()}
    differing = [name for name in wanted.keys() | tensors.keys() if name not in wanted or name not in tensors]
    differing += [name for name, shape in wanted.items() if name in tensors and tensors[name].shape != shape]
    if differing:
        raise ValueError(f"a model of the config has not the same tensors: {', '.join(sorted(differing)[:3])}")
    for name, module in made.named_modules():
        prefix = f"{name}." if name else ""
        for key, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[key] = tensors[prefix + key]
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = tensors.get(prefix + key, buffer).to(device)


def become(model: Any, made: Any) -> None:
    """Turns a model, the object stays, into the one that was made in its place, with its mode and hooks.

    Hooks of its parts stay with those of the same name; so do what they were registered with, which removes them.
    """
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # of older transformers
    training, checkpointed = model.training, bool(getattr(model, f"is_{name}_checkpointing", False))
    parts = dict(model.named_modules())
    for path, part in made.named_modules():
        of_old = vars(parts[path]) if path and path in parts else {}
        part.__dict__.update({key: hooks for key, hooks in of_old.items() if "hook" in key and hooks})
    model.__class__ = type(made)
    model.__dict__.update(
        {key: value for key, value in made.__dict__.items() if key not in _STAY and "hook" not in key}
    )  # fmt: skip
    model.train(training)
    if checkpointed:
        getattr(model, f"{name}_checkpointing_enable")({"use_reentrant": False})


@contextmanager
def weights_on_meta() -> Iterator[None]:
    """Context in which modules are made without memory for parameters; buffers, which no file holds, are computed."""

    def move(module: nn.Module, name: str, parameter: nn.Parameter | None) -> Any:
        if parameter is None or parameter.is_meta:
            return None
        return nn.Parameter(parameter.to("meta"), requires_grad=False)

    hook = register_module_parameter_registration_hook(move)
    try:
        yield
    finally:
        hook.remove()
