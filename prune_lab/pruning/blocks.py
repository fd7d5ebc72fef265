"""Passing text through a model one decoder block at a time, so that only one block's states are held."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from prune_lab.models.anatomy import Anatomy


class _ReachedError(Exception):
    """Raised at the first block: the rest of the model need not run."""


class BlockStream:
    """Hidden states of windows at the entrance of a block, moved on block by block.

    What else a block is called with (masks, positions) depends on the block (Gemma 2 has masks of two kinds) and on
    the shape of the batch, not on its tokens: it is recorded once for each block and batch size.
    """

    @torch.no_grad()
    def __init__(self, anatomy: Anatomy, windows: Tensor, batch_size: int) -> None:
        self._blocks = anatomy.blocks
        device = next(anatomy.model.parameters()).device
        batches = [batch.to(device) for batch in windows.split(batch_size)]
        by_size = {len(batch): batch for batch in batches}
        self._calls = {size: self._record_calls(anatomy, batch) for size, batch in by_size.items()}
        self.states = [self._embed(anatomy, batch) for batch in batches]  # each (windows, seq_len, hidden)

    def _record_calls(self, anatomy: Anatomy, batch: Tensor) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def note(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.append((args[1:], {key: value for key, value in kwargs.items() if key != "hidden_states"}))

        hooks = [block.register_forward_pre_hook(note, with_kwargs=True) for block in self._blocks]
        try:
            anatomy.model.base_model(input_ids=batch, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return calls

    def _embed(self, anatomy: Anatomy, batch: Tensor) -> Tensor:
        found: list[Tensor] = []

        def stop(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append(args[0] if args else kwargs["hidden_states"])
            raise _ReachedError

        hook = self._blocks[0].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            anatomy.model.base_model(input_ids=batch, use_cache=False)
        except _ReachedError:
            pass
        finally:
            hook.remove()
        return found[0]

    @torch.no_grad()
    def output(self, block: int, number: int) -> Tensor:
        """What a block makes of the states of one batch."""
        states = self.states[number]
        args, kwargs = self._calls[len(states)][block]
        out = self._blocks[block](states, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out


@contextmanager
def bypassed(anatomy: Anatomy, blocks: Collection[int]) -> Iterator[None]:
    """Within it, the states pass these blocks unchanged, as if they were not there (without a key-value cache)."""

    def undo(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        states = args[0] if args else kwargs["hidden_states"]
        return (states, *out[1:]) if isinstance(out, tuple) else states

    hooks = [anatomy.blocks[index].register_forward_hook(undo, with_kwargs=True) for index in blocks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
