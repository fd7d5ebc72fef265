"""Comparison of an ONNX graph with the model that it was traced from."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def compare(model: Any, graph: Any, tokens: Tensor, continued: int, dtype: torch.dtype) -> None:
    """Compares logits of `tokens`, shape (1, tokens), and of `continued` tokens decoded after half of them.

    The model computes in float32 on the CPU. Each decoded token is the model's choice, given to both. Raises
    RuntimeError where the logits differ by more than `dtype`, that of the graph, explains.
    """
    wide = copy.deepcopy(model).to("cpu", torch.float32)
    tolerance = {torch.float32: 1e-4, torch.float16: 2e-2}[dtype]
    expected = wide(input_ids=tokens, use_cache=False).logits
    largest = max(1.0, float(expected.abs().max()))
    _check(
        expected, graph(input_ids=tokens).logits, tolerance * largest, graph.folder, f"{tokens.shape[1]} tokens at once"
    )
    prompt = tokens[:, : max(1, tokens.shape[1] // 2)]
    found, kept = graph(input_ids=prompt), prompt
    for _ in range(min(continued, tokens.shape[1] - prompt.shape[1])):
        expected = wide(input_ids=kept, use_cache=False).logits[:, -1]
        _check(expected, found.logits[:, -1], tolerance * largest, graph.folder, f"token {kept.shape[1]}, decoded")
        chosen = expected.argmax(-1, keepdim=True)
        kept = torch.cat((kept, chosen), 1)
        found = graph(input_ids=chosen, cache=found.cache)


def _check(expected: Tensor, found: Tensor, tolerance: float, folder: Path, where: str) -> None:
    difference = float((expected - found.float()).abs().max())
    if not difference <= tolerance:
        raise RuntimeError(f"the export in {folder} does not reload: its logits differ by {difference:g}, of {where}")
