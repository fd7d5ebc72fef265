"""Channels of a model's states (the hidden size): what the embedding and the blocks write, and blocks and head read.

They are one set for the whole model. The config says another hidden size, and each dimension of a tensor that becomes
smaller with it loses the same channels: shapes decide, so that another width that happens to be equal stays. Heads are
left as they are, for which the config says their size.

A model with fewer channels is the model with zeros in their place. An RMSNorm divides by the root of the mean square
over all channels, and over fewer d' of d that is larger by sqrt(d / d'): the weight of each norm is multiplied by that.
The two are equal then, but for the norm's epsilon. Gemma multiplies what it embeds by sqrt(d), and would by sqrt(d')
then: the embedding is multiplied by sqrt(d / d'), too; where the head is the same tensor, the last norm is not. Norms
that subtract a mean have no such weight, and other things may be scaled by the hidden size: that the two are equal is
tried on the model, and where they are not, none of its channels can go.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import combinations, product
from typing import Any

import torch
from torch import Tensor, nn

from prune_lab.errors import Refused
from prune_lab.models.anatomy import Anatomy
from prune_lab.models.auto_class import reads_images
from prune_lab.models.cuts import Cut, Selection, cut, selected
from prune_lab.models.found import evaluating, forget_layout, is_same, probe_tokens
from prune_lab.models.found_units import forget_units
from prune_lab.models.rebuild import edited, rebuild, rebuilt, shapes, tensors_of, text_parts
from prune_lab.models.resize import note_count
from prune_lab.models.stand_in import STAND_INS, config_of_stand_in, obstacle
from prune_lab.models.unit_fields import write_head_dim_out

_FIELDS = ("hidden_size", "d_model", "n_embd", "dim", "word_embed_proj_dim", "embedding_size")
_NEAR = 128  # sizes that are tried one by one
_EPSILONS = {"eps", "variance_epsilon", "epsilon", "norm_eps"}  # attributes of norms
_KEPT = "_found_hidden"  # with the model and its copies; in no export
Scale = Callable[[Tensor, float], Tensor]


def _times(weight: Tensor, factor: float) -> Tensor:
    """Weight of a norm that multiplies by it."""
    return weight * factor


def _one_more(weight: Tensor, factor: float) -> Tensor:
    """Weight of a norm that multiplies by 1 + weight."""
    return (1 + weight) * factor - 1


@dataclass(frozen=True)
class Hidden:
    """Config fields of the hidden size, by number of a part of the config and key, and how a norm is multiplied.

    embeds_times_root: whether what is embedded is multiplied by the root of the hidden size.
    """

    fields: tuple[tuple[int, str], ...]
    scale: Scale
    embeds_times_root: bool = False


def hidden_size(model: Any) -> int:
    """Number of channels of a model's states."""
    return int(model.get_input_embeddings().weight.shape[1])


def hidden_of(model: Any) -> Hidden:
    """Fields and norms of a model, found once and kept with it; raises Refused with the reason where none can go."""
    kept: Hidden | None = model.__dict__.get(_KEPT)
    if kept is None:
        kept = model.__dict__[_KEPT] = _find(model)
    return kept


def can_hold(model: Any, count: int) -> bool:
    """True for a number of channels that the config, or that of a stand-in (stand_in.py), can hold."""
    return count == hidden_size(model) or (count > 0 and _config_of(model, hidden_of(model).fields, count) is not None)


def norms_of(model: Any) -> list[str]:
    """Names of the norms of the states: modules with nothing but vectors, that lose channels."""
    return _norms(model, axes_of(model))


def axes_of(model: Any) -> dict[str, int]:
    """The dimension along which each tensor that has one loses channels, by name."""
    fields = hidden_of(model).fields
    return _axes_or_refuse(model, fields, _about_half(model, fields))


