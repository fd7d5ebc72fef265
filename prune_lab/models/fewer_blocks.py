"""A model without some of its decoder blocks, of any type: rebuilt from an edited config, and compared.

What was made counts only where it is the model with those blocks bypassed: the same logits, and blocks that are
built as they were. So a block whose number or whose outputs enter what the others compute is one that stays.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from prune_lab.errors import Refused
from prune_lab.models import found, rebuild
from prune_lab.models.anatomy import Anatomy
from prune_lab.models.blocks import bypassed
from prune_lab.models.cuts import Cut, Selection, cut
from prune_lab.models.fewer_blocks_config import fewer
from prune_lab.models.found_units import forget_units

STAYING = "_blocks_that_stay"  # reasons (removable_blocks.py), kept with the model that they are of; in no export

# Attributes of modules that matter in a longer text than the probe: kinds of attention and their windows.
_UNSEEN = re.compile(r"window|sliding|chunk|local|rope|type|kind")


class StaysError(Exception):
    """Reason why blocks stay."""


def rebuild_with_blocks(anatomy: Anatomy, kept: Sequence[int]) -> list[Cut]:
    """Rebuilds the model with the blocks of these indices alone, in order; returns parameters that lost a part.

    The other parameters are the same objects. Raises Refused where what is made is not the model without the others.
    """
    gone = [index for index in range(len(anatomy.blocks)) if index not in kept]
    try:
        made, parts = without(built_anew(anatomy), gone)
    except StaysError as reason:
        raise Refused(
            f"method=depth: {named(gone)} of {len(anatomy.blocks)}, counted from 0, cannot be removed "
            f"{'together ' * (len(gone) > 1)}from a {anatomy.config.model_type} model: {reason}. Give a smaller "
            "amount, or another method.by"
        ) from reason
    layout = anatomy.found
    rebuild.become(anatomy.model, made)
    anatomy.model.__dict__.pop(STAYING, None)
    forget_units(anatomy.model)
    if layout is not None:
        _keep_layout(anatomy.model, _renumbered(layout, kept))
    anatomy.look()
    return parts


def _keep_layout(model: Any, layout: found.Layout) -> None:
    sizes = (matrix.place.shape for of_block in layout.matrices for matrix in of_block)
    blocks = model.get_submodule(layout.blocks)
    inside, total = sum(rows * columns for rows, columns in sizes), sum(p.numel() for p in blocks.parameters())
    found.keep(model, replace(layout, share=inside / max(1, total)))


def named(blocks: Sequence[int]) -> str:
    """Blocks as a message names them."""
    return f"block{'s' * (len(blocks) != 1)} {', '.join(map(str, blocks))}"


@dataclass(frozen=True)
class WholeModel:
    """The model built anew with all its blocks, in eval mode: what a smaller one is compared with.

    Buffers are computed for both, as they are when an export is read; those of a model that was used may be rounded.
    noise: the most by which logits of the probe differ when they are computed again, 0 on a CPU. rounding: the most by
    which they may differ, as a part of the largest one, because tensors lie elsewhere in memory: some processors then
    add in another order. Of all types of transformers 5.24 that was 3e-7 at most, and what computes something else
    differed by 0.06 at least (small models, float32).
    """

    anatomy: Anatomy
    noise: float
    rounding: float

    def is_near(self, logits: Sequence[Tensor], wanted: Sequence[Tensor]) -> bool:
        """True for logits that differ from those that are wanted by noise and rounding alone."""
        largest = max(float(of.abs().max()) for of in wanted)
        return _apart(logits, wanted) <= 4 * self.noise + self.rounding * largest


@torch.no_grad()
def built_anew(anatomy: Anatomy) -> WholeModel:
    """Raises StaysError where the config does not make the model."""
    model, tokens, training = anatomy.model, found.probe_tokens(anatomy.model), anatomy.model.training
    made, _ = _made(anatomy, range(len(anatomy.blocks)), others=True)
    if anatomy.found is not None:
        found.keep(made, anatomy.found)
    first, again = _probed(made, _decodes(anatomy)), _probed(made, _decodes(anatomy))
    model.eval()
    try:
        wanted = model(input_ids=tokens, use_cache=False).logits
    finally:
        model.train(training)
    # A block may overflow, and be the one that goes: what is left is compared by itself.
    if bool(wanted.isfinite().all()) and not found.is_same(first[0], wanted, rebuild.loaded_dtype(model)):
        raise StaysError("the model that its own config makes of its weights has other logits")
    noise = _apart(first, again)
    dtype = rebuild.loaded_dtype(model)
    rounding = torch.finfo(dtype).eps * (16 if dtype == torch.float32 else 2)
    return WholeModel(Anatomy(made), noise if math.isfinite(noise) else 0.0, rounding)


def _decodes(anatomy: Anatomy) -> bool:
    return anatomy.found is None or anatomy.found.decodes


def _probed(model: Any, decodes: bool) -> list[Tensor]:
    """Logits of the probe: of a whole text, and, of a model that decodes, of tokens after a cache."""
    whole = model(input_ids=found.probe_tokens(model), use_cache=False).logits
    return [whole, *(found.decoded(model) if decodes else ())]


def _apart(some: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """The most by which logits differ."""
    return max(
        float((one - other).abs().max()) if one.shape == other.shape else math.inf
        for one, other in zip(some, others, strict=True)
    )


@torch.no_grad()
def without(whole: WholeModel, gone: Sequence[int]) -> tuple[Any, list[Cut]]:
    """The model without some blocks, made anew with its tensors; raises StaysError where it is not that."""
    anatomy = whole.anatomy
    kept = [index for index in range(len(anatomy.blocks)) if index not in gone]
    try:
        with bypassed(anatomy, gone):
            wanted = _probed(anatomy.model, _decodes(anatomy))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of any modelling code of transformers
        raise StaysError(f"the model does not run where the states pass by ({_said(error)})") from error
    if not all(bool(logits.isfinite().all()) for logits in wanted):
        raise StaysError("the logits of what is left are not finite")
    try:
        return _checked(whole, kept, wanted, others=True)
    except StaysError as first:
        try:
            return _checked(whole, kept, wanted, others=False)
        except StaysError:
            raise first from None


def _checked(whole: WholeModel, kept: Sequence[int], wanted: list[Tensor], others: bool) -> tuple[Any, list[Cut]]:
    """A model of the blocks that are kept that has the logits of the whole one with the rest bypassed."""
    anatomy = whole.anatomy
    made, parts = _made(anatomy, kept, others)
    try:
        logits = _probed(made, len(wanted) > 1)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of any modelling code of transformers
        raise StaysError(f"what is left does not run ({_said(error)})") from error
    if not whole.is_near(logits[:1], wanted[:1]):
        raise StaysError(
            "what is left computes something else: it uses more of a block than the states, or the number of a block "
            "or the count of blocks enters what is computed"
        )
    if not whole.is_near(logits, wanted):
        raise StaysError("with what is left a text cannot be gone on with from the cache")
    _check_blocks(anatomy, made, kept)
    return made, parts


def _made(anatomy: Anatomy, kept: Sequence[int], others: bool) -> tuple[Any, list[Cut]]:
    """A model of the blocks that are kept, with the tensors of the whole one, in eval mode."""
    model, count = anatomy.model, len(anatomy.blocks)
    _check_owned(anatomy, kept)
    config = rebuild.edited(anatomy.config, lambda data: fewer(data, count, kept, others))
    if config is None:
        raise StaysError("the config cannot say which blocks are left")
    try:
        made = rebuild.skeleton(model, config)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of any modelling code of transformers
        raise StaysError(f"no model can be made of a config of what is left ({_said(error)})") from error
    blocks = len(made.get_submodule(anatomy.family.blocks))
    if blocks != len(kept):
        raise StaysError(f"the config does not say where it has the number of blocks: there would be {blocks}")
    tensors = _renamed(model, made, count, kept)
    parts = _take_parts(tensors, made, count, kept)
    try:
        rebuild.assign(made, tensors, model.device)
    except ValueError as error:
        raise StaysError(str(error)) from error
    return made.eval(), parts


def _check_owned(anatomy: Anatomy, kept: Sequence[int]) -> None:
    """Raises StaysError where a block that goes is the one under whose name a tensor of several blocks is known."""
    users = {id(parameter): index for index in kept for parameter in anatomy.blocks[index].parameters()}
    prefix = f"{anatomy.family.blocks}."
    for name, parameter in anatomy.model.named_parameters():  # under its first name alone
        owner = name.removeprefix(prefix).partition(".")[0] if name.startswith(prefix) else None
        if owner is not None and int(owner) not in kept and id(parameter) in users:
            raise StaysError(f"block {users[id(parameter)]} has its tensors, too")


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"


def _renamed(model: Any, made: Any, count: int, kept: Sequence[int]) -> dict[str, Tensor]:
    """The model's tensors under their names in the smaller model, without those of the blocks that go.

    Numbers are those of members of lists that have one for each block in both: the blocks, and what stands beside them.
    """
    new = {str(index): str(number) for number, index in enumerate(kept)}
    sizes = {name: len(module) for name, module in made.named_modules() if _is_list(module)}
    lists = [
        f"{name}."
        for name, module in model.named_modules()
        if _is_list(module) and len(module) == count and sizes.get(name) == len(kept)
    ]
    tensors = {}
    for name, tensor in rebuild.tensors_of(model).items():
        renamed: str | None = name
        for prefix in lists:
            number, dot, rest = name.removeprefix(prefix).partition(".")
            if name.startswith(prefix):
                renamed = f"{prefix}{new[number]}{dot}{rest}" if number in new else None
                break
        if renamed is not None:
            tensors[renamed] = tensor
    return tensors


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList | nn.ParameterList)


def _take_parts(tensors: dict[str, Tensor], made: Any, count: int, kept: Sequence[int]) -> list[Cut]:
    """Cuts, in `tensors`, those that hold a part for each block outside of the blocks: Gemma's embeddings per layer."""
    parts = []
    for name, like in made.state_dict().items():
        tensor = tensors.get(name)
        if tensor is None or tensor.dim() != like.dim() or tensor.shape == like.shape:
            continue
        dims = [dim for dim, size in enumerate(tensor.shape) if size != like.shape[dim]]
        size = tensor.shape[dims[0]]
        if len(dims) != 1 or size % count or like.shape[dims[0]] != size // count * len(kept):
            continue
        lines = torch.arange(size, device=tensor.device).view(count, -1)
        index = torch.cat([lines[block] for block in kept])
        selection = Selection(dims[0], index)
        if isinstance(tensor, nn.Parameter):
            parts.append(cut(tensor, selection))
            tensors[name] = parts[-1].new
        else:
            tensors[name] = selection.of(tensor)
    return parts


