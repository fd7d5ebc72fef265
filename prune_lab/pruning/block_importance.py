"""Importance of whole decoder blocks: by how they change the states (ShortGPT), or by the loss without them (SLEB)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from prune_lab.models.anatomy import Anatomy
from prune_lab.models.blocks import BlockStream, bypassed
from prune_lab.pruning.calibration import Calibrator
from prune_lab.pruning.loss_increase import WINDOWS


def least_influential(anatomy: Anatomy, remove: int, calibrator: Calibrator) -> list[int]:
    """The `remove` blocks of lowest influence, the first ones among equals."""
    influence = block_influence(calibrator, anatomy)
    return sorted(range(len(influence)), key=lambda index: (influence[index], index))[:remove]


def block_influence(calibrator: Calibrator, anatomy: Anatomy) -> list[float]:
    """Change of the states' direction by each block: 1 - mean over tokens of cos(input, output).

    ShortGPT's BI (Men et al., 2403.03853), between the block's own input and output: the model's last hidden
    state would be the one after the final norm. Computed once for the dense model.
    """
    found: list[float] = calibrator.remember(
        anatomy, "block_influence", {}, lambda: _of_each_block(calibrator, anatomy)
    )
    return found


def influence(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """1 - mean cosine between rows of the first and second of each pair, both of shape (tokens, hidden)."""
    cosines = [torch.cosine_similarity(was.float(), now.float(), dim=1) for was, now in pairs]
    return 1 - float(torch.cat(cosines).double().mean())


@torch.no_grad()
def _of_each_block(calibrator: Calibrator, anatomy: Anatomy) -> list[float]:
    stream, found = BlockStream(anatomy, calibrator.windows, calibrator.batch_size), []
    count = len(anatomy.blocks)
    with calibrator.console.progress(count * calibrator.windows.numel(), "block influence", unit="tok") as bar:
        for index in range(count):
            before = [stream.states[number] for number in range(len(stream.states))]
            calibrator.forward(stream, index, bar, keep=True)
            pairs = ((was, stream.states[number]) for number, was in enumerate(before))
            found.append(influence((was.flatten(0, 1), now.flatten(0, 1)) for was, now in pairs))
    return found


def least_needed(anatomy: Anatomy, remove: int, calibrator: Calibrator) -> list[int]:
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


def loss_increases(anatomy: Anatomy, calibrator: Calibrator, dense: float) -> list[list[float]]:
    """increases[block][0]: loss increase in nats without that block; `dense` is the loss of the whole model."""
    increases = []
    for index in range(len(anatomy.blocks)):
        with bypassed(anatomy, [index]):
            increases.append([calibrator.loss(anatomy.model, WINDOWS) - dense])
    return increases
