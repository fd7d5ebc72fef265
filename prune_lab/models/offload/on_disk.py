"""Disk offloading: a block's weights are loaded on entry and written back on exit.

What is not in a block (embeddings, the last norm, the head) and all buffers are always there. A block that is called
has its weights for that call, so that a model also runs as a whole, reading all of them each time. For every other
model the functions here do nothing, so that those who use them read the same for both.

A run with such a model holds: the interpreter (some 300 MB); embeddings, last norm, head; one block (two on a GPU);
states of the windows, 256 MB of them at most (states.py), the others in a file; and while a block is at work, what
pruning its largest matrix takes (about 20 bytes for each of its weights; SparseGPT: inputs x inputs x 4 bytes several
times) and the activations of one batch. The pruned weights go to the run's folder and are as large as the model.
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

from prune_lab.models.families import family_of
from prune_lab.models.offload.prefetch import Prefetch
from prune_lab.models.offload.stored import Stored, lay_out_converted, stored_tensors
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
    folder.mkdir(parents=True)
    own = DiskWeights(weights.source, weights.blocks, weights.device, weights.like)
    own.lay_out(model, folder)
    copied = copy.deepcopy(model, shared | {id(weights): own})
    own.attach(copied)
    weakref.finalize(copied, shutil.rmtree, folder, ignore_errors=True)
    return copied


def lay_out_model(model: Any, folder: Path) -> Shards:
    """Files with room for a model of a described family, as save_pretrained has them, by the model's own names."""
    tensors, family = stored_tensors(model), family_of(model.config.model_type)
    shards = lay_out(folder, {family.stored_name(name): tensor for name, tensor in tensors.items()})
    return Shards({name: shards.spans[family.stored_name(name)] for name in tensors})


