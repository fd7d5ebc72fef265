"""Decoder blocks that can be removed from a model, each alone or several together: tried, of any type."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache

import torch

from prune_lab.models import found
from prune_lab.models.anatomy import Anatomy
from prune_lab.models.auto_class import reads_images
from prune_lab.models.fewer_blocks import STAYING, StaysError, built_anew, named, without


def blocks_that_stay(anatomy: Anatomy) -> dict[int, str]:
    """Reason by number of each block that cannot be removed alone; found once and kept with the model."""
    kept: dict[int, str] | None = anatomy.model.__dict__.get(STAYING)
    if kept is None:
        kept = anatomy.model.__dict__[STAYING] = _find_staying(anatomy)
    return kept


def _find_staying(anatomy: Anatomy) -> dict[int, str]:
    count, found_reasons = len(anatomy.blocks), dict[int, str]()
    try:
        whole = built_anew(anatomy)
    except StaysError as reason:
        return dict.fromkeys(range(count), str(reason))
    passed = _passed(whole.anatomy) if reads_images(anatomy.model) else range(count)
    for block in range(count):
        if block not in passed:  # its absence would cost text nothing, and images everything
            found_reasons[block] = "text alone does not pass through it"
            continue
        try:
            without(whole, [block])
        except StaysError as reason:
            found_reasons[block] = str(reason)
    return found_reasons


class Together:
    """Test of which blocks can go from a model together, tried as they are asked for; of a described family all can.

    numbers: those of the blocks in the dense model. refused: the reason by set of blocks that cannot.
    """

    def __init__(self, anatomy: Anatomy, numbers: Sequence[int]) -> None:
        self._numbers, self._whole = numbers, None if anatomy.found is None else cache(lambda: built_anew(anatomy))
        self._fine = set[tuple[int, ...]]()
        self.refused = dict[tuple[int, ...], str]()

    def can_go(self, blocks: Iterable[int]) -> bool:
        """True for blocks without which, all of them, the model is the one that bypasses them."""
        gone = tuple(sorted(blocks))
        if self._whole is None or not gone or gone in self._fine:
            return True
        if gone not in self.refused:
            try:
                without(self._whole(), gone)
                self._fine.add(gone)
            except StaysError as reason:
                self.refused[gone] = str(reason)
        return gone in self._fine

    def first(self, order: Sequence[int], count: int) -> list[int] | None:
        """The first `count` blocks of an order; where they cannot go together, each that can with those before it.

        None where those are too few.
        """
        chosen = list(order[:count])
        if self.can_go(chosen):
            return chosen
        chosen = []
        for block in order:
            if len(chosen) < count and self.can_go([*chosen, block]):
                chosen.append(block)
        return chosen if len(chosen) == count else None

    def note(self) -> str | None:
        """Note of the first blocks that could not go, or None."""
        if not self.refused:
            return None
        gone, reason = next(iter(self.refused.items()))
        blocks = named([self._numbers[index] for index in gone])
        return f"{blocks}, counted from 0, would have gone, and cannot together: {reason}"


@torch.no_grad()
def _passed(anatomy: Anatomy) -> set[int]:
    """Numbers of the blocks that run on text."""
    numbers = set[int]()
    hooks = [
        block.register_forward_pre_hook(lambda *_, number=number: numbers.add(number))
        for number, block in enumerate(anatomy.blocks)
    ]
    try:
        anatomy.model(input_ids=found.probe_tokens(anatomy.model)[:1], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return numbers
