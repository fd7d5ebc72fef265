"""Tensors of a model in files: as they are, or made of others as transformers does it (experts that lie one by one)."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prune_lab.errors import Refused
from prune_lab.models.shards import Shards, Span, lay_out


def stored_tensors(model: Any) -> dict[str, Tensor]:
    """Tensors that are saved of a model by name, those on disk without values; a tied matrix by one name.

    Of its names it is, as for transformers, the one of what the others are tied to, or the first.
    """
    left_out, tied = model._keys_to_ignore_on_save or (), getattr(model, "all_tied_weights_keys", {})
    of_tensor = dict[int, str]()
    tensors = {name: t for name, t in model.state_dict(keep_vars=True).items() if name not in left_out}
    for name, tensor in tensors.items():
        if of_tensor.setdefault(id(tensor), name) in tied and name not in tied:
            of_tensor[id(tensor)] = name
    return {name: tensor.detach() for name, tensor in tensors.items() if of_tensor[id(tensor)] == name}


class Stored:
    """Tensors of a model, each of them in the files as it is, by the model's own names."""

    def __init__(self, shards: Shards, dtype: torch.dtype) -> None:
        self._shards, self._dtype = shards, dtype

    @property
    def spans(self) -> dict[str, Span]:
        """Spans of the files by the names of `shards`."""
        return self._shards.spans

    @property
    def files(self) -> list[Path]:
        """The files, once each."""
        return self._shards.files

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Tensors by these names, on the CPU, in the number type of the run."""
        for name in names:
            yield name, self._shards.read(name).to(self._dtype)

    def with_(self, name: str) -> tuple[str, ...]:
        """Names of the tensors that are written together with one, itself included."""
        return (name,)

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts tensors into the files, together with each of them those of `with_`."""
        for name, tensor in tensors.items():
            self._shards.write(name, tensor)


@dataclass(frozen=True)
class _Made:
    """Tensors of the model that are made together: of stored names, each with the pattern that it fits.

    name: the first one that transformers knows them by. conversion: of transformers; None where one is as it is stored.
    """

    name: str
    conversion: Any
    sources: tuple[tuple[str, str], ...]


class Converted(Stored):
    """Tensors of a model that transformers makes of those in files, as `from_pretrained` does: bit for bit.

    like: the model without values, on meta, in whose number types they are read. It holds the conversions by which
    `save_pretrained` writes them.
    """

    def __init__(self, shards: Shards, like: Any) -> None:
        super().__init__(shards, like.dtype)
        self._like = like
        named = dict[int, list[str]]()
        wanted = like.state_dict(keep_vars=True)
        for name, tensor in wanted.items():
            named.setdefault(id(tensor), []).append(name)
        self._dtypes: dict[str, torch.dtype] = {name: tensor.dtype for name, tensor in wanted.items()}
        self._made = dict[str, _Made]()
        self._shapes = dict[str, tuple[int, ...]]()  # of those whose parts lie in the files one by one
        for made in self._plan(wanted):
            for name in self._names_of(made):
                self._made[name] = made
        for names in named.values():  # of a tied one the files may have any name
            here = [name for name in names if name in self._made]
            self._made |= {name: self._made[here[0]] for name in names if here and name not in self._made}
        self._aliases = {name: names for names in named.values() for name in names if len(names) > 1}
        self._together: dict[str, tuple[str, ...]] | None = None

    def _plan(self, wanted: dict[str, Tensor]) -> Iterator[_Made]:
        """Tensors of the model and what they are made of, by the rules of transformers' own loading."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )

        rules = get_model_conversion_mapping(self._like)
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        of_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
        base, found = self._like.base_model_prefix, dict[str, tuple[Any, list[tuple[str, str]]]]()
        for stored in sorted(self.spans, key=dot_natural_key):
            name, pattern = rename_source_key(stored, renamings, converters, base, wanted)
            if name not in wanted and stored in wanted:
                name, pattern = rename_source_key(stored, [], [], base, wanted)
            if name in wanted:
                rule = None if pattern is None else of_pattern[pattern]
                found.setdefault(name, (rule, []))[1].append((stored, pattern or stored))
        for name, (rule, sources) in found.items():
            yield _Made(name, rule, tuple(sources if rule is not None else sources[:1]))

    def _names_of(self, made: _Made) -> list[str]:
        if made.conversion is None:
            return [made.name]
        spans = {stored: self.spans[stored] for stored, _ in made.sources}
        found = self._make(made, {n: torch.empty(s.shape, device="meta") for n, s in spans.items()})
        whole = found.get(made.name)
        parts = [] if whole is None else _parts(made, whole)
        if parts and all(tuple(view.shape) == spans[stored].shape for stored, view in parts):
            self._shapes[made.name] = tuple(found[made.name].shape)
        return list(found)

    def _make(self, made: _Made, tensors: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Tensors of the model by name, made of those that are stored, or of others in their place."""
        dtype = self._dtypes[made.name]
        if tensors is None and made.name in self._shapes:  # read in place: joining them would take as much again
            whole = torch.empty(self._shapes[made.name], dtype=dtype)
            for stored, view in _parts(made, whole):
                view.copy_(self._shards.read(stored))
            return {made.name: whole}

        def of(stored: str) -> Tensor:
            return self._shards.read(stored).to(dtype) if tensors is None else tensors[stored]

        if made.conversion is None:
            return {made.name: of(made.sources[0][0])}
        conversion = copy.deepcopy(made.conversion)
        for stored, pattern in made.sources:
            conversion.add_tensor(made.name, stored, pattern, lambda stored=stored: of(stored))
        found = conversion.convert(made.name, model=self._like, config=self._like.config)
        return {name: part[0] if isinstance(part, list) else part for name, part in found.items()}

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Tensors by these names, on the CPU, in the number types of the model."""
        wanted = dict[str, list[str]]()  # by the first name of what is made together
        for name in names:
            wanted.setdefault(self._made[name].name, []).append(name)
        for of_made in wanted.values():
            found = self._make(self._made[of_made[0]])
            for name in of_made:
                key = name if name in found else next(other for other in self._aliases[name] if other in found)
                yield name, found[key]

    def sources_of(self, name: str) -> list[str]:
        """Names in the files of what a tensor of the model is made of."""
        return [stored for stored, _ in self._made[name].sources]

    def with_(self, name: str) -> tuple[str, ...]:
        """Names of the tensors that are written together with one, itself included."""
        if name in self._shapes:
            return (name,)
        if self._together is None:
            self._together = _written_together(self._like, self.spans)
        return self._together[name]

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts tensors into the files as save_pretrained would, together with each of them those of `with_`."""
        for part in {self.with_(name): None for name in tensors}:
            if part[0] in self._shapes:
                for stored, view in _parts(self._made[part[0]], tensors[part[0]].detach()):
                    self._shards.write(stored, view)
                continue
            for stored, tensor in as_saved(self._like, {name: tensors[name] for name in part}).items():
                self._shards.write(stored, tensor)