@torch.no_grad()
def remove_hidden(anatomy: Anatomy, keep: Tensor) -> list[Cut]:
    """Cuts channels of the states where `keep`, bools (channels,), is False, out of a model; says what it cut.

    Raises Refused where the model is not what it is with zeros in their place.
    """
    model, was, count = anatomy.model, hidden_size(anatomy.model), int(keep.sum())
    if count == was:
        return []
    hidden = hidden_of(model)
    config, axes = _config_of(model, hidden.fields, count), _axes_or_refuse(model, hidden.fields, count)
    assert config is not None
    _check(model, hidden, axes, keep)
    cuts, places, changes = list[Cut](), dict[int, Tensor](), _changes(model, hidden, axes, (was / count) ** 0.5)
    tensors, index = tensors_of(model), keep.nonzero().flatten().cpu()
    for name, dim in axes.items():
        old = tensors[name]
        if id(old) in places:  # tied: it has several names
            continue
        if isinstance(old, nn.Parameter):
            cuts.append(cut(old, Selection(dim, index)))
            if name in changes:
                scale, factor = changes[name]
                cuts[-1].new.copy_(scale(cuts[-1].new.float(), factor))
            places[id(old)] = cuts[-1].new
        else:
            places[id(old)] = selected(old, (Selection(dim, index),))
    rebuild(model, config, {name: places.get(id(tensor), tensor) for name, tensor in tensors.items()})
    note_count(anatomy, "hidden", was, count)
    forget_layout(model)
    forget_units(model)
    anatomy.look()
    return cuts


def check_count(model: Any, count: int) -> None:
    """Raises Refused where a model that is left with `count` channels is not what it is with zeros in their place.

    Tried with some that are drawn at random: what is scaled by the hidden size may be rounded.
    """
    if count == hidden_size(model):
        return
    hidden = hidden_of(model)
    _check(model, hidden, _axes_or_refuse(model, hidden.fields, count), _drawn(hidden_size(model), count))


def _check(model: Any, hidden: Hidden, axes: dict[str, int], keep: Tensor) -> None:
    if not _computes(model, hidden, axes, keep, _logits_with_zeros(model, axes, keep)):
        raise Refused(
            f"method.units=[hidden]: with {int(keep.sum())} of {len(keep)} channels the {model.config.model_type} "
            "model is not what it is with zeros in their place; give another method.amount or method.round_to"
        )


def _find(model: Any) -> Hidden:
    size, why = hidden_size(model), "no field of its config holds the hidden size alone"
    places = [
        (number, key)
        for number, part in enumerate(text_parts(model.config.to_dict()))
        for key in _FIELDS
        if part.get(key) == size
    ]
    for fields in dict.fromkeys([tuple(places), *(c for n in range(1, len(places)) for c in combinations(places, n))]):
        if not fields:
            continue
        count = _about_half(model, fields)
        axes = _axes(model, fields, count)
        if isinstance(axes, str):
            why = axes
            continue
        if not _follows_images(model, axes):
            why = "what its other parts make of images has the hidden size, too, and would keep it"
            continue
        keep = _drawn(size, count)
        wanted = _logits_with_zeros(model, axes, keep)
        for embeds_times_root, scale in product((False, True), (_times, _one_more)):
            hidden = Hidden(fields, scale, embeds_times_root)
            if _computes(model, hidden, axes, keep, wanted):
                return hidden
        why = (
            "with fewer it is not what it is with zeros in their place: its norms subtract a mean, or something else "
            "in it is scaled by the hidden size"
        )
    raise Refused(
        f"method.units=[hidden]: channels of the hidden size of this {model.config.model_type} model cannot be "
        f"removed: {why}"
    )


def _follows_images(model: Any, axes: dict[str, int]) -> bool:
    """False for a whole model for images with text of whose other parts nothing loses channels.

    What they put in the place of tokens' states would be of the old size, which no text shows.
    """
    if not reads_images(model):
        return True
    text, head = f"{Anatomy(model).family.blocks.rpartition('.')[0]}.", model.get_output_embeddings()
    of_text = {id(part.weight) for part in (model.get_input_embeddings(), head) if part is not None}
    others = [name for name, t in tensors_of(model).items() if not name.startswith(text) and id(t) not in of_text]
    return not others or any(name in axes for name in others)


def _about_half(model: Any, fields: tuple[tuple[int, str], ...]) -> int:
    """Half of the channels, or the next smaller number that the config can hold; half, where there is none near."""
    half = hidden_size(model) // 2
    near = range(half, max(0, half - _NEAR), -1)
    return next((count for count in near if _config_of(model, fields, count) is not None), half)


