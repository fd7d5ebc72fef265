"""Calibration: what methods see of the activations, block by block, each distinct input observed once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from prune_lab.models.anatomy import Anatomy
from prune_lab.models.blocks import BlockStream
from prune_lab.models.loss import window_losses
from prune_lab.pruning import gradients
from prune_lab.pruning.dense_statistics import dense_statistics
from prune_lab.pruning.observing import observing, shared
from prune_lab.pruning.seen import GRADIENTS, NEEDS, Seen
from prune_lab.system.console import Console
from prune_lab.text.tokens import sha256


@dataclass(frozen=True)
class Calibrator:
    """Puts calibration windows, shape (windows, prefix + seq_len), through models.

    prefix: tokens before the text of each window (a BOS token): they are seen, and the first token after them is no
    target of a loss.
    propagate: what the blocks after a pruned one see: its outputs as "pruned", or those of the "dense" block, which
    costs half and makes the statistics independent of the amount: they are computed once, as are gradients, block
    influence and scans, which are of the dense model either way (see dense_cache.py).
    bfloat16: whether blocks multiply in bfloat16 as the windows pass; sums over inputs are float32 either way.
    """

    windows: Tensor
    propagate: str = "pruned"
    batch_size: int = 16
    bfloat16: bool = False
    prefix: int = 0
    console: Console = Console(quiet=True)  # noqa: RUF009 - it has no state

    def walk(self, anatomy: Anatomy, needs: frozenset[str], dense: bool = False) -> Iterator[dict[str, Seen]]:
        """For each block in order, what was seen at each of its Linears, by full name.

        Statistics of one block are held at a time. The block is at hand, and free to be changed before the next one is
        asked for: with propagate="pruned" its inputs come from the changed block. `dense` overrules that: one pass.
        """
        wanted = needs & frozenset(NEEDS)
        if not wanted:
            yield from unseen(anatomy)
            return
        propagate_pruned = not dense and self.propagate == "pruned"
        facts = None if propagate_pruned else anatomy.dense_cache
        if facts is None:
            yield from self._observe(anatomy, propagate_pruned, wanted)
            return
        observe = partial(self._observe, anatomy, False)
        yield from dense_statistics(facts, self._of, len(anatomy.blocks), wanted, observe)

    def _observe(self, anatomy: Anatomy, propagate_pruned: bool, wanted: frozenset[str]) -> Iterator[dict[str, Seen]]:
        linears, stream = anatomy.linears_by_block(), BlockStream(anatomy, self.windows, self.batch_size)
        last = len(linears) - 1  # nothing needs the outputs of the last block
        passes = len(linears) + last * propagate_pruned
        with self.console.progress(passes * self.windows.numel(), "calibrating", unit="tok") as bar:
            for index, of_block in enumerate(linears):
                keep = index < last and not propagate_pruned
                with anatomy.at_hand(index):
                    with observing(anatomy.blocks[index], of_block, wanted, stop=not keep) as statistics:
                        self.forward(stream, index, bar, keep)
                    yield shared(statistics)
                    if propagate_pruned and index < last:
                        self.forward(stream, index, bar, keep=True)

    def forward(self, stream: BlockStream, block: int, bar: Any, keep: bool) -> None:
        """Puts all states through a block; `keep`: its outputs become the states. Each batch moves the progress bar."""
        device = stream.states[0].device.type
        for number in range(len(stream.states)):
            with torch.autocast(device, torch.bfloat16, enabled=self.bfloat16):
                if keep:
                    stream.states[number] = stream.output(block, number)
                else:
                    stream.look(block, number)
            bar.update(stream.states[number].shape[:2].numel())

    @cached_property
    def _of(self) -> dict[str, Any]:
        """What a statistic of the dense model depends on beside it."""
        n, seq_len = self.windows.shape
        text = {"tokens_sha256": sha256(self.windows), "n_samples": n, "seq_len": seq_len}
        return {
            **text,
            "batch_size": self.batch_size,
            "propagate": "dense",
            "bfloat16": self.bfloat16,
            "prefix": self.prefix,
        }

    def remember(
        self, anatomy: Anatomy, kind: str, of: dict[str, Any], compute: Callable[[], Any], modules: tuple[str, ...] = ()
    ) -> Any:
        """What `compute` finds out from the windows, once if the model is the dense one: numbers, lists, dictionaries.

        of: what it depends on beside the model and the windows; modules: full names of those outside of
        models.dense.SOURCE that compute it.
        """
        facts = anatomy.dense_cache
        return compute() if facts is None else facts.value(kind, {**self._of, **of}, compute, modules)

    def saliency(
        self,
        anatomy: Anatomy,
        order: int,
        parts: str = "weights",
        reduce: gradients.Reduce = lambda name, value: value,
        only: Collection[str] | None = None,
    ) -> dict[str, Tensor]:
        """Gradient saliency (pruning/gradients.py), once for the dense model; `parts` names what is reduced to."""

        def compute() -> Iterator[dict[str, Tensor]]:
            yield gradients.saliency(anatomy, self.windows, order, self.console, reduce, only, self.prefix)

        facts, kind = anatomy.dense_cache, GRADIENTS[order - 1]
        if facts is None:
            return next(compute())
        of = {key: value for key, value in self._of.items() if key != "batch_size"} | {"parts": parts}
        (found,) = facts.parts(facts.key(kind, of), kind, 1, compute)
        return found

    def loss(self, model: Any, windows: int | None = None) -> float:
        """Mean cross-entropy of the next token in nats over the first `windows` windows (all of them by default)."""
        device = next(model.parameters()).device
        batches = self.windows[:windows].split(self.batch_size)
        losses = [window_losses(model, batch.to(device), self.prefix) for batch in batches]
        return float(torch.cat(losses).double().mean())


def unseen(anatomy: Anatomy) -> Iterator[dict[str, Seen]]:
    """Each block in order, at hand, for those who need to see nothing of its inputs."""
    for index, of_block in enumerate(anatomy.linears_by_block()):
        with anatomy.at_hand(index):
            yield {name: Seen() for name, _ in of_block}
