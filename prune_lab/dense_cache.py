"""Cache of results about the dense model: computed once, for every run on it, in this process and in others."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from prune_lab import cache as store
from prune_lab.fingerprint import LIBRARIES, digest_of, source_sha256
from prune_lab.system.device import Device
from prune_lab.system.environment import describe_environment
from prune_lab.system.world import World

MEMORY = 2**30  # bytes of results that a process holds; what is beyond is read from disk each time
# An edit of any of these makes every result anew, whichever of them it comes from.
SOURCE = (
    "dense_cache.py",
    "engine_beside.py",
    "export/base.py",
    "export/hf.py",
    "export/onnx.py",
    "measure",
    "models",
    "pruning",
    "text",
    "evaluator.py",
    "system/cuda_graph.py",
    "system/device.py",
    "system/world.py",
)
_ENVIRONMENT = (*LIBRARIES, "python", "lm-eval", "platform", "cpu", "threads", "gpu", "cuda")

Part = dict[str, Tensor]
_ALONE = World()
T = TypeVar("T")


class DenseCache:
    """Results about one dense model, each under a key of all that it depends on.

    The key holds the sha256 of weights, config and tokenizer, number type, device, threads, the versions of what
    computes, the source of all that could (SOURCE), and what the asker adds: the text by its token ids, sizes, and
    modules beside those, such as that of the method whose loss increases are measured.
    A result that several processes compute together, a `world`, each of them must ask for. Only the first one keeps it
    on disk, when it is there: whoever computed behind a lock that others wait for would wait for them.
    """

    def __init__(self, model: Any, hashes: dict[str, str], device: Device) -> None:
        self._model, self._device = model, device
        environment = describe_environment(device)
        self._key = {
            **{name: hashes[name] for name in ("weights", "config", "tokenizer")},
            "dtype": device.dtype_name,
            "matmul": torch.get_float32_matmul_precision(),
            **{name: environment[name] for name in _ENVIRONMENT},
        }
        self._values: dict[str, Any] = {}
        self._parts: dict[str, list[Part]] = {}
        self._held = 0
        self._in_process: dict[str, Any] = {}

    def are_of(self, model: Any) -> bool:
        """True where a model has the tensors of the dense one, bit by bit but for the sign of a zero, and its config.

        With the same tensors a token may go to fewer experts.
        """
        mine, others = self._model.state_dict(), model.state_dict()
        return (
            not model.training
            and self._model.config.to_dict() == model.config.to_dict()
            and mine.keys() == others.keys()
            and all(_same(tensor, others[name]) for name, tensor in mine.items())
        )

    def key(self, kind: str, of: dict[str, Any], modules: tuple[str, ...] = ()) -> str:
        """Key of a result: a hash of all that it depends on."""
        whole = [kind, self._key, of, source_sha256(*SOURCE), source_of(modules)]
        return digest_of(whole)[:32]

    def value(
        self,
        kind: str,
        of: dict[str, Any],
        compute: Callable[[], Any],
        modules: tuple[str, ...] = (),
        world: World = _ALONE,
    ) -> Any:
        """Result made of numbers, lists and dictionaries, computed where it is not kept."""
        key = self.key(kind, of, modules)
        if key not in self._values and world.size > 1:
            self._values[key] = _value_together(kind, key, compute, world)
        if key not in self._values:
            with store.entry(kind, key, lambda folder: {"value": compute()}) as entry:
                self._values[key] = entry.metadata["value"]
        return self._values[key]

    def in_process(self, name: str, make: Callable[[], T]) -> T:
        """Result for this process alone, which costs less to compute than to read."""
        found: T = self._in_process.setdefault(name, make())
        return found

    def has_parts(self, key: str, kind: str) -> bool:
        """True where tensors are in memory or on disk already."""
        return key in self._parts or store.has(kind, key)

    def parts(
        self, key: str, kind: str, count: int, compute: Callable[[], Iterable[Part]], world: World = _ALONE
    ) -> Iterator[Part]:
        """Result made of `count` dictionaries of tensors, such as one for each block; they must not be changed.

        Those larger than the bound of the cache are not kept on disk; if they are larger than what a process may hold
        as well, they pass as they are computed and nothing is kept. Of several processes, those that are larger than
        what one may hold are not kept on disk either.
        """
        if key not in self._parts and world.size > 1:
            yield from self._parts_together(key, kind, count, compute, world)
            return
        if key not in self._parts:
            try:
                with store.entry(kind, key, lambda folder: _save_parts(folder, count, compute())) as entry:
                    files = [entry.folder / _file(index) for index in range(count)]
                    if not self._may_hold(entry.metadata["bytes"]):
                        yield from (self._placed(_load(path)) for path in files)
                        return
                    self._hold(key, [_load(path) for path in files])
            except _TooLargeError as error:
                if not self._may_hold(error.size):
                    yield from compute()
                    return
                self._hold(key, [_on_cpu(part) for part in compute()])
        yield from map(self._placed, self._parts[key])

    def _parts_together(
        self, key: str, kind: str, count: int, compute: Callable[[], Iterable[Part]], world: World
    ) -> Iterator[Part]:
        with store.found(kind, key) as entry:
            if world.all(entry is not None):
                assert entry is not None
                files = [entry.folder / _file(index) for index in range(count)]
                if not world.all(self._may_hold(entry.metadata["bytes"])):
                    yield from (self._placed(_load(path)) for path in files)
                    return
                self._hold(key, [_load(path) for path in files])
        if key not in self._parts:
            computed = iter(compute())
            first = next(computed)
            if not world.all(self._may_hold(_size(first) * count)):
                yield first
                yield from computed
                return
            self._hold(key, [_on_cpu(part) for part in chain([first], computed)])
            if world.is_main:
                _keep(kind, key, lambda folder: _save_parts(folder, count, self._parts[key]))
        yield from map(self._placed, self._parts[key])

    def _may_hold(self, size: int) -> bool:
        return self._held + size <= MEMORY

    def _hold(self, key: str, parts: list[Part]) -> None:
        self._parts[key] = parts
        self._held += sum(map(_size, parts))

    def _placed(self, part: Part) -> Part:
        """Tensors on the device; one that stands under several names is one there too."""
        placed = {id(tensor): tensor.to(self._device.torch_device) for tensor in part.values()}
        return {name: placed[id(tensor)] for name, tensor in part.items()}


class _TooLargeError(Exception):
    """Error: a result would not fit into the cache."""

    def __init__(self, size: int) -> None:
        self.size = size


def _value_together(kind: str, key: str, compute: Callable[[], Any], world: World) -> Any:
    """A value that all processes have from the cache of the first one, or compute."""
    kept = None
    if world.is_main:
        with store.found(kind, key) as entry:
            kept = None if entry is None else [entry.metadata["value"]]
    kept = world.from_main(kept)
    if kept is not None:
        return kept[0]
    value = compute()
    if world.is_main:
        _keep(kind, key, lambda folder: {"value": value})
    return value


def _keep(kind: str, key: str, make: store.Make) -> None:
    """Has the cache keep what is computed, if it has room for it."""
    with suppress(_TooLargeError), store.entry(kind, key, make):
        pass


def _on_cpu(part: Part) -> Part:
    """Tensors in memory; one that stands under several names stays one."""
    there = {id(tensor): tensor.cpu() for tensor in part.values()}
    return {name: there[id(tensor)] for name, tensor in part.items()}


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.device == b.device and a.device.type != "meta" and torch.equal(a, b)


@cache
def source_of(modules: tuple[str, ...]) -> str:
    """sha256 of the source of modules, so that what older code computed is not served for newer code."""
    digest = hashlib.sha256()
    for name in modules:
        spec = importlib.util.find_spec(name)
        assert spec is not None, name
        assert spec.origin is not None, name
        digest.update(name.encode() + b"\0" + Path(spec.origin).read_bytes() + b"\0")
    return digest.hexdigest()


def _unique(part: Part) -> dict[int, Tensor]:
    return {id(tensor): tensor for tensor in part.values()}


def _size(part: Part) -> int:
    return sum(tensor.nbytes for tensor in _unique(part).values())


def _file(index: int) -> str:
    return f"{index:04}.safetensors"


def _save_parts(folder: Path, count: int, parts: Iterable[Part]) -> dict[str, Any]:
    """Writes a file for each part; Linears that are given the same input share a tensor, which is written once."""
    total = 0
    for index, part in enumerate(parts):
        if index == 0 and (estimate := _size(part) * count) > store.limit_bytes():
            raise _TooLargeError(estimate)
        numbers = {identity: str(number) for number, identity in enumerate(_unique(part))}
        tensors = {numbers[identity]: tensor.cpu().contiguous() for identity, tensor in _unique(part).items()}
        names = {name: numbers[id(tensor)] for name, tensor in part.items()}
        save_file(tensors, folder / _file(index), metadata={"names": json.dumps(names)})
        total += _size(part)
    return {"bytes": total}


def _load(path: Path) -> Part:
    with safe_open(path, framework="pt") as file:
        tensors = {number: file.get_tensor(number) for number in file.keys()}  # noqa: SIM118 - it is no dictionary
        names = json.loads(file.metadata()["names"])
    return {name: tensors[number] for name, number in names.items()}
