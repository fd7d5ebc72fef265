"""A model and its tokenizer made of files: what loading does once it is known where they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from prune_lab.errors import Refused
from prune_lab.models import folder as folders
from prune_lab.models import streamed
from prune_lab.models.anatomy import family_of
from prune_lab.models.contents import check_finite
from prune_lab.models.folder_check import check_config
from prune_lab.system.device import Device
from prune_lab.system.hub import why_not


def build(
    source: str, revision: str | None, name: str, weights: str, stream: bool, device: Device, seed: int
) -> tuple[Any, Any]:
    """The model, on its device in eval mode, and the tokenizer of a folder or Hub id that a person calls `name`.

    weights: pretrained or random, which `seed` is for. stream: the blocks' weights rest on disk. Raises Refused where
    it cannot be.
    """
    from transformers import AutoConfig
    from transformers.utils import logging

    logging.disable_progress_bar()  # its bars and advice speak of parts; the console speaks of the run
    logging.set_verbosity_error()
    place: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(source, **place)
        family_of(config.model_type)
        check_config(config, name)
        tokenizer = _load_tokenizer(source, place, name)
        if stream:
            model = streamed.build(Path(source), config, device, name)
        else:
            model = _load_model(source, config, weights, place, device, seed).to(device.torch_device)
    except Refused:
        raise
    except Exception as error:  # transformers, the Hub's client and safetensors each have their own
        raise Refused(f"model.name={name!r} cannot be loaded: {why_not(name, error)}") from error
    check_finite(model, name)
    return model.eval(), tokenizer


def _load_tokenizer(source: str, place: dict[str, Any], name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, **place)
    except Exception as error:  # what it says of a missing file is about packages to install
        raise Refused(
            f"model.name={name!r} cannot be loaded: there is no tokenizer.json, nor other files of a tokenizer, that "
            f"can be read beside config.json ({type(error).__name__})"
        ) from error


def _load_model(source: str, config: Any, weights: str, place: dict[str, Any], device: Device, seed: int) -> Any:
    from transformers import AutoModelForCausalLM

    if weights == "random":
        if hasattr(config, "quantization_config"):  # of the weights that are not read
            del config.quantization_config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False, dtype=device.dtype)
    model, report = folders.load(source, config, **place, dtype=device.dtype, output_loading_info=True)
    missing = sorted(report["missing_keys"])
    if missing:
        raise Refused(f"model.name={source!r} lacks the weights {', '.join(missing[:3])}: the download is not complete")
    scales = sorted(key for key in report["unexpected_keys"] if key.endswith("_scale"))
    if scales:
        raise Refused(
            f"model.name={source!r} holds {scales[0]}, but its config.json has no quantization_config: the weights "
            "cannot be read without it"
        )
    return model