class DiskWeights:
    """The weights of a model's blocks; `source` is never written to, files of a copy's own have what was changed of it.

    like: the model without values, of a type whose tensors are made of others in files. loads: how often a block came
    or went.
    """

    def __init__(self, source: Stored, blocks: list[str], device: Device, like: Any = None) -> None:
        self.source, self.blocks, self.device, self.like = source, blocks, device, like
        self.loads = 0
        self._own: Stored | None = None
        self._folder: Path | None = None
        self._written = set[str]()
        self._at_hand: str | None = None
        self._prefetch = Prefetch(device.torch_device)

    @property
    def list_of_blocks(self) -> str:
        """Full name of the list of blocks."""
        return self.blocks[0].rpartition(".")[0]

    def attach(self, model: Any) -> None:
        """Makes them the weights of a model, whose blocks are on the meta device: each has them when it is called."""
        model.__dict__[_WEIGHTS] = self
        for name in self.blocks:
            block = model.get_submodule(name)
            block.forward = _Forward(model, block, name)

    def lay_out(self, model: Any, folder: Path) -> None:
        """Begins files of their own for what is changed of a model."""
        self._folder, self._own = folder, self.files_for(model, folder)

    def files_for(self, model: Any, folder: Path) -> Stored:
        """Files with room for the model that these are the weights of, as save_pretrained has them."""
        if self.like is None:
            return Stored(lay_out_model(model, folder), self.device.dtype)
        tensors = {name: tensor.to("meta") for name, tensor in stored_tensors(model).items()}
        return lay_out_converted(self.like, tensors, folder)

    def for_cut(self, made: Any, like: Any) -> DiskWeights:
        """The weights of a copy that is cut: `made` is what it becomes, `like` the same without values.

        Nothing is in them but what both have in common with the source: whatever differs is to be `put`.
        """
        assert self._folder is not None, "only a copy is cut"
        folder = self._folder / "cut"
        folder.mkdir()
        weights = DiskWeights(self.source, self.blocks, self.device, like)
        weights.lay_out(made, folder)
        return weights

    def discard(self) -> None:
        """Removes the files of a copy that was cut."""
        assert self._own is not None, "the dense model's files stay"
        for file in self._own.files:
            file.unlink()

    def read(self, name: str) -> Tensor:
        """A tensor as it is now, on the CPU, in the run's number type."""
        return dict(self._read([name]))[name]

    def _read(self, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        own = [name for name in names if name in self._written]
        if self._own is not None and own:
            yield from self._own.read(own)
        yield from self.source.read([name for name in names if name not in self._written])

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
        held = {name: as_parameter(brought.pop(name)) for name in names}
        versions = {name: tensor._version for name, tensor in held.items()}
        if self.device.is_cuda:
            self._start_next(model, block)
        try:
            set_parameters(module, held)
            self.loads += 1
            yield
            changed = [
                f"{block}.{name}"
                for name, tensor in module.named_parameters()
                if tensor is not held[name] or tensor._version != versions[name]
            ]
            self.put(model, changed)
        finally:
            set_parameters(module, empty)
            self._at_hand = None
            self.loads += 1

    def put(self, model: Any, changed: list[str]) -> None:
        """Writes tensors of a model that have values now, and those that are stored together with them."""
        if not changed:
            return
        assert self._own is not None, f"{changed[0]} of the dense model was changed"
        names = dict.fromkeys(other for name in changed for other in self._own.with_(name))
        for part in {self._own.with_(name): None for name in names}:
            self._own.write({name: _tensor(model, name) for name in part})
        self._written |= names.keys()

    def was_written(self, name: str) -> bool:
        """True for a tensor that is another than the source's."""
        return name in self._written

    def save(self, model: Any, folder: Path) -> None:
        """Puts the files of a copy into `folder`: links to its own where the disk allows it, so they stay one."""
        assert self._own is not None, "only a copy is saved"
        for name in (tensors := stored_tensors(model)):
            if name not in self._written:
                part = self._own.with_(name)
                self._own.write({other: value(model, other, tensors[other]) for other in part})
                self._written |= {*part}
        files = self._own.files
        for file in [*files, files[0].parent / INDEX]:
            if file.is_file():
                _link(file, folder / file.name)

    def _read_block(self, block: str, names: list[str]) -> dict[str, Tensor]:
        full = {f"{block}.{name}": name for name in names}
        return {full[name]: tensor for name, tensor in self._read([*full])}

    def _start_next(self, model: Any, block: str) -> None:
        place = self.blocks.index(block) + 1
        if place < len(self.blocks):
            following = self.blocks[place]
            names = [name for name, _ in model.get_submodule(following).named_parameters()]
            self._prefetch.start(following, lambda: self._read_block(following, names))


class _Forward:
    """The forward pass of a block that is read from disk for it."""

    def __init__(self, model: Any, block: nn.Module, name: str) -> None:
        self._model, self._block, self._name = weakref.ref(model), weakref.ref(block), name  # they hold this

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model, block = self._model(), self._block()
        assert block is not None
        with at_hand(model, self._name):
            return type(block).forward(block, *args, **kwargs)

    def __deepcopy__(self, memo: Any) -> _Forward:
        return self  # a copy gets others (own_copy)


def _tensor(model: Any, name: str) -> Tensor:
    owner, _, last = name.rpartition(".")
    found: Tensor = getattr(model.get_submodule(owner), last).detach()
    return found


def as_parameter(tensor: Tensor) -> nn.Parameter:
    """Parameter of a tensor, as from_pretrained makes it.

    PyTorch chooses how it computes `weight @ states` by whether the weight learns: another sum, and other operands.
    """
    return nn.Parameter(tensor, requires_grad=tensor.is_floating_point())


def set_parameters(module: nn.Module, parameters: dict[str, nn.Parameter]) -> None:
    """Puts parameters by name into a module and its parts."""
    for name, parameter in parameters.items():
        owner, _, last = name.rpartition(".")
        setattr(module.get_submodule(owner), last, parameter)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without links
        shutil.copyfile(source, target)
