"""The prompts that are timed, cut from the test stream."""

from __future__ import annotations

import torch
from torch import Tensor

from prune_lab.errors import Refused
from prune_lab.measure.settings import Measure

PromptShape = tuple[int, int]  # rows, tokens


def cut_headline(stream: Tensor, settings: Measure, context: int | None) -> Tensor:
    """The first `prompt_tokens` of the stream, fewer where the text or the model's context is shorter: (1, tokens)."""
    room = (context or 10**9) - settings.decode_tokens
    return stream[: max(1, min(settings.prompt_tokens, room))][None].long()


def cut_grid(stream: Tensor, settings: Measure, context: int | None) -> dict[PromptShape, Tensor]:
    """A prompt, shape (batch, length), for each combination of the settings; empty where none is asked for.

    The rows of a batch come from places spread evenly over the stream and share no token. Raises Refused where a
    length with the decoded tokens is above the model's context, or the text too short for a batch.
    """
    if not settings.has_grid:
        return {}
    lengths = settings.lengths or (cut_headline(stream, settings, context).shape[1],)
    for length in lengths:
        if context is not None and length + settings.decode_tokens > context:
            raise Refused(
                f"measure.lengths={list(lengths)}: {length} and measure.decode_tokens={settings.decode_tokens} are "
                f"together above the model's context of {context} tokens"
            )
    return {(batch, length): _rows(stream, batch, length) for batch in settings.batch_sizes for length in lengths}


def _rows(stream: Tensor, batch: int, length: int) -> Tensor:
    apart = len(stream) // batch
    if apart < length:
        raise Refused(
            f"measure.batch_sizes and measure.lengths: {batch} rows of {length} tokens are more than the test text's "
            f"{len(stream)} tokens: give more text, fewer rows or a smaller length"
        )
    return torch.stack([stream[row * apart : row * apart + length] for row in range(batch)]).long()
