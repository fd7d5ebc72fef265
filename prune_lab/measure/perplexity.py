"""Token-level perplexity, the figure that pruning papers quote, and the dense model beside the compressed one."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from prune_lab.measure.divergence import Divergence, divergence_of, perplexity_of, position_divergences
from prune_lab.models.anatomy import Anatomy
from prune_lab.models.blocks import BlockStream
from prune_lab.models.loss import by_chunks, logits_of, losses_at, target_states, targets_of
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
    bos: Bos = NO_BOS, world: World | None = None,
) -> tuple[Tensor, Divergence | None]:  # fmt: skip
    """Losses as `measure_losses` has them, and the divergence from `dense` at the targets of the first windows.

    compared: how many windows the dense model runs on as well, beside the model and in the same batches, so that equal
    models diverge by exactly 0; where it is 0 there is no divergence. Of both models' logits a few positions are held
    at a time. world: the processes that share the windows out, those of both models and the others apart; each of them
    has the result of all.
    """
    parts = [windows[:compared], windows[compared:]]
    of_parts = [(world or World()).over(len(part)) for part in parts]
    mine = [of_part.part(part) for of_part, part in zip(of_parts, parts, strict=True)]
    found, both = _measure(model, dense, len(mine[0]), torch.cat(mine), batch_size, device, console, bos)
    by_part = found.split([len(part) for part in mine])
    losses = torch.cat([of_part.gather(part) for of_part, part in zip(of_parts, by_part, strict=True)])
    if both is None:
        return losses, None
    kl, same = of_parts[0].gather(both).unbind(1)
    return losses, divergence_of(kl, same)


def _measure(
    model: Any, dense: Any, compared: int, windows: Tensor, batch_size: int, device: Device, console: Console, bos: Bos
) -> tuple[Tensor, Tensor | None]:
    """Losses of some windows, and KL divergence and sameness at the targets of the first ones, (targets, 2)."""
    tokens = bos.before(windows)
    shared = tokens[: -(-compared // batch_size) * batch_size]  # whole batches: others would round otherwise
    steps = sum(_steps(of, text) for of, text in ((model, tokens), (dense, shared)) if len(text))
    losses, divergences = list[Tensor](), list[Tensor]()
    what = "perplexity beside the dense model" if compared else "perplexity"
    with console.progress(steps, what, unit="tok") as bar:
        passes = _Passes(model, tokens, batch_size, bos.length, bar.update)
        beside = _Passes(dense, shared, batch_size, bos.length, bar.update) if compared else None
        for number, batch in enumerate(tokens.split(batch_size)):
            placed = batch.to(device.torch_device, torch.int64)
            states, targets = passes.states(number, placed), targets_of(placed, bos.length)
            if beside is not None and number * batch_size < compared:
                both = _compare(model, states, dense, beside.states(number, placed), targets)
                losses.append(both[:, 0].float().view(targets.shape))
                divergences.append(both[:, 1:])
            else:
                losses.append(losses_at(model, states, targets).cpu())
    at_targets = torch.cat(divergences)[: compared * (windows.shape[1] - 1)] if compared else None
    return torch.cat(losses), at_targets


def _compare(model: Any, states: Tensor, dense: Any, states_of_dense: Tensor, targets: Tensor) -> Tensor:
    """Loss, KL divergence, and 1 where the likeliest token is the same: (positions, 3), float64, on the CPU."""

    def of_rows(mine: Tensor, theirs: Tensor, wanted: Tensor) -> Tensor:
        logits = logits_of(model, mine)
        kl, same = position_divergences(logits_of(dense, theirs), logits)
        return torch.stack([cross_entropy(logits, wanted, reduction="none").double(), kl, same.double()], 1)

    return by_chunks(model, of_rows, states.flatten(0, 1), states_of_dense.flatten(0, 1), targets.flatten()).cpu()


class _Passes:
    """Forward passes of a model over windows, batch by batch; `done` is told of tokens passed.

    Through a model on disk every window passes a block before the next block is read.
    """

    def __init__(self, model: Any, tokens: Tensor, batch_size: int, prefix: int, done: Callable[[int], Any]) -> None:
        self._model, self._prefix, self._done = model, prefix, done
        self._stream: BlockStream | None = None
        if Anatomy(model).is_on_disk:
            self._stream = BlockStream(Anatomy(model), tokens, batch_size)
            self._stream.run(done)

    def states(self, number: int, batch: Tensor) -> Tensor:
        """Last hidden states of a batch at the positions that predict its targets: (windows, seq_len - 1, hidden)."""
        if self._stream is None:
            self._done(batch.numel())
        with self._stream.replayed(number) if self._stream is not None else nullcontext():
            return target_states(self._model, batch, self._prefix)


def _steps(model: Any, tokens: Tensor) -> int:
    """Tokens that the progress bar counts for a model: those on disk pass block by block."""
    anatomy = Anatomy(model)
    return tokens.numel() * (len(anatomy.blocks) if anatomy.is_on_disk else 1)
