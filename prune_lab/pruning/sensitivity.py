"""How much the loss on calibration text rises when one block alone is pruned."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from prune_lab.models.anatomy import Anatomy
from prune_lab.pruning.calibration import Calibrator
from prune_lab.pruning.statistics import Seen

AMOUNTS = (0.3, 0.5, 0.7, 0.9)
WINDOWS = 32  # of the calibration text: enough to rank blocks, and the scan is blocks x amounts passes over them

PruneBlock = Callable[[int, dict[str, Seen], float], None]


def source(method: type) -> tuple[str, ...]:
    """The modules in which a method is written, whose code a scan by it runs."""
    return tuple(dict.fromkeys(kind.__module__ for kind in method.__mro__ if kind is not object))


@torch.no_grad()
def scan(
    anatomy: Anatomy,
    walk: Iterable[dict[str, Seen]],
    prune_block: PruneBlock,
    calibrator: Calibrator,
    amounts: tuple[float, ...] = AMOUNTS,
) -> list[list[float]]:
    """rises[block][i]: rise of the loss in nats when `prune_block(block, seen, amounts[i])` prunes that block alone.

    `walk` yields what was seen of each block of the dense model. The model is afterwards as it was.
    """
    model, rises = anatomy.model, []
    dense = calibrator.loss(model, WINDOWS)
    blocks = anatomy.blocks
    with calibrator.console.progress(len(blocks) * len(amounts), "sensitivity", unit="pass") as bar:
        for index, (block, seen) in enumerate(zip(blocks, walk, strict=True)):
            before = {name: value.clone() for name, value in block.state_dict().items()}
            of_block = []
            for amount in amounts:
                prune_block(index, seen, amount)
                of_block.append(calibrator.loss(model, WINDOWS) - dense)
                block.load_state_dict(before)
                bar.update()
            rises.append(of_block)
    return rises
