"""Calibration statistics of the dense model: observed once, then served to every method and amount that needs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from prune_lab.dense_cache import DenseCache, Part
from prune_lab.pruning.seen import Seen

FIELDS = {"input_norm": ("input_norm",), "variance": ("mean", "variance"), "gram": ("gram",)}  # of Seen, by need

Observe = Callable[[frozenset[str]], Iterator[dict[str, Seen]]]


def dense_statistics(
    facts: DenseCache, of: dict[str, Any], blocks: int, needs: frozenset[str], observe: Observe
) -> Iterator[dict[str, Seen]]:
    """For each block, what was seen at each of its Linears, by full name, as `observe(needs)` would yield it.

    Each need is kept by itself, so that a method that needs fewer finds its own. Those that are missing are observed
    together, but for gram matrices, which are too large to be held beside others.
    """
    keys = {need: facts.key(need, of) for need in sorted(needs)}
    waiting: dict[str, list[Part]] = {}

    def compute(need: str) -> Iterator[Part]:
        if need in waiting:
            yield from waiting.pop(need)
            return
        if need == "gram":
            yield from (_part(of_block, need) for of_block in observe(frozenset({need})))
            return
        missing = {other for other in keys if other != "gram" and not facts.has_parts(keys[other], other)} | {need}
        seen = list(observe(frozenset(missing)))  # vectors: small enough to be held for all blocks
        waiting.update({other: [_part(of_block, other) for of_block in seen] for other in missing})
        yield from waiting.pop(need)

    streams = [facts.parts(key, need, blocks, partial(compute, need)) for need, key in keys.items()]
    for parts in zip(*streams, strict=True):
        fields: dict[str, dict[str, Any]] = {}
        for part in parts:
            for label, tensor in part.items():
                field, _, name = label.partition(" ")
                fields.setdefault(name, {})[field] = tensor
        yield {name: Seen(**of_linear) for name, of_linear in fields.items()}


def _part(of_block: dict[str, Seen], need: str) -> Part:
    """The tensors of a need by field and Linear."""
    return {f"{field} {name}": getattr(seen, field) for name, seen in of_block.items() for field in FIELDS[need]}