def _drawn(size: int, count: int) -> Tensor:
    """Bools that keep `count` of the channels, drawn at random."""
    keep = torch.zeros(size, dtype=torch.bool)
    keep[torch.randperm(size, generator=torch.Generator().manual_seed(0))[:count]] = True
    return keep


def _changes(model: Any, hidden: Hidden, axes: dict[str, int], factor: float) -> dict[str, tuple[Scale, float]]:
    """How, by name, the tensors are scaled that are more than cut, where sqrt(d / d') is `factor`."""
    embedding, tensors, blocks = model.get_input_embeddings().weight, tensors_of(model), Anatomy(model).family.blocks
    norms, head = _norms(model, axes), model.get_output_embeddings()
    is_tied, found = head is not None and head.weight is embedding, dict[str, tuple[Scale, float]]()
    for name in axes:
        owner = name.rpartition(".")[0]
        if owner in norms:
            before_head = hidden.embeds_times_root and is_tied and not name.startswith(f"{blocks}.")
            found[name] = hidden.scale, 1.0 if before_head else factor
        elif hidden.embeds_times_root and tensors[name] is embedding:
            found[name] = _times, factor
    return found


def _logits_with_zeros(model: Any, axes: dict[str, int], keep: Tensor) -> Tensor | None:
    """Logits of a model with zeros in place of channels, as _logits gives them; None where it does not run."""

    def zeroed(name: str, tensor: Tensor) -> Tensor:
        shape = [1] * tensor.dim()
        shape[axes[name]] = len(keep)
        return tensor * keep.to(tensor.device).view(shape)

    return _logits(model, model.config, axes, zeroed)


def _computes(model: Any, hidden: Hidden, axes: dict[str, int], keep: Tensor, wanted: Tensor | None) -> bool:
    """True where a model with some channels gives the logits of the whole one with zeros in place of the others."""
    count, index = int(keep.sum()), keep.nonzero().flatten()
    changes = _changes(model, hidden, axes, (len(keep) / count) ** 0.5)

    def smaller(name: str, tensor: Tensor) -> Tensor:
        part = selected(tensor, (Selection(axes[name], index),))
        scale, factor = changes.get(name, (_times, 1.0))
        return scale(part, factor)

    found = _logits(model, _config_of(model, hidden.fields, count), axes, smaller)
    return found is not None and wanted is not None and is_same(found, wanted)


def _logits(model: Any, config: Any, axes: dict[str, int], change: Callable[[str, Tensor], Tensor]) -> Tensor | None:
    """Logits of a model like `model` of a config, with changed tensors; None where it does not run.

    In float32, what it computes of its config, too, and without the epsilon of the norms, so that nothing but rounding
    may differ.
    """
    tensors = {name: tensor.detach() for name, tensor in tensors_of(model).items()}
    tensors = {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}
    in_float32, config = copy.copy(model), copy.deepcopy(config)  # whose number type becomes that of what is made
    in_float32.config = copy.deepcopy(model.config)
    in_float32.config.dtype = torch.float32
    try:
        second = rebuilt(in_float32, config, tensors | {name: change(name, tensors[name]) for name in axes})
        for module in (second.get_submodule(name) for name in _norms(model, axes)):
            for key in _EPSILONS & vars(module).keys():
                setattr(module, key, 0.0)
        with evaluating(second):
            found: Tensor = second(input_ids=probe_tokens(model)[:1], use_cache=False).logits
    except torch.OutOfMemoryError:
        raise
    except Exception:  # of any modelling code of transformers
        return None
    return found


def _config_of(model: Any, fields: tuple[tuple[int, str], ...], count: int) -> Any | None:
    """The config with another hidden size, of the model's type or of its stand-in; None where neither can hold it."""
    edit = partial(_with_size, fields=fields, count=count)
    config = model.config
    made = edited(config, edit)
    if made is None and config.model_type in STAND_INS and obstacle(config) is None:
        made = edited(config_of_stand_in(config), edit)
    return made


