"""Token-level perplexity, the figure that pruning papers quote, and the dense model beside the compressed one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from prune_lab.measure.divergence import Divergence, divergence_of, perplexity_of, position_divergences
from prune_lab.models.anatomy import Anatomy
from prune_lab.models.blocks import BlockStream
from prune_lab.models.loss import by_chunks, logits_of, losses_at, target_states
from prune_lab.system.console import Console
from prune_lab.system.device import Device
from prune_lab.system.world import World
from prune_lab.text.bos import NO_BOS, Bos


@dataclass(frozen=True)
class Quality:
    """Perplexity, and bits per byte, which a tokenizer cannot flatter. Each field is a metric of its name."""

    perplexity: float
    bits_per_byte: float


def quality_of(losses: Tensor, bytes_per_token: float) -> Quality:
    """Quality of a model with these losses, shape (windows, seq_len - 1): exp of their mean, and that mean in bits."""
    mean = float(losses.double().mean())
    return Quality(perplexity_of(mean), mean / math.log(2) / bytes_per_token)


def measure_losses(
    model: Any, windows: Tensor, batch_size: int, device: Device, console: Console, bos: Bos = NO_BOS,
    world: World | None = None,
) -> Tensor:  # fmt: skip
    """Cross-entropy of the next-token targets of each window in nats, shape (windows, seq_len - 1), fp32, on the CPU.

    `windows` has shape (windows, seq_len); with a `bos` it stands before each, and the targets are the same. The result
    does not depend on `batch_size`, nor on the `world` of processes that share the windows out, but for rounding.
    """
    return measure_beside(model, None, 0, windows, batch_size, device, console, bos, world)[0]


@torch.no_grad()
def measure_beside(
    model: Any, dense: Any, compared: int, windows: Tensor, batch_size: int, device: Device, console: Console,
    bos: Bos = NO_BOS, world: World | None = None, kept: Iterable[Tensor] | None = None,
) -> tuple[Tensor, Divergence | None]:  # fmt: skip
    """Losses as `measure_losses` has them, and the divergence from `dense` at the targets of the first windows.

    compared: how many windows the dense model runs on as well, beside the model and in the same batches, so that equal
    models diverge by exactly 0; where it is 0 there is no divergence. Of both models' logits a few positions are held
    at a time. world: the processes that share the windows out, those of both models and the others apart; each of them
    has the result of all. kept: the dense model's states in these batches, as `states_at_targets` has them, from before
    (measure/dense_states.py, in one process); then its head alone is used.
    """
    parts = [windows[:compared], windows[compared:]]
    of_parts = [(world or World()).over(len(part)) for part in parts]
    mine = [of_part.part(part) for of_part, part in zip(of_parts, parts, strict=True)]
    found, both = _measure(model, dense, len(mine[0]), torch.cat(mine), batch_size, device, console, bos, kept)
    by_part = found.split([len(part) for part in mine])
    losses = torch.cat([of_part.gather(part) for of_part, part in zip(of_parts, by_part, strict=True)])
    if both is None:
        return losses, None
    kl, same = of_parts[0].gather(both).unbind(1)
    return losses, divergence_of(kl, same)


def _measure(
    model: Any, dense: Any, compared: int, windows: Tensor, batch_size: int, device: Device, console: Console, bos: Bos,
    kept: Iterable[Tensor] | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Losses of some windows, and KL divergence and sameness at the targets of the first ones, (targets, 2)."""
    shared = windows[: in_whole_batches(compared, batch_size)]
    passing = [(model, windows), *([(dense, shared)] if len(shared) and kept is None else [])]
    losses, divergences = list[Tensor](), list[Tensor]()
    what = "perplexity beside the dense model" if compared and kept is None else "perplexity"
    with console.progress(sum(steps_of(of, bos.before(text)) for of, text in passing), what, unit="tok") as bar:
        mine = states_at_targets(model, windows, batch_size, device, bos, bar.update)
        beside = iter(kept or states_at_targets(dense, shared, batch_size, device, bos, bar.update))
        for number, states in enumerate(mine):
            first = number * batch_size
            targets = windows[first : first + batch_size, 1:].to(device.torch_device, torch.int64)
            if first < compared:
                both = _compare(model, states, dense, next(beside), targets)
                losses.append(both[:, 0].float().view(targets.shape))
                divergences.append(both[:, 1:])
            else:
                losses.append(losses_at(model, states, targets).cpu())
    at_targets = torch.cat(divergences)[: compared * (windows.shape[1] - 1)] if compared else None
    return torch.cat(losses), at_targets


def in_whole_batches(compared: int, batch_size: int) -> int:
    """Number of windows in the batches that hold the first `compared`; in other batches a model rounds otherwise."""
    return -(-compared // batch_size) * batch_size


@torch.no_grad()
def losses_from(model: Any, kept: Iterable[Tensor], windows: Tensor, batch_size: int, device: Device) -> Tensor:
    """Losses as `measure_losses` has them, of a model whose states at the targets are known, batch by batch."""
    targets = windows[:, 1:].to(device.torch_device, torch.int64).split(batch_size)
    return torch.cat([losses_at(model, states, of).cpu() for states, of in zip(kept, targets, strict=True)])


@torch.no_grad()
def states_at_targets(
    model: Any, windows: Tensor, batch_size: int, device: Device, bos: Bos, done: Callable[[int], Any]
) -> Iterator[Tensor]:
    """Last hidden states at the positions that predict the targets of windows: (windows, seq_len - 1, hidden) by batch.

    `done` is told of the tokens that have passed. Each batch passes when it is asked for; but through a model on disk
    all windows pass a block before the next block is read.
    """
    tokens, stream = bos.before(windows), None
    if Anatomy(model).is_on_disk:
        stream = BlockStream(Anatomy(model), tokens, batch_size)
        stream.run(done)
    for number, batch in enumerate(tokens.split(batch_size)):
        placed = batch.to(device.torch_device, torch.int64)
        if stream is None:
            done(placed.numel())
        with stream.replayed(number) if stream is not None else nullcontext():
            states = target_states(model, placed, bos.length)
        yield states


def _compare(model: Any, states: Tensor, dense: Any, states_of_dense: Tensor, targets: Tensor) -> Tensor:
    """Loss, KL divergence, and 1 where the likeliest token is the same: (positions, 3), float64, on the CPU."""

    def of_rows(mine: Tensor, theirs: Tensor, wanted: Tensor) -> Tensor:
        logits = logits_of(model, mine)
        kl, same = position_divergences(logits_of(dense, theirs), logits)
        return torch.stack([cross_entropy(logits, wanted, reduction="none").double(), kl, same.double()], 1)

    return by_chunks(model, of_rows, states.flatten(0, 1), states_of_dense.flatten(0, 1), targets.flatten()).cpu()


def steps_of(model: Any, tokens: Tensor) -> int:
    """Tokens that the progress bar counts for a model: those on disk pass block by block."""
    anatomy = Anatomy(model)
    return tokens.numel() * (len(anatomy.blocks) if anatomy.is_on_disk else 1)
