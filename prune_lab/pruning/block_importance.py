"""Importance of whole decoder blocks: by how they change the states, or by what the model loses without them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from prune_lab.errors import Refused
from prune_lab.measure.divergence import position_divergences
from prune_lab.models.anatomy import Anatomy
from prune_lab.models.blocks import BlockStream, bypassed
from prune_lab.models.loss import by_chunks, logits_of, target_states
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


def least_distant(anatomy: Anatomy, remove: int, calibrator: Calibrator) -> list[int]:
    """The run of `remove` blocks whose entrance and exit are nearest in angle, the first one among equals."""
    distances: list[list[float]] = calibrator.remember(
        anatomy, "block_distances", {}, lambda: _distances(calibrator, anatomy)
    )
    starts = range(len(distances) - remove)
    first = min(starts, key=lambda start: (distances[start][start + remove], start))
    return list(range(first, first + remove))


@torch.no_grad()
def _distances(calibrator: Calibrator, anatomy: Anatomy) -> list[list[float]]:
    """Angle between the states at two places, as a share of a half turn: before each block, and after the last one.

    arccos(cos) / pi of the last token of each window, the mean over windows (Gromov et al., 2403.17887).
    """
    stream, count = BlockStream(anatomy, calibrator.windows, calibrator.batch_size), len(anatomy.blocks)

    def last_tokens() -> Tensor:
        return torch.cat([stream.states[number][:, -1].double() for number in range(len(stream.states))])

    places = [last_tokens()]
    with calibrator.console.progress(count * calibrator.windows.numel(), "angles of blocks", unit="tok") as bar:
        for index in range(count):
            calibrator.forward(stream, index, bar, keep=True)
            places.append(last_tokens())
    units = torch.nn.functional.normalize(torch.stack(places), dim=-1)  # (places, windows, hidden)
    cosines = torch.einsum("pwh,qwh->pqw", units, units).clamp(-1, 1)
    found: list[list[float]] = (cosines.arccos() / math.pi).mean(-1).tolist()
    return found


def least_needed(anatomy: Anatomy, remove: int, calibrator: Calibrator, by: str) -> list[int]:
    """Blocks in the order of their removal; each is the one without which the model loses least at that point.

    by: perplexity, the loss on the calibration text; kl, the divergence from the whole model on it.
    """

    @cache
    def measure() -> Callable[[Any], float]:
        return calibrator.loss if by == "perplexity" else divergence_from(anatomy, calibrator)

    left, dropped = list(range(len(anatomy.blocks))), list[int]()
    passes = sum(len(left) - step for step in range(remove))
    with calibrator.console.progress(passes, "trying blocks", unit="pass") as bar:

        def without_each() -> list[float]:
            """The measure without each block that is left."""
            of_model, losses = measure(), []
            for index in left:
                with bypassed(anatomy, [*dropped, index]):
                    losses.append(of_model(anatomy.model))
                bar.update()
            return losses

        for _ in range(remove):
            losses = calibrator.remember(anatomy, "block_losses", {"dropped": dropped, "by": by}, without_each)
            if not any(math.isfinite(loss) for loss in losses):
                raise Refused(
                    f"method.by={by}: what the model loses without each block is not finite: its activations overflow; "
                    "give dtype=float32 or bfloat16"
                )
            _, index = min(
                (loss if math.isfinite(loss) else math.inf, index) for loss, index in zip(losses, left, strict=True)
            )
            dropped.append(index)
            left.remove(index)
    return dropped


@torch.no_grad()
def divergence_from(anatomy: Anatomy, calibrator: Calibrator) -> Callable[[Any], float]:
    """Function of a model: its mean KL divergence in nats from the model as it is now, over all targets of the windows.

    The last states of the whole model are held, windows x seq_len x hidden numbers.
    """
    device, prefix = next(anatomy.model.parameters()).device, calibrator.prefix
    batches = [batch.to(device) for batch in calibrator.windows.split(calibrator.batch_size)]
    whole = [target_states(anatomy.model, batch, prefix).flatten(0, 1) for batch in batches]

    @torch.no_grad()
    def divergence(model: Any) -> float:
        def of_rows(dense: Tensor, states: Tensor) -> Tensor:
            return position_divergences(logits_of(model, dense), logits_of(model, states))[0]

        parts = [
            by_chunks(model, of_rows, dense, target_states(model, batch, prefix).flatten(0, 1))
            for dense, batch in zip(whole, batches, strict=True)
        ]
        return float(torch.cat(parts).mean())

    return divergence


def loss_increases(anatomy: Anatomy, calibrator: Calibrator, dense: float) -> list[list[float]]:
    """increases[block][0]: loss increase in nats without that block; `dense` is the loss of the whole model."""
    increases = []
    for index in range(len(anatomy.blocks)):
        with bypassed(anatomy, [index]):
            increases.append([calibrator.loss(anatomy.model, WINDOWS) - dense])
    return increases
