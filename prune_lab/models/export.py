"""A model as a Hugging Face folder that stock transformers loads, written whole or not at all."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prune_lab.models.anatomy import Anatomy
from prune_lab.models.blocks import BlockStream
from prune_lab.models.checkpoint import read_checkpoint
from prune_lab.models.export_config import rewrite_configs
from prune_lab.models.folder import load
from prune_lab.models.load import Loaded
from prune_lab.models.low_bit import bitmask
from prune_lab.models.offload import streamed
from prune_lab.models.offload.on_disk import lay_out_model, weights_on_disk
from prune_lab.system.files import temporary_name


def save_model(loaded: Loaded, folder: Path, storage: str = "dense") -> None:
    """Writes safetensors, config and tokenizer; `folder` appears when all is there.

    `storage` is that of a post-compression (prune_lab/post/base.py).
    """
    half = temporary_name(folder)
    try:
        save_weights(loaded.model, half)
        if storage == "bitmask":
            bitmask.compress_folder(half)
        loaded.tokenizer.save_pretrained(half)
        rewrite_configs(half, loaded.tokenizer_config)
        if folder.exists():
            shutil.rmtree(folder)
        half.rename(folder)
    finally:
        with suppress(FileNotFoundError):
            shutil.rmtree(half)


def save_dense(loaded: Loaded, folder: Path) -> None:
    """The dense model as a folder to be measured; of one on disk, files as large as its own would be, and empty."""
    if weights_on_disk(loaded.model) is None:
        save_model(loaded, folder)
    else:
        folder.mkdir(parents=True)
        lay_out_model(loaded.model, folder)


def save_weights(model: Any, folder: Path) -> None:
    """The weights, sharded as save_pretrained does it, and what it writes beside them."""
    weights = weights_on_disk(model)
    if weights is None:
        model.save_pretrained(folder)
        return
    folder.mkdir(parents=True)
    model.config.dtype, model.config.architectures = weights.device.dtype_name, [type(model).__name__]
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    weights.save(model, folder)


@torch.no_grad()
def check_reload(model: Any, folder: Path, tokens: Tensor, exact: bool = True) -> None:
    """Loads `folder` with stock transformers (few bits, bitmask: with our reader) and compares the logits.

    Of a model whose weights rest on disk, they are read again block by block, with our reader too. `tokens` has shape
    (1, tokens). Unless `exact`, the logits may differ as another order of additions in the model's number type makes
    them. Raises RuntimeError where they differ: such an export must not be used.
    """
    from transformers import AutoConfig

    config, weights = AutoConfig.from_pretrained(folder), weights_on_disk(model)
    if weights is None:
        again = load(str(folder), config, dtype=model.dtype).to(model.device).eval()
    else:
        again = streamed.build(folder, config, read_checkpoint(folder, config, str(folder)), weights.device).eval()
    tokens = tokens.to(model.device)
    expected, found = (_logits(m, tokens) for m in (model, again))
    difference = float((expected - found).abs().max())
    tolerance = 1e-5 if exact else 8 * torch.finfo(model.dtype).eps
    if not difference <= tolerance * max(1.0, float(expected.abs().max())):
        raise RuntimeError(f"the export in {folder} does not reload: its logits differ by {difference:g}")


def _logits(model: Any, tokens: Tensor) -> Tensor:
    """Of one window, float32, wherever the model's weights rest."""
    if weights_on_disk(model) is None:
        return model(input_ids=tokens, use_cache=False).logits.float()
    stream = BlockStream(Anatomy(model), tokens, 1)
    stream.run(lambda _: None)
    with stream.replayed(0):
        return model(input_ids=tokens, use_cache=False).logits.float()
