"""A model timed by CUDA graphs: its kernels alone, without the time that Python takes to start each of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from prune_lab.errors import Refused
from prune_lab.measure.inference import Inference, decode, prefill
from prune_lab.system.cuda_graph import captured


class Replayed(Inference):
    """Prefill and decoding, captured when they are first asked for and replayed from then on.

    For prompts of one shape and one number of tokens to decode. All decoding is one graph, in which the key-value cache
    grows as it does otherwise; it begins with what the last prefill left.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self._prompt: Tensor | None = None
        self._output: Any = None
        self._prefill_again: Callable[[], None] | None = None
        self._decode_again: Callable[[], None] | None = None

    def prefill(self, prompt: Tensor) -> Any:
        """Runs the whole prompt; the output is the same object each time, its logits with new values."""
        if self._prompt is None or self._prefill_again is None:
            own = self._prompt = prompt.clone()
            prefill(self.model, own)  # as libraries want it: once before it is captured
            self._output, self._prefill_again = _captured(lambda: prefill(self.model, own))
        self._prompt.copy_(prompt)
        self._prefill_again()
        return self._output

    def decode(self, output: Any, tokens: int) -> None:
        """Decodes `tokens` tokens greedily after the last prefill."""
        if self._decode_again is None:
            assert self._prompt is not None
            decode(self.model, prefill(self.model, self._prompt), tokens)
            _, self._decode_again = _captured(lambda: decode(self.model, output, tokens))
        self._decode_again()


def _captured(work: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
    try:
        return captured(work)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise Refused(
            "measure.accelerate='cuda_graphs': this model does what cannot be captured, such as waiting for a result "
            f"({str(error).splitlines()[0]}); give none or compile"
        ) from error
