"""Disk offloading: a block's weights are loaded on entry and written back on exit.

What is not in a block (embeddings, the last norm, the head) and all buffers are always there. For every other model
the functions here do nothing, so that those who use them read the same for both.

A run with such a model holds: the interpreter (some 300 MB); embeddings, last norm, head; one block (two on a GPU);
states of the windows, 256 MB of them at most (states.py), the others in a file; and while a block is at work, what
pruning its largest matrix takes (about 20 bytes for each of its weights; SparseGPT: inputs x inputs x 4 bytes several
times) and the activations of one batch. The pruned weights go to `.weights` in the run's folder, as large as the model.
"""

from __future__ import annotations

import copy
import os
import shutil
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from prune_lab.models.offload.prefetch import Prefetch
from prune_lab.models.shards import INDEX, Shards, lay_out
from prune_lab.system.device import Device

_WEIGHTS = "_weights_on_disk"  # where a model keeps them


def weights_on_disk(model: Any) -> DiskWeights | None:
    """Offloaded weights of a model, or None where it is in memory."""
    found: DiskWeights | None = model.__dict__.get(_WEIGHTS)
    return found


def at_hand(model: Any, block: str) -> AbstractContextManager[None]:
    """Context in which the block of that name has its weights; changes are written when it ends."""
    weights = weights_on_disk(model)
    return nullcontext() if weights is None else weights.at_hand(model, block)


def value(model: Any, name: str, tensor: Tensor) -> Tensor:
    """A tensor of the model, read from disk."""
    weights = weights_on_disk(model)
    return tensor if weights is None or not tensor.is_meta else weights.read(name)


def own_copy(model: Any, folder: Path) -> Any:
    """A copy to be changed. If the model is on disk, the copy's blocks are too, in `folder`, while the copy lives."""
    weights = weights_on_disk(model)
    if weights is None:
        return copy.deepcopy(model)
    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()] if not tensor.is_meta}
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
    folder.mkdir(parents=True)
    own = DiskWeights(weights.source, weights.blocks, weights.device, lay_out_model(model, folder))
    copied = copy.deepcopy(model, shared | {id(weights): own})
    weakref.finalize(copied, shutil.rmtree, folder, ignore_errors=True)
    return copied


def stored_tensors(model: Any) -> dict[str, Tensor]:
    """Tensors that are saved of a model by name, those on disk without values; a tied matrix by its first name."""
    seen, found = set[int](), dict[str, Tensor]()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor.detach()
    return found


def lay_out_model(model: Any, folder: Path) -> Shards:
    """Files with room for a model, as save_pretrained has them; their tensors by the model's own names."""
    from prune_lab.models.anatomy import family_of  # which asks this module where a block's weights are

    tensors, family = stored_tensors(model), family_of(model.config.model_type)
    shards = lay_out(folder, {family.stored_name(name): tensor for name, tensor in tensors.items()})
    return Shards({name: shards.spans[family.stored_name(name)] for name in tensors})


class DiskWeights:
    """The weights of a model's blocks; `source` is never written to, `own` has what was changed of a copy."""

    def __init__(self, source: Shards, blocks: list[str], device: Device, own: Shards | None = None) -> None:
        self.source, self.blocks, self.device = source, blocks, device
        self._own, self._written = own, set[str]()
        self._at_hand: str | None = None
        self._prefetch = Prefetch(device.torch_device)

    def attach(self, model: Any) -> None:
        """Makes them the weights of a model, whose blocks are on the meta device."""
        model.__dict__[_WEIGHTS] = self

    def read(self, name: str) -> Tensor:
        """A tensor as it is now, on the CPU, in the run's number type."""
        shards = self._own if self._own is not None and name in self._written else self.source
        return shards.read(name).to(self.device.dtype)

    @contextmanager
    def at_hand(self, model: Any, block: str) -> Iterator[None]:
        """See the function of this name. For a GPU, the block after it is on its way meanwhile: two are held then."""
        if self._at_hand == block:
            yield
            return
        assert self._at_hand is None, f"{block} is asked for while {self._at_hand} is at hand"
        module: nn.Module = model.get_submodule(block)
        empty = dict(module.named_parameters())
        names, self._at_hand = list(empty), block
        brought = self._prefetch.take(block, lambda: self._read_block(block, names))
        held = {name: nn.Parameter(brought.pop(name), requires_grad=False) for name in names}
        versions = {name: tensor._version for name, tensor in held.items()}
        if self.device.is_cuda:
            self._start_next(model, block)
        try:
            _set_parameters(module, held)
            yield
            for name, tensor in module.named_parameters():
                if tensor is not held[name] or tensor._version != versions[name]:
                    self._write(f"{block}.{name}", tensor)
        finally:
            _set_parameters(module, empty)
            self._at_hand = None

    def save(self, model: Any, folder: Path) -> None:
        """Puts the files of a copy into `folder`: links to its own where the disk allows it, so they stay one."""
        assert self._own is not None, "only a copy is saved"
        for name, tensor in stored_tensors(model).items():
            if name not in self._written:
                self._write(name, value(model, name, tensor))
        files = self._own.files
        for file in [*files, files[0].parent / INDEX]:
            if file.is_file():
                _link(file, folder / file.name)

    def _read_block(self, block: str, names: list[str]) -> dict[str, Tensor]:
        return {name: self.read(f"{block}.{name}") for name in names}

    def _start_next(self, model: Any, block: str) -> None:
        place = self.blocks.index(block) + 1
        if place < len(self.blocks):
            following = self.blocks[place]
            names = [name for name, _ in model.get_submodule(following).named_parameters()]
            self._prefetch.start(following, lambda: self._read_block(following, names))

    def _write(self, name: str, tensor: Tensor) -> None:
        assert self._own is not None, f"{name} of the dense model was changed"
        self._own.write(name, tensor)
        self._written.add(name)


def _set_parameters(module: nn.Module, parameters: dict[str, nn.Parameter]) -> None:
    for name, parameter in parameters.items():
        owner, _, last = name.rpartition(".")
        setattr(module.get_submodule(owner), last, parameter)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without links
        shutil.copyfile(source, target)
