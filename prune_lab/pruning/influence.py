"""Block influence: how much each block changes the states that pass it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from prune_lab.models.anatomy import Anatomy
from prune_lab.models.blocks import BlockStream
from prune_lab.pruning.calibration import Calibrator


def block_influence(calibrator: Calibrator, anatomy: Anatomy) -> list[float]:
    """How much each block changes the direction of the states: 1 - mean over tokens of cos(before, after).

    ShortGPT's BI (Men et al., 2403.03853), between the block's own input and output: the model's last hidden
    state would be the one after the final norm. Computed once for the dense model.
    """
    found: list[float] = calibrator.remember(
        anatomy, "block_influence", {}, lambda: _of_each_block(calibrator, anatomy)
    )
    return found


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


def influence(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """1 - mean cosine between rows of the first and second of each pair, both of shape (tokens, hidden)."""
    cosines = [torch.cosine_similarity(was.float(), now.float(), dim=1) for was, now in pairs]
    return 1 - float(torch.cat(cosines).double().mean())
