"""A model as a Hugging Face folder that stock transformers loads: written, read again and compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prune_lab.models.anatomy import Anatomy
from prune_lab.models.blocks import BlockStream
from prune_lab.models.checkpoint import read_checkpoint
from prune_lab.models.export_config import rewrite_configs
from prune_lab.models.families import FAMILIES
from prune_lab.models.formats import load
from prune_lab.models.found import keep, layout_of
from prune_lab.models.load import Loaded
from prune_lab.models.loss import by_chunks, last_states, logits_of
from prune_lab.models.offload import streamed
from prune_lab.models.offload.on_disk import weights_on_disk
from prune_lab.system.files import atomic_folder


def write_folder(loaded: Loaded, folder: Path) -> None:
    """Writes safetensors, config, tokenizer and processor into an empty folder."""
    save_weights(loaded.model, folder)
    _write_tokenizer(loaded, folder)


def write_beside_weights(loaded: Loaded, folder: Path) -> None:
    """Writes what `write_folder` does beside the weights."""
    model = loaded.model
    model.config.dtype, model.config.architectures = model.dtype, [type(model).__name__]
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    _write_tokenizer(loaded, folder)


def _write_tokenizer(loaded: Loaded, folder: Path) -> None:
    loaded.tokenizer.save_pretrained(folder)
    for name, content in loaded.processor.items():
        (folder / name).write_bytes(content)
    rewrite_configs(folder, loaded.tokenizer_config, loaded.processor)


def save_model(loaded: Loaded, folder: Path) -> None:
    """Writes safetensors, config and tokenizer; `folder` appears when all is there."""
    with atomic_folder(folder) as half:
        write_folder(loaded, half)


def save_dense(loaded: Loaded, folder: Path) -> None:
    """The dense model as a folder to be measured; of one on disk, files as large as its own would be, and empty."""
    weights = weights_on_disk(loaded.model)
    if weights is None:
        save_model(loaded, folder)
    else:
        folder.mkdir(parents=True)
        weights.files_for(loaded.model, folder)


def save_weights(model: Any, folder: Path) -> None:
    """The weights, sharded as save_pretrained does it, and what it writes beside them."""
    weights = weights_on_disk(model)
    if weights is None:
        model.save_pretrained(folder)
        return
    folder.mkdir(parents=True, exist_ok=True)
    model.config.dtype, model.config.architectures = weights.device.dtype_name, [type(model).__name__]
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    weights.save(model, folder)


def read_folder(folder: Path, like: Any = None) -> Any:
    """The model of a folder, read with stock transformers (quantized, bitmask: with our reader), in eval mode.

    like: a model whose number type and device it gets; if that model's weights are on disk, they are read block by
    block, with our reader too. Without one it is read as it is stored.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    if like is None:
        return load(folder, config, dtype=config.dtype).eval()
    if (weights := weights_on_disk(like)) is not None:
        if config.model_type not in FAMILIES:
            again = streamed.build_other(folder, config, weights.device)[0].eval()
            keep(again, layout_of(like))  # of one config; their logits are compared
            return again
        return streamed.build(folder, config, read_checkpoint(folder, config, str(folder)), weights.device).eval()
    return load(folder, config, dtype=like.dtype).to(like.device).eval()


def check_reload(model: Any, folder: Path, tokens: Tensor) -> None:
    """Reads `folder` and compares the logits of `tokens`, shape (1, tokens), with the model's.

    Raises RuntimeError where they differ: such an export must not be used.
    """
    check_logits(model, read_folder(folder, model), folder, tokens)


@torch.no_grad()
def check_logits(model: Any, again: Any, folder: Path, tokens: Tensor, exact: bool = True) -> None:
    """Compares the logits of a model and of the one that was read back from `folder`; `tokens`: (1, tokens).

    Unless `exact`, they may differ as another order of additions in the model's number type makes them. Raises
    RuntimeError where they differ.
    """
    tokens = tokens.to(model.device)
    expected, found = (_states(m, tokens) for m in (model, again))
    differences = by_chunks(
        model, lambda a, b: (logits_of(model, a) - logits_of(again, b)).abs().amax(1), expected, found
    )
    largest = float(by_chunks(model, lambda a: logits_of(model, a).abs().amax(1), expected).max())
    difference = float(differences.max())
    tolerance = 1e-5 if exact else max(1e-5, 8 * torch.finfo(model.dtype).eps)
    if not difference <= tolerance * max(1.0, largest):
        raise RuntimeError(f"the export in {folder} does not reload: its logits differ by {difference:g}")


def _states(model: Any, tokens: Tensor) -> Tensor:
    """States before the head of one window, shape (tokens, hidden), wherever the model's weights are."""
    if weights_on_disk(model) is None:
        return last_states(model, tokens)[0]
    stream = BlockStream(Anatomy(model), tokens, 1)
    stream.run(lambda _: None)
    with stream.replayed(0):
        return last_states(model, tokens)[0]
