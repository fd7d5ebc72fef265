"""The loop of recovery=reconstruct: once through the decoder blocks, each trained beside the dense one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from prune_lab.models.anatomy import Anatomy
from prune_lab.models.blocks import BlockStream, recorded
from prune_lab.pruning.masks import clear
from prune_lab.recovery import checkpoint
from prune_lab.recovery.context import TrainingContext
from prune_lab.recovery.optimizer import lr_factor
from prune_lab.recovery.order import WindowOrder
from prune_lab.recovery.reconstruct import Reconstruct
from prune_lab.system.device import uses_bfloat16


def reconstruct(model: Any, recipe: Reconstruct, training: TrainingContext) -> None:
    """Prunes `model` and trains what is left of its blocks in place, one of them in float32 at a time.

    The dense states of all windows are held: steps x batch_size x seq_len x hidden numbers. A checkpoint left by an
    interrupted run is gone on from, and ends in the same weights.
    """
    first = _begin(model, training)
    model.requires_grad_(False)  # but for the weights that learn, while they do
    pruned, dense = Anatomy(model), Anatomy(training.dense.model)
    changed = [_changed_parts(pruned, dense, index) for index in range(len(pruned.blocks))]
    if not any(changed):
        training.warn("recovery=reconstruct trained nothing: nothing was pruned")
        return
    text = training.tokens.enough("train", training.seq_len)
    order = WindowOrder(text, training.seq_len, recipe.batch_size, training.seed)
    windows = training.bos.before(torch.cat([order.batch(step) for step in range(recipe.steps)]))
    of_dense = BlockStream(dense, windows, recipe.batch_size)
    of_pruned = BlockStream(pruned, windows[: recipe.batch_size], recipe.batch_size)  # for what blocks are called with
    count = len(changed)
    with training.console.progress(count * windows.numel(), "reconstructing", unit="tok") as bar:
        for index in range(count):
            parts = changed[index] if index >= first else []
            if parts:
                error = _BlockTraining(index, pruned.blocks[index], parts, of_dense, of_pruned, recipe, training).run(
                    bar
                )
                training.log(index + 1, {"train/loss": error})
                bar.set_postfix(error=f"{error:.4f}")
            else:
                for number in range(recipe.steps):
                    of_dense.states[number] = of_dense.output(index, number)
                bar.update(windows.numel())
            if index >= first and (index + 1) % recipe.checkpoint_every == 0 and index + 1 < count:
                _save(model, training, index + 1)


@dataclass(frozen=True)
class Part:
    """Attention or MLP of a block, in both models: the Linears that read the states, and the one that writes to them.

    Linears are by full name.
    """

    pruned: dict[str, Any]
    dense: dict[str, Any]
    writer: str

    @property
    def readers(self) -> list[str]:
        """The Linears that read the states."""
        return [name for name in self.pruned if name != self.writer]

    @property
    def is_changed(self) -> bool:
        """True where something was pruned; else training would follow rounding errors."""
        pairs = ((linear.weight, self.dense[name].weight) for name, linear in self.pruned.items())
        return any(mine.shape != other.shape or not torch.equal(mine, other) for mine, other in pairs)


class _BlockTraining:
    """The training of a block's changed parts: all else of it stays as it is."""

    def __init__(
        self, index: int, block: nn.Module, parts: list[Part], of_dense: BlockStream, of_pruned: BlockStream,
        recipe: Reconstruct, training: TrainingContext,
    ) -> None:  # fmt: skip
        self._index, self._block, self._parts, self._recipe = index, block, parts, recipe
        self._of_dense, self._of_pruned = of_dense, of_pruned
        self._linears = {name: linear for part in parts for name, linear in part.pruned.items()}
        masks = training.pruned.masks.keep
        self._masks = {name: masks[name].to(training.device.torch_device) for name in self._linears if name in masks}
        device = training.device.torch_device
        bfloat16 = uses_bfloat16(recipe.autocast, device)
        self._autocast = torch.autocast(device.type, torch.bfloat16, enabled=bfloat16)
        self._dtype = None if bfloat16 else torch.float32

    def run(self, bar: Any) -> float:
        """Trains for all steps, moves the dense states on, and returns the error of the last step."""
        recipe, states, error = self._recipe, self._of_dense.states, 0.0
        weights = [weight for linear in self._linears.values() for weight in linear.parameters()]
        with _in_float32(self._block, weights):
            optimizer = torch.optim.AdamW(weights, betas=(recipe.beta1, recipe.beta2), weight_decay=0.0, fused=True)
            for step in range(recipe.steps):
                factor = lr_factor(step, recipe.steps, recipe.warmup, recipe.final_lr)
                optimizer.param_groups[0]["lr"] = recipe.lr * factor
                loss, following = self._error(step)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                for name, keep in self._masks.items():
                    clear(self._linears[name].weight, keep)
                bar.update(states[step].shape[:2].numel())
                states[step], error = following, float(loss.detach())
        return error

    def _error(self, number: int) -> tuple[Tensor, Tensor]:
        """Squared error of the parts' outputs on a batch, relative to the dense ones; and the next dense states.

        The mean over attention and MLP, where both are trained.
        """
        with recorded({name: linear for part in self._parts for name, linear in part.dense.items()}) as wanted:
            following = self._of_dense.output(self._index, number)
        readers = [(self._linears[name], wanted[name][0]) for part in self._parts for name in part.readers]
        writers = {part.writer: self._linears[part.writer] for part in self._parts}
        with _given(readers), recorded(writers) as found, torch.enable_grad(), self._autocast:
            self._of_pruned.call(self._index, self._of_dense.states[number], self._dtype)
            errors = [_relative_error(found[name][1], wanted[name][1]) for name in writers]
            return torch.stack(errors).mean(), following


