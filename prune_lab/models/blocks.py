"""Passing text through a model one decoder block at a time, so that only one block's states are held."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from prune_lab.models.anatomy import Anatomy
from prune_lab.models.offload.states import StateList, States


class ReachedError(Exception):
    """Signal that all that was wanted of a forward pass is there: the rest of it need not run."""


class BlockStream:
    """Hidden states of windows at the entrance of a block, moved on block by block.

    What else a block is called with (masks, positions) depends on the block (Gemma 2 has masks of two kinds) and on
    the shape of the batch, not on its tokens: it is recorded once for each block and batch size.
    """

    @torch.no_grad()
    def __init__(self, anatomy: Anatomy, windows: Tensor, batch_size: int) -> None:
        self._blocks = anatomy.blocks
        self._anatomy = anatomy
        device = next(anatomy.model.parameters()).device
        batches = [batch.to(device, torch.int64) for batch in windows.split(batch_size)]
        by_size = {len(batch): batch for batch in batches}
        self._calls = {size: self._record_calls(batch) for size, batch in by_size.items()}
        self.states: StateList = States() if anatomy.is_on_disk else []  # each (windows, seq_len, hidden)
        for batch in batches:
            self.states.append(self._embed(batch))

    def _record_calls(self, batch: Tensor) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def note(states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            calls.append((args, kwargs))
            return states

        with _instead_of(self._blocks, note):
            self._anatomy.model.base_model(input_ids=batch, use_cache=False)
        return calls

    def _embed(self, batch: Tensor) -> Tensor:
        found: list[Tensor] = []

        def stop(states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            found.append(states)
            raise ReachedError

        with _instead_of(self._blocks, stop), suppress(ReachedError):
            self._anatomy.model.base_model(input_ids=batch, use_cache=False)
        return found[0]

    @torch.no_grad()
    def output(self, block: int, number: int) -> Tensor:
        """Output of a block for the states of one batch."""
        return self.call(block, self.states[number])

    def call(self, block: int, states: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Output of a block for any states of the shape of a batch; in another number type, if its weights have it."""
        args, kwargs = self._calls[len(states)][block]
        if dtype is not None:
            states, args, kwargs = tree_map(
                lambda part: part.to(dtype) if isinstance(part, Tensor) and part.is_floating_point() else part,
                (states, args, kwargs),
            )
        out = self._blocks[block](states, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    def look(self, block: int, number: int) -> None:
        """Passes the states of one batch into a block, for its hooks to see; one that raises ReachedError ends it."""
        with suppress(ReachedError):
            self.output(block, number)

    def run(self, done: Callable[[int], Any]) -> None:
        """Moves all states to the exit of the last block, each block at hand once; `done` is told of tokens passed."""
        for block in range(len(self._blocks)):
            with self._anatomy.at_hand(block):
                for number in range(len(self.states)):
                    out = self.output(block, number)
                    self.states[number] = out
                    done(out.shape[0] * out.shape[1])

    @contextmanager
    def replayed(self, number: int) -> Iterator[None]:
        """Context in which a forward pass on one batch takes its states from here after the last block."""
        with _instead_of(self._blocks, lambda *args, **kwargs: self.states[number]):
            yield


@contextmanager
def _instead_of(blocks: list[nn.Module], forward: Callable[..., Tensor]) -> Iterator[None]:
    """Context in which `forward(hidden_states, ...)` is called in place of each block; no weights are needed."""

    def named(*args: Any, hidden_states: Tensor | None = None, **kwargs: Any) -> Tensor:
        return forward(*(args if hidden_states is None else (hidden_states, *args)), **kwargs)

    before = [vars(block).get("forward") for block in blocks]  # one of a model on disk has its own
    for block in blocks:
        block.forward = named  # of this object alone: its class keeps its own
    try:
        yield
    finally:
        for block, own in zip(blocks, before, strict=True):
            del block.forward
            if own is not None:
                block.forward = own


@contextmanager
def recorded(linears: Mapping[str, nn.Module]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Context in which input and output of each Linear are kept, of its last call; without gradients or with."""
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str, args: tuple[Any, ...], out: Tensor) -> None:
        found[name] = args[0], out

    hooks = [
        linear.register_forward_hook(lambda _, args, out, name=name: keep(name, args, out))
        for name, linear in linears.items()
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def states_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """States that a block is called with."""
    states: Tensor = args[0] if args else kwargs["hidden_states"]
    return states


def states_in(out: Any) -> Tensor:
    """States that a block returns, alone or first among others."""
    states: Tensor = out[0] if isinstance(out, tuple | list) else out
    return states


@contextmanager
def bypassed(anatomy: Anatomy, blocks: Collection[int]) -> Iterator[None]:
    """Context in which the states pass these blocks unchanged, as if removed (without a key-value cache)."""

    def undo(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        states = states_of(args, kwargs)
        return type(out)((states, *out[1:])) if type(out) in (tuple, list) else states

    hooks = [anatomy.blocks[index].register_forward_hook(undo, with_kwargs=True) for index in blocks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
