"""method=depth: whole decoder blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from prune_lab.methods.base import LayerRow, Method, Pruned
from prune_lab.models.anatomy import Anatomy
from prune_lab.models.blocks import bypassed
from prune_lab.models.resize import dense_count, keep_blocks, original_blocks
from prune_lab.pruning.calibration import Calibrator
from prune_lab.pruning.influence import block_influence
from prune_lab.pruning.selection import count_to_remove

WAYS = ("bi", "perplexity")


@dataclass(frozen=True)
class Depth(Method):
    """Removes the blocks that matter least; at least one stays.

    by: bi, the blocks that change the direction of the states least in the dense model (ShortGPT: Men et al.,
    2403.03853); perplexity, one block after the other, each time the one whose absence hurts calibration text least
    (SLEB: Song et al., 2402.09025).
    """

    by: str = "bi"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.by not in WAYS:
            raise ValueError(f"by={self.by!r} is none of {', '.join(WAYS)}")

    @property
    def calibrated(self) -> bool:
        """It looks at calibration text either way."""
        return True

    @torch.no_grad()
    def prune(self, anatomy: Anatomy, amount: float, seed: int, calibrator: Calibrator | None = None) -> Pruned:
        """Takes blocks out of the model and returns what went with them."""
        assert calibrator is not None
        count, total = len(anatomy.blocks), dense_count(anatomy, "blocks")
        remove = max(0, count - max(1, total - count_to_remove(total, amount)))
        dropped = (_by_influence if self.by == "bi" else _by_perplexity)(anatomy, remove, calibrator) if remove else []
        if dropped:
            keep_blocks(anatomy, [index for index in range(count) if index not in dropped])
        gone = [index for index in range(total) if index not in original_blocks(anatomy)]
        notes = [f"blocks removed of {total}, counted from 0: {', '.join(map(str, gone))}"] if gone else []
        return Pruned(_rows(anatomy, total, gone), notes=notes)


def _rows(anatomy: Anatomy, total: int, gone: list[int]) -> list[LayerRow]:
    """The per-layer table of the dense model: all blocks are built alike."""
    of_block = [(name.split(".0.", 1), linear.weight.numel()) for name, linear in anatomy.linears_by_block()[0]]
    return [
        LayerRow(f"{before}.{index}.{after}", size, size if index in gone else 0)
        for index in range(total)
        for (before, after), size in of_block
    ]


def _by_influence(anatomy: Anatomy, remove: int, calibrator: Calibrator) -> list[int]:
    """The `remove` blocks of lowest influence, the first ones among equals."""
    influence = block_influence(calibrator, anatomy)
    return sorted(range(len(influence)), key=lambda index: (influence[index], index))[:remove]


def _by_perplexity(anatomy: Anatomy, remove: int, calibrator: Calibrator) -> list[int]:
    """Blocks in the order of their removal; each is the one without which the loss is lowest at that point."""
    left, dropped = list(range(len(anatomy.blocks))), list[int]()
    passes = sum(len(left) - step for step in range(remove))
    with calibrator.console.progress(passes, "trying blocks", unit="pass") as bar:

        def without_each() -> list[float]:
            """The loss without each block that is left."""
            losses = []
            for index in left:
                with bypassed(anatomy, [*dropped, index]):
                    losses.append(calibrator.loss(anatomy.model))
                bar.update()
            return losses

        for _ in range(remove):
            losses = calibrator.remember(anatomy, "block_losses", {"dropped": dropped}, without_each, (__name__,))
            _, index = min(zip(losses, left, strict=True))
            dropped.append(index)
            left.remove(index)
    return dropped
