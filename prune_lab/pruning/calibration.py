"""Calibration: the statistics of every Linear, decoder block by decoder block, while calibration text passes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from inspect import signature
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from prune_lab.errors import Refused
from prune_lab.models.anatomy import Anatomy
from prune_lab.models.blocks import BlockStream
from prune_lab.models.found import Layout
from prune_lab.models.loss import window_losses
from prune_lab.pruning import gradients
from prune_lab.pruning.dense_beside import OF_TARGETS, DenseBeside, ErrorSums
from prune_lab.pruning.dense_statistics import dense_statistics
from prune_lab.pruning.expert_gates import ExpertGates
from prune_lab.pruning.scores import GRADIENTS
from prune_lab.pruning.statistics import GATED, BlockObserver, LinearStatistics, Needs, ProductObserver
from prune_lab.system.console import Console
from prune_lab.system.world import World
from prune_lab.text.tokens import sha256


@dataclass(frozen=True)
class Calibrator:
    """Calibration windows, shape (windows, prefix + seq_len), and how they pass through models.

    prefix: tokens before the text of each window (a BOS token): they are seen, and the first token after them is no
    target of a loss.
    propagate: the inputs of the blocks after a pruned one: its outputs as "pruned", or those of the "dense" block,
    which costs half and makes the statistics independent of the amount: they are computed once, as are gradients,
    block influence and sensitivities, which are of the dense model either way (dense_cache.py).
    bfloat16: whether blocks multiply in bfloat16 as the windows pass; sums over activations are float32 either way.
    world: processes that each have this calibrator, and share its windows out where there is one for each: every
    statistic is of all windows, in each of them, and `mine` are those that pass through the model here.
    """

    windows: Tensor
    propagate: str = "pruned"
    batch_size: int = 16
    bfloat16: bool = False
    prefix: int = 0
    console: Console = Console(quiet=True)  # noqa: RUF009 - it has no state
    world: World = World()  # noqa: RUF009 - it has none either

    @property
    def sharing(self) -> World:
        """The processes that share the windows out: this one alone where there are fewer windows than processes."""
        return self.world.over(len(self.windows))

    @property
    def mine(self) -> Tensor:
        """The windows that pass through the model in this process."""
        return self.sharing.part(self.windows)

    def forward(self, stream: BlockStream, block: int, bar: Any, keep: bool) -> None:
        """Passes all states through a block; `keep`: its outputs become the states. Each batch moves the bar."""

        def step(number: int) -> None:
            if keep:
                stream.states[number] = stream.output(block, number)
            else:
                stream.look(block, number)

        self.by_batch(stream, bar, step)

    def by_batch(self, stream: BlockStream, bar: Any, step: Callable[[int], None], passes: int = 1) -> None:
        """Calls `step` with the number of each batch of the states; what it multiplies is as `bfloat16` says.

        passes: how many blocks a step passes the states of a batch through, by which each of them moves the bar.
        """
        device = stream.states[0].device.type
        for number in range(len(stream.states)):
            with torch.autocast(device, torch.bfloat16, enabled=self.bfloat16):
                step(number)
            bar.update(passes * stream.states[number].shape[:2].numel())

    @torch.no_grad()
    def pass_whole(self, model: Any, what: str, watch: Callable[[], AbstractContextManager[Any]] = nullcontext) -> None:
        """Passes `mine` through a model as a whole, each batch within a context; what: the bar's name.

        Of a model on disk all windows pass a block before the next one is read: each batch is within the context once
        for each block.
        """
        anatomy = Anatomy(model)
        if anatomy.is_on_disk:
            self._pass_blocks(anatomy, what, watch)
            return
        # Not the logits of every token, which nobody looks at.
        few = {"logits_to_keep": 1} if "logits_to_keep" in signature(model.forward).parameters else {}
        with self.console.progress(self.mine.numel(), what, unit="tok") as bar:
            for batch in self.mine.split(self.batch_size):
                with torch.autocast(model.device.type, torch.bfloat16, enabled=self.bfloat16), watch():
                    model(input_ids=batch.to(model.device, torch.int64), use_cache=False, **few)
                bar.update(batch.numel())

    def _pass_blocks(self, anatomy: Anatomy, what: str, watch: Callable[[], AbstractContextManager[Any]]) -> None:
        stream = BlockStream(anatomy, self.mine, self.batch_size)

        def step(block: int, number: int) -> None:
            with watch():
                stream.states[number] = stream.output(block, number)

        count = len(anatomy.blocks)
        with self.console.progress(count * self.mine.numel(), what, unit="tok") as bar:
            for block in range(count):
                with anatomy.at_hand(block):
                    self.by_batch(stream, bar, partial(step, block))

    @cached_property
    def key(self) -> dict[str, Any]:
        """The part of a cache key that a statistic of the dense model owes to the calibration."""
        n, seq_len = self.windows.shape
        return {
            "tokens_sha256": sha256(self.windows),
            "n_samples": n,
            "seq_len": seq_len,
            "batch_size": self.batch_size,
            "propagate": "dense",
            "bfloat16": self.bfloat16,
            "prefix": self.prefix,
            "processes": self.sharing.size,  # sums round otherwise
        }

    def remember(
        self, anatomy: Anatomy, kind: str, of: dict[str, Any], compute: Callable[[], Any], modules: tuple[str, ...] = ()
    ) -> Any:
        """The result of `compute` (numbers, lists, dictionaries), computed once while the model is the dense one.

        of: what it depends on beside the model and the windows; modules: full names of the modules that compute it, of
        those outside dense_cache.SOURCE.
        """
        cache = anatomy.dense_cache
        return compute() if cache is None else cache.value(kind, {**self.key, **of}, compute, modules, self.sharing)

    def saliency(
        self,
        anatomy: Anatomy,
        order: int,
        granularity: str = "weights",
        reduce: gradients.Reduce = lambda name, value: value,
        only: Collection[str] | None = None,
    ) -> dict[str, Tensor]:
        """Gradient saliency (gradients.py), computed once for the dense model; granularity: what `reduce` sums to."""

        def compute() -> Iterator[dict[str, Tensor]]:
            yield gradients.saliency(
                anatomy, self.windows, order, self.console, reduce, only, self.prefix, self.sharing
            )

        cache, kind = anatomy.dense_cache, GRADIENTS[order - 1]
        if cache is None:
            return next(compute())
        of = {key: value for key, value in self.key.items() if key != "batch_size"} | {"parts": granularity}
        (found,) = cache.parts(cache.key(kind, of), kind, 1, compute, self.sharing)
        return found

    def loss(self, model: Any, windows: int | None = None) -> float:
        """Mean cross-entropy of the next token in nats over the first `windows` windows (all of them by default)."""
        device = next(model.parameters()).device
        first = self.windows[:windows]
        world = self.world.over(len(first))
        batches = world.part(first).split(self.batch_size)
        losses = [window_losses(model, batch.to(device), self.prefix) for batch in batches]
        return float(world.gather(torch.cat(losses)).double().mean())


def block_statistics(
    anatomy: Anatomy,
    needs: Needs,
    seed: int,
    calibrator: Calibrator | None,
    behind_dense: bool = False,
    saliency: Callable[[int], dict[str, Tensor]] | None = None,
) -> Iterator[dict[str, LinearStatistics]]:
    """Statistics of each Linear by full name, for one decoder block after the other: the one way through the blocks.

    needs: the statistics that are wanted, by Linear; without any, no calibrator is needed. Statistics of one block are
    held at a time. The block's weights are in memory, and may be changed before the next block is asked for: with
    propagate="pruned" the inputs of the next one come from the changed block, unless `behind_dense` says otherwise.
    Behind dense blocks there is no error of a refit's target: the inputs are the dense model's.
    saliency: the gradient saliency of an order by Linear, where it is not that of each weight. All Linears share one
    random generator, which starts from `seed`.
    """
    random, of_gradients = torch.Generator().manual_seed(seed), dict[str, dict[str, Tensor]]()
    wanted = frozenset().union(*needs.values())
    if wanted:
        assert calibrator is not None, "a calibrated method needs a calibrator"
        of_order = saliency or partial(calibrator.saliency, anatomy)
        of_gradients = {field: of_order(order) for order, field in enumerate(GRADIENTS, 1) if field in wanted}
    activations = {name: of_linear for name, fields in needs.items() if (of_linear := fields - frozenset(GRADIENTS))}
    names = [[name for name, _ in of_block] for of_block in anatomy.linears_by_block()]
    for of_block, observed in zip(names, _activations(anatomy, activations, calibrator, behind_dense), strict=True):
        yield {
            name: replace(
                observed.get(name, LinearStatistics()),
                random=random,
                **{field: of[name] for field, of in of_gradients.items() if name in of},  # type: ignore[arg-type]
            )
            for name in of_block
        }


def _activations(
    anatomy: Anatomy, needs: Needs, calibrator: Calibrator | None, behind_dense: bool
) -> Iterator[dict[str, LinearStatistics]]:
    """Statistics of activations, block by block: none, observed now, or those of the dense model, observed once."""
    propagate_pruned = not behind_dense and calibrator is not None and calibrator.propagate == "pruned"
    if not propagate_pruned:
        needs = {name: left for name, fields in needs.items() if (left := fields - frozenset(OF_TARGETS))}
    if not needs or calibrator is None:
        for index in range(len(anatomy.blocks)):
            with anatomy.at_hand(index):
                yield {}
        return
    cache = None if propagate_pruned else anatomy.dense_cache
    if anatomy.found is not None:
        observe = partial(_observe_found, anatomy, anatomy.found, calibrator, propagate_pruned)
    else:
        observe = partial(_observe, anatomy, calibrator, propagate_pruned)
    if cache is None:
        yield from observe(needs)
        return
    linears = [name for name, _ in anatomy.linears()]
    of = (calibrator.key, len(anatomy.blocks), linears, needs, observe, calibrator.sharing)
    yield from dense_statistics(cache, *of)


def _observe(
    anatomy: Anatomy, calibrator: Calibrator, propagate_pruned: bool, needs: Needs
) -> Iterator[dict[str, LinearStatistics]]:
    linears, stream = anatomy.linears_by_block(), BlockStream(anatomy, calibrator.mine, calibrator.batch_size)
    world = calibrator.sharing
    activations = {name: fields - frozenset(OF_TARGETS) for name, fields in needs.items()}
    beside = None
    if propagate_pruned and activations != needs:
        beside = DenseBeside(anatomy, calibrator.mine, calibrator.batch_size, needs)
    last = len(linears) - 1  # nothing needs the outputs of the last block
    passes = len(linears) + last * propagate_pruned + len(linears) * (beside is not None)
    with calibrator.console.progress(passes * calibrator.mine.numel(), "calibrating", unit="tok") as bar:
        for index, of_block in enumerate(linears):
            keep = index < last and not propagate_pruned
            observer = BlockObserver(of_block, activations, stop=not keep and beside is None)
            with anatomy.at_hand(index):
                if beside is None:
                    with observer.watch(anatomy.blocks[index]):
                        calibrator.forward(stream, index, bar, keep)
                    yield observer.statistics(world)
                else:
                    sums = ErrorSums()
                    observe = partial(beside.observe, index, pruned=stream, observer=observer, sums=sums)
                    calibrator.by_batch(stream, bar, observe, passes=2)
                    yield sums.put_into(observer.statistics(world), world)
                if propagate_pruned and index < last:
                    calibrator.forward(stream, index, bar, keep=True)


def _observe_found(
    anatomy: Anatomy, layout: Layout, calibrator: Calibrator, propagate_pruned: bool, needs: Needs
) -> Iterator[dict[str, LinearStatistics]]:
    """Statistics of a model whose layout was found: block by block, or of all blocks in one pass through the model.

    In one pass, where blocks cannot be called one by one: then the statistics of all of them are held at once, behind
    dense blocks.
    """
    if calibrator.bfloat16 and anatomy.model.dtype != torch.bfloat16:
        raise Refused(
            f"dataset.calibration.autocast: products in bfloat16 of a {anatomy.config.model_type} model with weights "
            f"in {anatomy.model.dtype} cannot be observed: give dtype=bfloat16, or dataset.calibration.autocast=none"
        )
    if not layout.one_by_one:
        yield from _observe_whole(anatomy, layout, calibrator, needs)
        return
    gates = _gates_for(anatomy.model, needs)
    count, stream = len(layout.matrices), BlockStream(anatomy, calibrator.mine, calibrator.batch_size)
    passes = count + (count - 1) * propagate_pruned
    with calibrator.console.progress(passes * calibrator.mine.numel(), "calibrating", unit="tok") as bar:
        for index, matrices in enumerate(layout.matrices):
            observer = ProductObserver(anatomy.model, matrices, needs, gates)
            with anatomy.at_hand(index):
                with observer.watch():
                    calibrator.forward(stream, index, bar, keep=not propagate_pruned)
                yield observer.statistics(calibrator.sharing)
                if propagate_pruned and index < count - 1:
                    calibrator.forward(stream, index, bar, keep=True)


def _gates_for(model: Any, needs: Needs) -> ExpertGates | None:
    return ExpertGates.of_model(model) if any(GATED in fields for fields in needs.values()) else None


@torch.no_grad()
def _observe_whole(
    anatomy: Anatomy, layout: Layout, calibrator: Calibrator, needs: Needs
) -> Iterator[dict[str, LinearStatistics]]:
    gates = _gates_for(anatomy.model, needs)
    observer = ProductObserver(anatomy.model, chain.from_iterable(layout.matrices), needs, gates)
    calibrator.pass_whole(anatomy.model, "calibrating", observer.watch)
    found = observer.statistics(calibrator.sharing)
    for matrices in layout.matrices:
        yield {matrix.name: found[matrix.name] for matrix in matrices if matrix.name in found}