def _parts(made: _Made, whole: Tensor) -> list[tuple[str, Tensor]]:
    """The stored tensors that a fused one is made of, by name, as views of it; none of other conversions.

    Experts are one behind the other, and the outputs of several matrices of each.
    """
    from transformers.core_model_loading import Concatenate, MergeModulelist

    operations = [(type(operation), getattr(operation, "dim", None)) for operation in made.conversion.operations]
    patterns = made.conversion.source_patterns
    if operations not in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)]):
        return []
    of_pattern = [[stored for stored, fits in made.sources if fits == pattern] for pattern in patterns]
    experts, rows = whole.shape[0], whole.shape[1]
    if any(len(of) != experts for of in of_pattern) or rows % len(patterns):
        return []
    each = rows // len(patterns)
    return [
        (stored, whole[expert, number * each : (number + 1) * each])
        for number, of in enumerate(of_pattern)
        for expert, stored in enumerate(of)
    ]


def as_saved(like: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a model under the names, and in the shapes, in which save_pretrained writes them."""
    from transformers.core_model_loading import revert_weight_conversion

    found: dict[str, Tensor] = revert_weight_conversion(like, dict(tensors))
    return found


def lay_out_converted(like: Any, tensors: Mapping[str, Tensor], folder: Path) -> Converted:
    """Files with room for the tensors of a model (on meta), as save_pretrained has them."""
    return Converted(lay_out(folder, as_saved(like, tensors)), like)


def _written_together(like: Any, spans: Mapping[str, Span]) -> dict[str, tuple[str, ...]]:
    """By name the tensors that are written together: one alone as a rule, else those of a module.

    Raises Refused where tensors of several modules are stored as one.
    """
    tensors = {name: tensor.to("meta") for name, tensor in stored_tensors(like).items()}

    def written(names: Iterable[str]) -> set[str] | None:
        """Names in the files of what is written of some tensors; None where it is not what the files have."""
        try:
            found = as_saved(like, {name: tensors[name] for name in names})
        except Exception:  # of any conversion of transformers: it needs other tensors, too
            return None
        fits = all(name in spans and spans[name].shape == tuple(t.shape) for name, t in found.items())
        size = sum(tensors[name].numel() for name in names)
        return set(found) if fits and sum(math.prod(t.shape) for t in found.values()) == size else None

    together, used, left = dict[str, tuple[str, ...]](), set[str](), dict[str, list[str]]()
    for name in tensors:
        of_name = written([name])
        if of_name is None or of_name & used:
            left.setdefault(".".join(name.split(".")[:3]), []).append(name)
        else:
            used |= of_name
            together[name] = (name,)
    for names in left.values():
        of_names = written(names)
        if of_names is None or of_names & used:
            raise Refused(
                f"model.stream=true: {names[0]} is stored together with tensors of other blocks, so that blocks cannot "
                "be written one by one; give model.stream=false"
            )
        used |= of_names
        together |= dict.fromkeys(names, tuple(names))
    return together
