"""Calibration statistics of the dense model: observed once, then served to every method and amount that needs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from prune_lab.dense_cache import DenseCache, Part
from prune_lab.pruning.statistics import LinearStatistics, Needs
from prune_lab.system.world import World

# Fields of LinearStatistics by what is asked for.
FIELDS = {
    "input_norm": ("input_norm", "rows"),
    "gated_norm": ("gated_norm", "rows"),
    "output_norm": ("output_norm", "rows"),
    "variance": ("mean", "variance", "rows"),
    "gram": ("gram", "tokens", "rows"),
}

Observe = Callable[[Needs], Iterator[dict[str, LinearStatistics]]]


def dense_statistics(
    cache: DenseCache,
    of: dict[str, Any],
    blocks: int,
    linears: list[str],
    needs: Needs,
    observe: Observe,
    world: World,
) -> Iterator[dict[str, LinearStatistics]]:
    """Statistics that `needs` names, block by block, as `observe(needs)` would yield them.

    linears: the names of all Linears. Each field is kept by itself, for the Linears that it was asked for: a method
    that needs fewer fields finds its own, and one that needs fewer Linears finds what was kept for all of them. Those
    that are missing are observed together, but for gram matrices, which are too large to be held beside others.
    world: the processes that observe together, and each ask for this.
    """

    def has(key: str, field: str) -> bool:
        return world.from_main(cache.has_parts(key, field))  # one may look a moment later than another

    keys, kept = dict[str, str](), dict[str, frozenset[str]]()
    for field in sorted(frozenset().union(*needs.values())):
        of_all = cache.key(field, {**of, "linears": "all"})
        kept[field] = frozenset(name for name, fields in needs.items() if field in fields)
        if kept[field] == set(linears) or has(of_all, field):
            keys[field], kept[field] = of_all, frozenset(linears)
        else:
            keys[field] = cache.key(field, {**of, "linears": sorted(kept[field])})
    waiting: dict[str, list[Part]] = {}

    def compute(field: str) -> Iterator[Part]:
        if field in waiting:
            yield from waiting.pop(field)
            return
        if field == "gram":
            yield from (_part(of_block, field) for of_block in observe(_needs({field: kept[field]})))
            return
        missing = {other for other in keys if other != "gram" and not has(keys[other], other)} | {field}
        # Vectors: small enough to be held for all blocks.
        observed = list(observe(_needs({other: kept[other] for other in missing})))
        waiting.update({other: [_part(of_block, other) for of_block in observed] for other in missing})
        yield from waiting.pop(field)

    streams = [cache.parts(key, field, blocks, partial(compute, field), world) for field, key in keys.items()]
    wanted = {name: {result for field in fields for result in FIELDS[field]} for name, fields in needs.items()}
    for parts in zip(*streams, strict=True):
        found: dict[str, dict[str, Any]] = {}
        for part in parts:
            for label, tensor in part.items():
                result, _, name = label.partition(" ")
                if result in wanted.get(name, ()):
                    found.setdefault(name, {})[result] = int(tensor) if result == "rows" else tensor
        yield {name: LinearStatistics(**of_linear) for name, of_linear in found.items()}


def _needs(linears: dict[str, frozenset[str]]) -> Needs:
    """Needs by Linear, from the Linears by field."""
    names = frozenset().union(*linears.values())
    return {name: frozenset(field for field, of_field in linears.items() if name in of_field) for name in names}


def _part(of_block: dict[str, LinearStatistics], field: str) -> Part:
    """The tensors of a field by result and Linear."""
    return {
        f"{result} {name}": torch.as_tensor(value)
        for name, statistics in of_block.items()
        for result in FIELDS[field]
        if (value := getattr(statistics, result)) is not None
    }
