"""Choices of experts of a compressed mixture beside the dense model's, on the same tokens."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from prune_lab.models.anatomy import Anatomy
from prune_lab.models.resize import original_blocks, original_experts
from prune_lab.models.watched_experts import modules_of_experts, watched
from prune_lab.system.world import World


class SameExperts:
    """Count of the dense model's choices, of an expert by a token, and of those that the other model makes as well.

    tokens: how many of those that pass are counted, the first ones: the rest fills up a batch.
    """

    def __init__(self, tokens: int) -> None:
        self._same, self._all, self._tokens = 0, 0, tokens
        self._counted = dict[int, int]()  # tokens so far by block
        # By block of the dense model, of batches that it is yet to be given: of a model on disk, of all of them.
        self._chosen = dict[int, deque[Tensor]]()
        self._noted = dict[int, int]()  # tokens so far by block

    @property
    def share(self) -> float | None:
        """Share of choices that are the same; None where there was none."""
        return self._same / self._all if self._all else None

    def add_up(self, world: World) -> None:
        """Makes the counts those of all processes."""
        counts = torch.tensor([self._same, self._all])
        world.sum([counts])
        self._same, self._all = counts.tolist()

    @contextmanager
    def watching(self, model: Any, dense: Any) -> Iterator[None]:
        """Context in which each batch passes `model` and then, where it is compared, `dense`."""
        anatomy, layout = Anatomy(model), Anatomy(dense).found
        of_dense = modules_of_experts(dense, layout) if layout is not None else {}
        blocks, experts = original_blocks(anatomy), original_experts(anatomy)
        prefix = f"{anatomy.family.blocks}."
        mine = {
            now: name.replace(f"{prefix}{block}.", f"{prefix}{now}.", 1)
            for now, block in enumerate(blocks)
            if (name := of_dense.get(block)) is not None
        }
        numbers = {blocks[now]: torch.tensor(kept) for now, kept in experts.items()}

        def note(now: int, states: Tensor, chosen: Tensor, gates: Tensor) -> None:
            block = blocks[now]
            if (noted := self._noted.get(block, 0)) < self._tokens:
                self._noted[block] = noted + len(chosen)
                here = numbers[block].to(chosen.device)[chosen] if block in numbers else chosen
                self._chosen.setdefault(block, deque()).append(here.to(torch.int16))

        def compare(block: int, states: Tensor, chosen: Tensor, gates: Tensor) -> None:
            before = self._counted.get(block, 0)
            chosen = chosen[: max(0, self._tokens - before)]
            self._counted[block] = before + len(chosen)
            self._all += chosen.numel()
            if self._chosen.get(block):
                also = self._chosen[block].popleft()[: len(chosen)].to(chosen.device)
                self._same += int((chosen[:, :, None] == also[:, None, :]).any(-1).sum())

        with watched(model, mine, note), watched(dense, of_dense, compare):
            yield