def _relative_error(found: Tensor, wanted: Tensor) -> Tensor:
    wanted = wanted.float()
    return (found.float() - wanted).square().sum() / wanted.square().sum().clamp(min=torch.finfo(torch.float32).tiny)


def _begin(model: Any, training: TrainingContext) -> int:
    """Prunes the model, or brings it to where a checkpoint left it; returns the first block to train."""
    saved = checkpoint.read(training.checkpoint)
    if saved is None:
        training.prune_before(0)
        return 0
    saved.shape_model(model)
    training.pruned = saved.pruned
    saved.fill(model, None)
    training.console.note(f"going on from the checkpoint after block {saved.step}")
    return saved.step


def _save(model: Any, training: TrainingContext, blocks: int) -> None:
    try:
        checkpoint.save(training.checkpoint, blocks, model, None, training.pruned, kept={}, best={})
    except (OSError, SafetensorError) as error:  # a full disk, say: the training itself does not need it
        training.warn(f"no checkpoint after block {blocks}: {error}")


def _changed_parts(pruned: Anatomy, dense: Anatomy, index: int) -> list[Part]:
    """Attention and MLP of a block, as far as something was pruned of them."""
    parts = []
    for kind in pruned.family.units:
        mine, other = (anatomy.unit_linears(kind)[index] for anatomy in (pruned, dense))
        part = Part({one.name: one.linear for one in mine}, {one.name: one.linear for one in other}, mine[-1].name)
        parts += [part] if part.is_changed else []
    return parts


@contextmanager
def _in_float32(block: nn.Module, learning: list[Any]) -> Iterator[None]:
    """Context in which a block is float32, since small updates vanish in 16 bits, and some of its weights learn."""
    dtypes = [(weight, weight.dtype) for weight in block.parameters()]
    for weight, _ in dtypes:
        weight.data = weight.data.float()
    for weight in learning:
        weight.requires_grad_(True)
    try:
        yield
    finally:
        for weight, dtype in dtypes:
            weight.requires_grad_(False)
            weight.data = weight.data.to(dtype)


@contextmanager
def _given(readers: list[tuple[nn.Module, Tensor]]) -> Iterator[None]:
    """Context in which each Linear reads what is given to it, whatever it is called with."""
    hooks = [
        linear.register_forward_pre_hook(lambda _, args, states=states: (states.to(args[0].dtype), *args[1:]))
        for linear, states in readers
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
