"""A model's layout, found by running it on a few tokens: for types that the table of models/families.py does not have.

Which of its modules are the decoder blocks, by which matrices they multiply (Linears, parts of fused experts, in either
orientation), what in them is left alone and why, and whether blocks can be called one by one.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from prune_lab.errors import Refused
from prune_lab.models import layout_cache
from prune_lab.models.products import FusedMatrix, Place, seen_on

_KEPT, _FACTS = "_found_layout", "_found_with_layout"  # with the model and its copies; in no export
Found = TypeVar("Found")
_PROBE = (2, 24)  # windows and tokens that a model is looked at with
# Reasons why a tensor of two dimensions or more is left alone; the last for all that no matrix product has.
ROUTER, CONVOLUTION, BIAS = "router of experts", "kernel of a convolution", "bias"
UNUSED = "Linear that text alone does not use"  # such as cross-attention without an encoder
IN_PARTS = "matrix used in parts that do not lie one after the other"
NO_PRODUCT = "parameter of no product that is followed"
_ROUTER = re.compile(r".*router.*|.*expert_gate|wg")  # parts of a name; "gate" is one only beside experts


@dataclass(frozen=True)
class Matrix:
    """A prunable matrix: a Linear by its full name, or a part of a parameter that is no Linear's (`is_linear` False).

    active: rows that it multiplies for each token: below 1 for routed experts, above for a block that is used twice.
    """

    name: str
    place: Place
    is_linear: bool
    active: float = 1.0


@dataclass(frozen=True)
class Layout:
    """Layout of a model's decoder blocks.

    blocks: full name of the list of blocks. matrices: those of each block. left_alone: reason by full name, for each
    matrix of two dimensions or more inside a block that is not pruned. share: of the blocks' parameters in `matrices`.
    one_by_one: whether blocks called one by one give the model's states. whole_logits: whether the logits are more than
    the output embeddings of the last states (a scale), so that the head cannot be run on some positions alone.
    decodes: whether the next token, after the cache of those before it, has the logits that it has in the whole text.
    """

    blocks: str
    matrices: tuple[tuple[Matrix, ...], ...]
    left_alone: dict[str, str] = field(default_factory=dict)
    share: float = 1.0
    one_by_one: bool = True
    whole_logits: bool = False
    decodes: bool = True

    @property
    def is_fused(self) -> bool:
        """True where a matrix is no Linear's weight: experts, as a rule."""
        return any(not matrix.is_linear for of_block in self.matrices for matrix in of_block)

    def modules(self, model: Any, block: int) -> list[tuple[str, Any]]:
        """The matrices of a block with their full names, each as an object with a `weight`."""
        return [(m.name, _module(model, m)) for m in self.matrices[block]]


def layout_of(model: Any) -> Layout:
    """The layout of a model, found once and kept with it; raises Refused where there is none."""
    kept = model.__dict__.get(_KEPT)
    if kept is None:
        kept = model.__dict__[_KEPT] = _find(model)
    found: Layout = kept
    return found


def _read(of: dict[str, Any]) -> Layout:
    """The layout that was kept in the cache."""
    matrices = tuple(tuple(read_matrix(matrix) for matrix in of_block) for of_block in of["matrices"])
    return Layout(**{**of, "matrices": matrices})


def read_matrix(of: dict[str, Any]) -> Matrix:
    """The matrix that asdict and JSON made this of."""
    place = of["place"]
    where = Place(place["parameter"], tuple(place["shape"]), tuple(place["strides"]), place["offset"])
    return Matrix(of["name"], where, of["is_linear"], of["active"])


def found_once(model: Any, key: Any, find: Callable[[], Found]) -> Found:
    """The result of `find` for a model, found once for as long as its layout is the same."""
    layout, (of, kept) = layout_of(model), model.__dict__.get(_FACTS, (None, {}))
    if of is not layout:
        of, kept = model.__dict__[_FACTS] = layout, {}
    if key not in kept:
        kept[key] = find()
    found: Found = kept[key]
    return found


def forget_layout(model: Any) -> None:
    """Has the layout of a model, whose modules are others now, found anew when it is asked for."""
    model.__dict__.pop(_KEPT, None)


def keep(model: Any, layout: Layout) -> None:
    """Keeps with a model, which was rebuilt, the layout that it has now."""
    model.__dict__[_KEPT] = layout


