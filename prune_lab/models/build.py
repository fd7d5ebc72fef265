"""A model and its tokenizer made of files: what loading does once it is known where they are."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from prune_lab.errors import Refused
from prune_lab.models import formats
from prune_lab.models.anatomy import check_matrices, check_one_by_one
from prune_lab.models.auto_class import TEXT_ALONE, auto_class
from prune_lab.models.checkpoint import read_checkpoint
from prune_lab.models.contents import check_finite
from prune_lab.models.families import FAMILIES, check_type
from prune_lab.models.folder_check import check_config
from prune_lab.models.foreign import explained
from prune_lab.models.low_bit.compressed_tensors import leave_out_compression
from prune_lab.models.low_bit.dequantized import has_floats
from prune_lab.models.offload import streamed
from prune_lab.models.reported import notes_of, untie_own_head
from prune_lab.system.device import Device
from prune_lab.system.hub import why_not


def read_config(source: str, revision: str | None, name: str) -> Any:
    """The config of a folder or Hub id that a person calls `name`; raises Refused for one that is not read."""
    from transformers import AutoConfig
    from transformers.utils import logging

    logging.disable_progress_bar()  # its bars and advice speak of parts; the console speaks of the run
    logging.set_verbosity_error()
    try:
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
        check_type(config.model_type)
        check_config(config, name)
        auto_class(config)
    except Refused:
        raise
    except Exception as error:  # transformers and the Hub's client each have their own
        raise _not_loaded(name, error) from error
    return config


def _not_loaded(name: str, error: Exception) -> Refused:
    return Refused(f"model.name={name!r} cannot be loaded: {why_not(name, error)}")


def build(
    source: str, revision: str | None, name: str, weights: str, stream: bool, device: Device, seed: int
) -> tuple[Any, Any, list[str]]:
    """The model, on its device in eval mode, the tokenizer, and notes, of a folder that a person calls `name`.

    weights: pretrained or random, which `seed` is for; `source` may be a Hub id then. stream: the blocks' weights rest
    on disk. Raises Refused where it cannot be.
    """
    config, notes = read_config(source, revision, name), list[str]()
    try:
        leave_out_compression(config, weights == "random")
        tokenizer = _load_tokenizer(source, revision, name)
        if weights == "random":
            model = _start_at_random(config, device, seed)
        else:
            folder = Path(source)
            if stream:
                streamed.check(folder, config, name)
            stored = formats.dequantized_from(config)
            if config.model_type not in FAMILIES or stored is not None:
                model, notes = _load_other(source, config, name, stream, device)
            else:
                checkpoint = read_checkpoint(folder, config, name)
                notes = checkpoint.warnings
                if stream:
                    model = streamed.build(folder, config, checkpoint, device)
                else:
                    model = _load_weights(source, config, name, device)
            if stored is not None:
                notes = [
                    *notes,
                    f"weights stored in {stored} are read, pruned and exported as dense ones",
                ]
    except Refused:
        raise
    except Exception as error:  # transformers, the Hub's client and safetensors each have their own
        raise _not_loaded(name, error) from error
    check_matrices(model)
    check_finite(model, name)
    if stream:
        check_one_by_one(model)
    return model.eval(), tokenizer, notes


def _load_tokenizer(source: str, revision: str | None, name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
    except Exception as error:  # what it says of a missing file is about packages to install
        why = _why_no_tokenizer(Path(source), error)
        raise Refused(f"model.name={name!r} cannot be loaded: {why}") from error


# Tokenizers in other forms than tokenizer.json: a package by the module that is imported of it.
_SENTENCEPIECE = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}
_OTHER_TOKENIZERS: tuple[tuple[str, dict[str, str]], ...] = (
    ("*.model", _SENTENCEPIECE),  # such as tokenizer.model of the first Llama and Mistral models
    ("*.tiktoken", {"tiktoken": "tiktoken"}),
    ("tekken.json", {"mistral-common": "mistral_common"}),
)


def _why_no_tokenizer(folder: Path, error: Exception) -> str:
    """Reason why a folder's tokenizer cannot be loaded, with the package to install where one is missing."""
    if not (folder / "tokenizer.json").is_file():
        for pattern, packages in _OTHER_TOKENIZERS:
            for file in sorted(folder.glob(pattern)):
                missing = [package for package, module in packages.items() if not _is_there(module)]
                if not missing:
                    return f"its tokenizer, {file.name}, cannot be read ({why_not(file.name, error)})"
                needed = " ".join(packages)
                return f"its tokenizer is {file.name}, which needs packages that are missing: pip install {needed}"
    return (
        "there is no tokenizer.json, nor other files of a tokenizer, that can be read beside config.json "
        f"({type(error).__name__})"
    )


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # of a package whose parent is not there
        return False


def _load_weights(source: str, config: Any, name: str, device: Device) -> Any:
    model, report = formats.load(Path(source), config, dtype=device.dtype, output_loading_info=True)
    if report["missing_keys"]:  # what transformers does not find it starts at random
        raise Refused(f"model.name={name!r} lacks the weights {', '.join(sorted(report['missing_keys'])[:3])}")
    model._weight_conversions = None  # it is saved under the usual names of its family, whatever those here were
    return model.to(device.torch_device)


def _load_other(source: str, config: Any, name: str, stream: bool, device: Device) -> tuple[Any, list[str]]:
    """A model of a type that is not in FAMILIES, and notes: transformers says whether its files and config agree.

    Its tensors may have other names in files (experts one by one), and it is saved under those again.
    """
    if getattr(config, "rescale_every", 0):  # RWKV would divide its weights as it runs; states are the same without
        config.rescale_every = 0
    loaded: Any
    if stream:
        loaded = streamed.build_other(Path(source), config, device)
    else:
        # Tensors of another shape are in the report then, and refused below: an error of transformers names none.
        loaded = formats.load(
            Path(source), config, dtype=device.dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
    model, report = loaded
    unused = sorted(report["unexpected_keys"])
    is_whole = not report["missing_keys"] and not report["mismatched_keys"]
    if (foreign := explained(unused)) is not None and (not is_whole or has_floats(Path(source))):
        raise Refused(f"model.name={name!r} {foreign}")
    notes = notes_of(model, report, formats.format_of(Path(source), config).open(Path(source)), name)
    if not stream:  # of one on disk a head of its own is refused (models/offload/streamed.py)
        notes += untie_own_head(model)
    if config.model_type in TEXT_ALONE and model.config.model_type != config.model_type:
        notes.append(
            f"the text part of this {config.model_type} model is read and exported, as {type(model).__name__}: the "
            "class of the whole model does not run on text alone in this version of transformers"
        )
    return model if stream else model.to(device.torch_device), notes


def _start_at_random(config: Any, device: Device, seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto_class(config).from_config(config, trust_remote_code=False, dtype=device.dtype)
    return model.to(device.torch_device)
