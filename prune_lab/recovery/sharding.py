"""Models in training: unsharded, or sharded over the processes (FSDP)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from prune_lab.models.anatomy import Anatomy
from prune_lab.pruning.masks import Masks
from prune_lab.recovery.optimizer import adamw
from prune_lab.recovery.recipe import TrainingRecipe
from prune_lab.system.world import World

Result = TypeVar("Result")  # tensors, or a tuple of them


class Unsharded:
    """A model, its optimizer and its masks, all of them in this process."""

    def __init__(self, model: Any, optimizer: Optimizer, masks: Masks) -> None:
        self.model, self.optimizer, self.masks = model, optimizer, masks

    def gather(self) -> None:
        """Puts what was trained into the model and the optimizer that this was made from: here they are those."""

    def call(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Result of a function of the model and further arguments, such as a loss."""
        return function(self.model, *arguments)


class Sharded(Unsharded):
    """Model sharded over the processes: each has rows of every weight, of its optimizer state and of its mask.

    Fully sharded data parallel (ZeRO: Rajbhandari et al., 1910.02054; FSDP: Zhao et al., 2304.11277), by torch's
    fully_shard: a block's weights are put together while it computes, the gradients' means are spread as the weights
    are. The model and optimizer of `whole` are hollow until `gather` fills them: what changes a model between steps
    (pruning, rewinding, merging adapters) finds plain tensors, in every process. All processes do the same at once.

    bfloat16: the training computes in it, so blocks are put together in it.
    """

    def __init__(self, whole: Unsharded, recipe: TrainingRecipe, world: World, bfloat16: bool) -> None:
        from torch.distributed.fsdp import register_fsdp_forward_method

        self._whole = whole
        weights = {id(weight): weight for weight in whole.model.parameters()}
        model = copy.deepcopy(whole.model, weights)  # with the same weights, until they are sharded
        _shard(model, world, bfloat16)
        model.called = partial(_called, model)  # losses go past the model's own forward
        register_fsdp_forward_method(model, "called")
        super().__init__(model, adamw(model, recipe), _masks_of(model, whole.masks))
        for hollow, shard in self._pairs():
            state = whole.optimizer.state.pop(hollow, {})
            if state:
                same = hollow.shape
                self.optimizer.state[shard] = {k: _part(v, shard) if v.shape == same else v for k, v in state.items()}
            hollow.data = hollow.data.new_empty(0)

    @torch.no_grad()
    def gather(self) -> None:
        """Fills the model and the optimizer that this was made from, in every process; do not use this one again."""
        for hollow, shard in self._pairs():
            hollow.data = full(shard)
            state = self.optimizer.state.pop(shard, {})
            if state:
                self._whole.optimizer.state[hollow] = {key: full(value) for key, value in state.items()}

    def call(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Result as of an unsharded model: the weights outside of the blocks are put together meanwhile."""
        found: Result = self.model.called(function, *arguments)
        return found

    def _pairs(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """Each weight of the whole model, and its shard."""
        shards = dict(self.model.named_parameters())
        return [(weight, shards[name]) for name, weight in self._whole.model.named_parameters()]


def _called(model: Any, function: Callable[..., Result], *arguments: Any) -> Result:
    return function(model, *arguments)


@torch.no_grad()
def full(tensor: Tensor) -> Tensor:
    """A tensor of which every process has a part, put together in all of them; another one as it is."""
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole


def _shard(model: Any, world: World, bfloat16: bool) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(next(model.parameters()).device.type, (world.size,))
    # As autocast computes, but with no bfloat16 copy of every weight kept for the backward pass. What goes from block
    # to block, the embedding and the head stay float32, and gradients are averaged in it.
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for block in Anatomy(model).blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy if bfloat16 else MixedPrecisionPolicy())
    fully_shard(model, mesh=mesh, reshard_after_forward=True)  # always: between steps there are shards only


def _masks_of(model: Any, masks: Masks) -> Masks:
    return Masks({name: _part(keep, model.get_submodule(name).weight) for name, keep in masks.keep.items()})


def _part(tensor: Tensor, like: Any) -> Tensor:
    """Rows of a tensor that belong to this process, as it has them of the sharded tensor `like`."""
    from torch.distributed.tensor import DTensor

    mesh = like.device_mesh
    rows, rank = tensor.chunk(mesh.size()), mesh.get_local_rank()
    mine = rows[rank] if rank < len(rows) else tensor[:0]
    mine = mine.to(like.device).clone(memory_format=torch.contiguous_format)
    return DTensor.from_local(mine, mesh, like.placements, run_check=False, shape=tensor.shape, stride=like.stride())
