"""A model as an ONNX graph, traced by transformers' own exporter (needs the extra onnx).

One graph serves for a prompt and for decoding. Inputs: `input_ids` and `position_ids`, shape (batch, tokens), and the
keys and values of earlier tokens, shape (batch, KV heads, earlier tokens, head size), of which a prompt has none.
Outputs: `logits`, shape (batch, tokens, vocabulary), and the keys and values of all tokens so far.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

FILE = "model.onnx"


def write(model: Any, folder: Path, dtype: torch.dtype) -> None:
    """Writes model.onnx, its weights in model.onnx.data, the config, and export.json, which transformers reads."""
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    traced = copy.deepcopy(model).to("cpu", dtype).eval()
    with _quiet(), torch.no_grad():
        exported = OnnxExporter().export(traced, _sample(traced), OnnxConfig(dynamic=True))
        exported.save_pretrained(folder)


def _sample(model: Any) -> dict[str, Any]:
    """Arguments to trace with: three tokens of two rows after five others.

    No size is 1, which would become a constant. The cache keeps all tokens in every block: the tracer would make
    constants of the lengths that a cache of a sliding window counts, and its mask would be wrong for longer texts.
    """
    from transformers import DynamicCache

    ids = torch.arange(16).reshape(2, 8) % model.config.vocab_size
    cache = model(input_ids=ids[:, :5], use_cache=True, cache=DynamicCache()).cache
    position_ids = torch.arange(5, 8).expand(2, 3).contiguous()
    return {"input_ids": ids[:, 5:], "position_ids": position_ids, "cache": cache, "use_cache": True}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the exporter's prints, warnings and log from the terminal: they are about its own inner steps."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
