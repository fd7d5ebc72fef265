"""Inference as it is timed and measured for memory: a prefill, then tokens decoded one by one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def prefill(model: Any, prompt: Tensor) -> Any:
    """Runs the whole prompt, shape (batch, tokens), and returns the output with its key-value cache."""
    return model(input_ids=prompt, use_cache=True, logits_to_keep=1)


@torch.no_grad()
def decode(model: Any, output: Any, tokens: int) -> None:
    """Decodes `tokens` tokens greedily, one forward pass each, after `prefill`."""
    for _ in range(tokens):
        output = step(model, output, output.logits[:, -1:].argmax(-1))


@torch.no_grad()
def step(model: Any, output: Any, last: Tensor) -> Any:
    """Runs one token of each row, shape (batch, 1), after the tokens whose key-value cache `output` has."""
    name = "cache" if hasattr(output, "cache") else "past_key_values"  # renamed in transformers 5.24
    return model(input_ids=last, use_cache=True, **{name: getattr(output, name)})


class Inference:
    """A model as it is timed."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def prefill(self, prompt: Tensor) -> Any:
        """See the function of that name."""
        return prefill(self.model, prompt)

    def decode(self, output: Any, tokens: int) -> None:
        """See the function of that name."""
        decode(self.model, output, tokens)