def matrices_of(model: Any, names: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """The Linears and fused matrices of full names, each with its name."""
    layout: Layout | None = model.__dict__.get(_KEPT)
    fused = {m.name: m for of in layout.matrices for m in of if not m.is_linear} if layout is not None else {}
    for name in names:
        yield name, _module(model, fused[name]) if name in fused else model.get_submodule(name)


def _module(model: Any, matrix: Matrix) -> Any:
    if matrix.is_linear:
        return model.get_submodule(matrix.name)
    return FusedMatrix(model, matrix.place)


def _find(model: Any) -> Layout:
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            wanted = model(input_ids=probe_tokens(model)[:1], use_cache=False).logits
        _check_causal(model, wanted)
        layout = layout_cache.kept("layout", model, lambda: _find_parts(model), _read)
        model.__dict__[_KEPT] = layout  # the stream of blocks asks for it
        # Of this model alone: they compare logits, which are those of its weights.
        facts = _is_one_by_one(model, wanted), _has_more_than_head(model, wanted), _decodes(model, wanted)
        return replace(layout, one_by_one=facts[0], whole_logits=facts[1], decodes=facts[2])
    except Refused:
        raise
    except Exception as error:  # of any modelling code of transformers
        raise Refused(
            f"model family {model.config.model_type!r}: its blocks and matrices cannot be found, as it does not run on "
            f"plain text in {model.dtype} ({type(error).__name__}: {str(error)[:100]})"
        ) from error
    finally:
        model.__dict__.pop(_KEPT, None)
        model.train(was_training)


def _find_parts(model: Any) -> Layout:
    """Blocks and matrices, which are a matter of the config."""
    blocks = _find_blocks(model)
    return Layout(blocks, *_find_matrices(model, blocks))


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Context without gradients, in which a model is in eval mode."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def probe_tokens(model: Any) -> Tensor:
    """A few tokens, the same for every model of a vocabulary, shape _PROBE."""
    size = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    return torch.randint(min(4, size - 1), min(size, 1000), _PROBE, generator=generator).to(model.device)


def uncalled_linears(model: Any, layout: Layout) -> list[str]:
    """Linears whose weights the model uses without calling them, as recurrent cores do: hooks do not see them."""
    linears = [matrix.name for of_block in layout.matrices for matrix in of_block if matrix.is_linear]
    called, hooks = set[str](), list[Any]()
    for name in linears:
        module = model.get_submodule(name)
        hooks.append(module.register_forward_pre_hook(lambda *_, name=name: called.add(name)))
    try:
        with evaluating(model):
            model(input_ids=probe_tokens(model), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return [name for name in linears if name not in called]


@torch.no_grad()
def _check_causal(model: Any, wanted: Tensor) -> None:
    """Raises Refused where a token changes the logits of those before it: a perplexity would look at the answer.

    wanted: the logits of the first window of the probe.
    """
    tokens = probe_tokens(model)[:1]
    other = tokens.clone()
    other[0, -1] = tokens[0, 0]
    found = model(input_ids=other, use_cache=False).logits
    if int(tokens[0, 0]) != int(tokens[0, -1]) and not is_same(wanted[:, :-1], found[:, :-1]):
        is_switched_off = getattr(model.config, "is_decoder", None) is False
        hint = "; if it is a decoder, its config.json needs is_decoder=true" if is_switched_off else ""
        raise Refused(
            f"model family {model.config.model_type!r}: a token changes what is predicted of those before it, so that "
            f"its perplexity is none{hint}"
        )


def _find_blocks(model: Any) -> str:
    """Full name of the outermost list of modules with most parameters, of those whose members ran on text."""
    ran, hooks = set[int](), list[Any]()
    for module in model.modules():
        hooks.append(module.register_forward_pre_hook(lambda module, _: ran.add(id(module))))
    try:
        with torch.no_grad():
            model(input_ids=probe_tokens(model), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    sizes: dict[str, int] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or 2 * sum(id(part) in ran for part in module) <= len(module):
            continue
        if not any(name.startswith(f"{outer}.") for outer in sizes):
            sizes[name] = sum(parameter.numel() for parameter in module.parameters())
    if not sizes:
        raise Refused(f"model family {model.config.model_type!r} has no list of decoder blocks that runs on plain text")
    best = max(sizes, key=lambda name: sizes[name])
    if sizes[best] < 0.7 * sum(sizes.values()):
        raise Refused(
            f"model family {model.config.model_type!r} has several lists of blocks ({', '.join(sizes)}), of which the "
            f"largest holds {sizes[best] / sum(sizes.values()):.0%} of their parameters: only one stack of decoder "
            "blocks can be pruned"
        )
    return best


def _find_matrices(model: Any, blocks: str) -> tuple[tuple[tuple[Matrix, ...], ...], dict[str, str], float]:
    """Matrices of each block, what is left alone and why, and the share of the blocks' parameters in matrices."""
    listed = model.get_submodule(blocks)
    parameters = {
        name: p for name, p in model.named_parameters() if name.startswith(f"{blocks}.") and p.dim() >= 2
    }  # fmt: skip
    tokens = probe_tokens(model)
    seen: dict[str, dict[Place, int]] = defaultdict(dict)
    for place, rows in seen_on(model, parameters, tokens).items():
        seen[place.parameter][place] = rows
    of_block = defaultdict[int, list[Matrix]](list)
    left_alone, inside = dict[str, str](), 0
    for name, parameter in parameters.items():
        block = int(name[len(blocks) + 1 :].split(".")[0])
        places = seen.get(name, {})
        reason = _reason_to_leave(model, name, places)
        if reason is not None:
            left_alone[name] = reason
            continue
        of_block[block] += _matrices_of(model, name, parameter, places, tokens.numel())
        inside += parameter.numel()
    total = sum(parameter.numel() for parameter in listed.parameters())
    return tuple(tuple(of_block[block]) for block in range(len(listed))), left_alone, inside / max(1, total)


def _is_of_router(model: Any, name: str) -> bool:
    """True for a parameter of what chooses experts, by the names of the modules that it is in."""
    path = name.split(".")
    for index, part in enumerate(path):
        if _ROUTER.fullmatch(part):
            return True
        if part in ("gate", "classifier"):
            beside = model.get_submodule(".".join(path[:index]))
            if any("expert" in other for other, _ in [*beside.named_children(), *beside.named_parameters()]):
                return True
    return False


def _reason_to_leave(model: Any, name: str, places: dict[Place, int]) -> str | None:
    owner, _, leaf = name.rpartition(".")
    module, parameter = model.get_submodule(owner), model.get_parameter(name)
    if not places:
        if isinstance(module, nn.Conv1d | nn.Conv2d) or "conv" in name:
            return CONVOLUTION
        if leaf.endswith("bias"):
            return BIAS
        return UNUSED if isinstance(module, nn.Linear) else NO_PRODUCT
    if _is_of_router(model, name):
        return ROUTER
    place = next(iter(places))
    size = place.shape[0] * place.shape[1]
    alike = all(p.shape == place.shape and p.strides == place.strides and p.offset % size == 0 for p in places)
    is_whole = parameter.numel() == size
    in_rows = place.strides in ((place.shape[1], 1), (1, place.shape[0]))  # each expert's numbers next to each other
    if not alike or parameter.numel() % size or not (is_whole or (in_rows and parameter.is_contiguous())):
        return IN_PARTS
    return None


def _matrices_of(model: Any, name: str, parameter: Tensor, places: dict[Place, int], tokens: int) -> Iterator[Matrix]:
    """The matrices of a parameter: one, or one for each expert, seen or not, since all of them lie alike."""
    from transformers.pytorch_utils import Conv1D

    one = next(iter(places))
    size = one.shape[0] * one.shape[1]
    count = parameter.numel() // size
    owner, _, leaf = name.rpartition(".")
    active = sum(places.values()) / count / tokens
    if count == 1:
        is_linear = leaf == "weight" and isinstance(model.get_submodule(owner), nn.Linear | Conv1D)
        yield Matrix(owner if is_linear else name, one, is_linear, active)
        return
    for number in range(count):
        yield Matrix(f"{name}.{number}", Place(name, one.shape, one.strides, number * size), False, active)


@torch.no_grad()
def _is_one_by_one(model: Any, wanted: Tensor) -> bool:
    """True where calling block after block gives the model's logits, of a batch that no call was recorded of."""
    from prune_lab.models.anatomy import Anatomy
    from prune_lab.models.blocks import BlockStream

    tokens = probe_tokens(model)
    try:
        stream = BlockStream(Anatomy(model), tokens, 1)  # calls are recorded of the last batch
        stream.run(lambda _: None)
        with stream.replayed(0):
            found = model(input_ids=tokens[:1], use_cache=False).logits
    except Exception:  # of any modelling code of transformers: then it is not
        return False
    return is_same(found, wanted)


@torch.no_grad()
def _has_more_than_head(model: Any, wanted: Tensor) -> bool:
    """True where the output embeddings of the last states are not the model's logits."""
    from prune_lab.models.loss import head_logits, states_before_head

    tokens = probe_tokens(model)[:1]
    try:
        found = head_logits(model, states_before_head(model, tokens))
    except Exception:  # of any modelling code of transformers: then it has
        return True
    return not is_same(found, wanted)


@torch.no_grad()
def _decodes(model: Any, wanted: Tensor) -> bool:
    """True where one token after the cache of those before it has the logits that it has in the whole text."""
    try:
        before, last = decoded(model)
    except Exception:  # of any modelling code of transformers: then it does not
        return False
    return before.shape[1] == 1 and is_same(last, wanted[:, -1:])


@torch.no_grad()
def decoded(model: Any) -> tuple[Tensor, Tensor]:
    """Logits of the last token but one of a text, and of the last one after the cache of those before it."""
    tokens = probe_tokens(model)[:1]
    output = model(input_ids=tokens[:, :-1], use_cache=True, logits_to_keep=1)
    name = "cache" if hasattr(output, "cache") else "past_key_values"
    last = model(input_ids=tokens[:, -1:], use_cache=True, **{name: getattr(output, name)}).logits
    return output.logits, last[:, -1:]


def is_same(found: Tensor, wanted: Tensor, dtype: torch.dtype | None = None) -> bool:
    """True for finite logits that differ as another order of additions in a number type makes them, or not at all.

    dtype: the number type, by default their own.
    """
    if found.shape != wanted.shape or not bool(torch.isfinite(wanted).all()):
        return False
    tolerance = 1e-4 if (dtype or wanted.dtype) == torch.float32 else 2e-2
    return float((found.float() - wanted.float()).abs().max()) <= tolerance * float(wanted.float().abs().max())
