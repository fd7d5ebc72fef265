"""Whole decoder blocks that matter least, taken out of a model."""

from __future__ import annotations

import torch

from prune_lab.models.anatomy import Anatomy
from prune_lab.models.blocks import bypassed
from prune_lab.models.resize import dense_count, keep_blocks, original_blocks
from prune_lab.pruning.calibration import Calibrator
from prune_lab.pruning.influence import block_influence
from prune_lab.pruning.pruned import LayerRow, Pruned
from prune_lab.pruning.selection import count_to_remove
from prune_lab.pruning.sensitivity import WINDOWS


@torch.no_grad()
def prune(anatomy: Anatomy, amount: float, by: str, calibrator: Calibrator) -> Pruned:
    """Takes blocks out of the model, by "bi" or "perplexity" (methods/depth.py), and returns what went with them."""
    count, total = len(anatomy.blocks), dense_count(anatomy, "blocks")
    remove = max(0, count - max(1, total - count_to_remove(total, amount)))
    dropped = (_by_influence if by == "bi" else _by_perplexity)(anatomy, remove, calibrator) if remove else []
    if dropped:
        keep_blocks(anatomy, [index for index in range(count) if index not in dropped])
    gone = [index for index in range(total) if index not in original_blocks(anatomy)]
    notes = [f"blocks removed of {total}, counted from 0: {', '.join(map(str, gone))}"] if gone else []
    return Pruned(_rows(anatomy, total, gone), warnings=notes)


def scan(anatomy: Anatomy, calibrator: Calibrator, dense: float) -> list[list[float]]:
    """rises[block][0]: rise of the loss in nats without that block alone; `dense` is the whole model's loss."""
    rises = []
    for index in range(len(anatomy.blocks)):
        with bypassed(anatomy, [index]):
            rises.append([calibrator.loss(anatomy.model, WINDOWS) - dense])
    return rises


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
            losses = calibrator.remember(anatomy, "block_losses", {"dropped": dropped}, without_each)
            _, index = min(zip(losses, left, strict=True))
            dropped.append(index)
            left.remove(index)
    return dropped
