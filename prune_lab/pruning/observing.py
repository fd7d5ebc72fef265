"""Looking at what a block's Linears are given while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from prune_lab.models.blocks import ReachedError
from prune_lab.pruning.seen import Seen
from prune_lab.pruning.statistics import InputStatistics


@contextmanager
def observing(
    block: nn.Module, linears: list[tuple[str, Any]], needs: frozenset[str], stop: bool
) -> Iterator[dict[str, InputStatistics]]:
    """Statistics by name of Linear, gathered while `block` runs; Linears that are given one tensor share them.

    stop: ends a call of the block before the last of its Linears multiplies: only the inputs were wanted.
    """
    statistics: dict[str, InputStatistics] = {}
    of_this_call: list[tuple[Tensor, InputStatistics]] = []
    waiting: set[str] = set()

    def begin(*_: Any) -> None:
        of_this_call.clear()
        waiting.update(name for name, _ in linears)

    def look(name: str, rows: Tensor) -> None:
        known = next((known for other, known in of_this_call if other is rows), None)
        if known is None:
            known = statistics.setdefault(name, InputStatistics(needs))
            of_this_call.append((rows, known))
            known.add(rows.reshape(-1, rows.shape[-1]))
        statistics[name] = known
        waiting.discard(name)
        if stop and not waiting:
            raise ReachedError

    hooks = [block.register_forward_pre_hook(begin)]
    for name, linear in linears:
        hooks.append(linear.register_forward_pre_hook(lambda _, args, name=name: look(name, args[0])))
    try:
        yield statistics
    finally:
        of_this_call.clear()
        for hook in hooks:
            hook.remove()


def shared(statistics: dict[str, InputStatistics]) -> dict[str, Seen]:
    """What was gathered, by name of Linear; those that were given one input share its tensors."""
    distinct = {id(found): found.seen() for found in statistics.values()}
    return {name: distinct[id(found)] for name, found in statistics.items()}
