"""A model as a Hugging Face folder that stock transformers loads, written whole or not at all."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prune_lab.files import half_of
from prune_lab.models import bitmask
from prune_lab.models.folder import load
from prune_lab.models.load import Loaded


def save_model(loaded: Loaded, folder: Path, card: str | None = None, storage: str = "dense") -> None:
    """Writes safetensors, config, tokenizer and, if given, the model card; `folder` appears when all is there.

    `storage` is that of a post-compression (prune_lab/post/base.py).
    """
    half = half_of(folder)
    try:
        loaded.model.save_pretrained(half)
        if storage == "bitmask":
            bitmask.compress_folder(half)
        loaded.tokenizer.save_pretrained(half)
        if card is not None:
            (half / "README.md").write_text(card, encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        half.rename(folder)
    finally:
        with suppress(FileNotFoundError):
            shutil.rmtree(half)


@torch.no_grad()
def check_reload(model: Any, folder: Path, tokens: Tensor, exact: bool = True) -> None:
    """Loads `folder` with stock transformers (few bits, bitmask: with our reader) and compares the logits.

    `tokens` has shape (1, tokens). Unless `exact`, they may differ as another order of additions in the model's number
    type makes them. Raises RuntimeError where they differ: such an export must not be used.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    again = load(str(folder), config, dtype=model.dtype)
    again = again.to(model.device).eval()
    tokens = tokens.to(model.device)
    expected, found = (m(input_ids=tokens, use_cache=False).logits.float() for m in (model, again))
    difference = float((expected - found).abs().max())
    tolerance = 1e-5 if exact else 8 * torch.finfo(model.dtype).eps
    if not difference <= tolerance * max(1.0, float(expected.abs().max())):
        raise RuntimeError(f"the export in {folder} does not reload: its logits differ by {difference:g}")