def _with_size(data: dict[str, Any], fields: tuple[tuple[int, str], ...], count: int) -> None:
    parts = text_parts(data)
    write_head_dim_out(parts)
    for number, key in fields:
        parts[number][key] = count


def _axes_or_refuse(model: Any, fields: tuple[tuple[int, str], ...], count: int) -> dict[str, int]:
    axes = _axes(model, fields, count)
    if isinstance(axes, str):
        raise Refused(f"method.units=[hidden]: a {model.config.model_type} model cannot be left with {count}: {axes}")
    return axes


def _axes(model: Any, fields: tuple[tuple[int, str], ...], count: int) -> dict[str, int] | str:
    """The dimension of each tensor that is `count` where it was the hidden size; or why the shapes do not follow."""
    size, config = hidden_size(model), _config_of(model, fields, count)
    was, now = shapes(model, model.config), None if config is None else shapes(model, config)
    if was is None or now is None:
        return f"its class cannot be built with a hidden size of {count}"
    if was.keys() != now.keys():
        return "another hidden size would be another set of tensors"
    found = dict[str, int]()
    for name, shape in was.items():
        dims = [d for d in range(len(shape)) if shape[d] != now[name][d]]
        if any((shape[d], now[name][d]) != (size, count) for d in dims):
            return f"{name} of shape {list(shape)} would be {list(now[name])}, which is no cut of the states' channels"
        if len(dims) > 1:
            return f"{name} would lose rows and columns, so that something of the size of the states is in it"
        if dims:
            found[name] = dims[0]
    same = dict[int, set[int | None]]()
    for name, tensor in tensors_of(model).items():
        same.setdefault(id(tensor), set()).add(found.get(name))
    if any(len(dims) > 1 for dims in same.values()):
        return "of a tensor with several names one would follow and the other would not"
    embedding = model.get_input_embeddings().weight
    if not any(tensor is embedding and found.get(name) == 1 for name, tensor in tensors_of(model).items()):
        return "its embedding would not follow"
    return found


def _norms(model: Any, axes: dict[str, int]) -> list[str]:
    owners = dict.fromkeys(name.rpartition(".")[0] for name in axes)
    vectors = [name for name in owners if all(p.dim() == 1 for p in model.get_submodule(name).parameters())]
    return [name for name in vectors if not isinstance(model.get_submodule(name), nn.Linear)]


@dataclass(frozen=True)
class Readers:
    """Norms of the blocks that stand before matrices, and Linears that read a norm's output, by the norm."""

    norms: list[str]
    linears: dict[str, list[str]]


@torch.no_grad()
def readers_of(model: Any) -> Readers:
    """The norms of the states whose outputs go into matrices, as a few tokens pass; the last norm is in `linears`.

    Seen by the memory that a module's input and a norm's output share, so that outputs that are added to the states
    (norms behind an attention or MLP) are told apart.
    """
    norms, axes, anatomy = norms_of(model), axes_of(model), Anatomy(model)
    matrices = dict.fromkeys(name.rpartition(".")[0] for name in axes if name.rpartition(".")[0] not in norms)
    made, read, linears = dict[int, tuple[str, Tensor]](), dict[str, None](), dict[str, list[str]]()

    def keep(name: str, out: Any) -> None:
        if isinstance(out, Tensor):
            made[out.untyped_storage().data_ptr()] = name, out  # kept, so that no other tensor lies there

    def look(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        for part in (*args, *kwargs.values()):
            known = made.get(part.untyped_storage().data_ptr()) if isinstance(part, Tensor) else None
            if known is None:
                continue
            read[known[0]] = None
            if isinstance(module, nn.Linear) and name not in linears.setdefault(known[0], []):
                linears[known[0]].append(name)

    hooks = [
        model.get_submodule(name).register_forward_hook(lambda _, args, out, name=name: keep(name, out))
        for name in norms
    ]
    hooks += [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, kwargs, name=name: look(name, module, args, kwargs), with_kwargs=True
        )
        for name in matrices
    ]
    try:
        with evaluating(model):
            model(input_ids=probe_tokens(model)[:1], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    inside = f"{anatomy.family.blocks}."
    return Readers([name for name in norms if name in read and name.startswith(inside)], linears)