def _check_blocks(anatomy: Anatomy, made: Any, kept: Sequence[int]) -> None:
    """Raises StaysError where a block is built with attention of another kind or window than it was.

    The probe may be too short for it to matter. By the plain values that its modules hold.
    """
    blocks = made.get_submodule(anatomy.family.blocks)
    for number, index in enumerate(kept):
        before = dict(anatomy.blocks[index].named_modules())
        for name, module in blocks[number].named_modules():
            old = _plain(before[name]) if name in before else {}
            for key, value in _plain(module).items():
                if key in old and old[key] != value and _UNSEEN.search(key):
                    where = f"{name}.{key}" if name else key
                    raise StaysError(f"block {index} would have {where}={value} in place of {old[key]}")


def _plain(module: nn.Module) -> dict[str, Any]:
    """Values of a module's own attributes, as far as they are plain."""
    plain = bool | int | float | str | None
    return {key: value for key, value in vars(module).items() if not key.startswith("_") and isinstance(value, plain)}


def _renumbered(layout: found.Layout, kept: Sequence[int]) -> found.Layout:
    """Layout of a model that has these blocks of the one that it was found of."""
    prefix = f"{layout.blocks}."

    def name_in(number: int, name: str) -> str:
        return f"{prefix}{number}.{name.removeprefix(prefix).partition('.')[2]}"

    def matrices_in(number: int, matrices: Iterable[found.Matrix]) -> tuple[found.Matrix, ...]:
        return tuple(
            replace(
                matrix,
                name=name_in(number, matrix.name),
                place=replace(matrix.place, parameter=name_in(number, matrix.place.parameter)),
            )
            for matrix in matrices
        )

    new = {index: number for number, index in enumerate(kept)}
    left = {(int(name.removeprefix(prefix).partition(".")[0]), name): why for name, why in layout.left_alone.items()}
    return replace(
        layout,
        matrices=tuple(matrices_in(number, layout.matrices[index]) for number, index in enumerate(kept)),
        left_alone={name_in(new[index], name): why for (index, name), why in left.items() if index in new},
    )
