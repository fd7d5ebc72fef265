"""Matrix products with watched parameters, seen as they are computed, whatever module computes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from prune_lab.models.offload.on_disk import weights_on_disk


@dataclass(frozen=True)
class Place:
    """A matrix (out, in) as it lies in a parameter's storage: all of it, or one expert's part of a fused one."""

    parameter: str
    shape: tuple[int, int]
    strides: tuple[int, int]
    offset: int

    def view(self, tensor: Tensor) -> Tensor:
        """This part of a tensor that is laid out as the parameter is, shape (out, in)."""
        return tensor.as_strided(self.shape, self.strides, tensor.storage_offset() + self.offset)


# Told of each product: the matrix, its inputs (rows, in) and its outputs (rows, out), without a bias or with.
Tell = Callable[[Place, Tensor, Tensor], None]
# Operands of products by name of the operator: inputs and matrix.
_OPERANDS = {"mm": (0, 1), "addmm": (1, 2), "bmm": (0, 1), "baddbmm": (1, 2)}


class Products(TorchDispatchMode):
    """Mode in which every product of activations with a parameter of a model, watched by its full name, is told of.

    A product is recognised by the storage of its second operand, so that Linears, GPT-2's Conv1D, weights that are used
    without their module, and the parts of fused experts are seen alike. Casts of a weight (autocast) are not, unless
    follow_casts: then they are kept as long as the mode lasts. Of a model on disk, those of the block at hand are
    watched.
    """

    def __init__(self, model: Any, names: Iterable[str], tell: Tell, follow_casts: bool = False) -> None:
        super().__init__()
        self._model, self._names, self._tell, self._follows = model, list(names), tell, follow_casts
        self._weights = weights_on_disk(model)
        self._look_up()

    def _look_up(self) -> None:
        """Notes where the parameters lie, as far as they are in memory."""
        self._loads, self._casts = self._weights.loads if self._weights is not None else 0, list[Tensor]()
        # By storage, which several parameters may share: views of one tensor of a checkpoint.
        self._spans: dict[int, list[tuple[int, int, str]]] = {}
        for name in self._names:
            p = self._model.get_parameter(name)
            if not p.is_meta:
                start = int(p.storage_offset())
                self._spans.setdefault(p.untyped_storage().data_ptr(), []).append((start, start + p.numel(), name))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        operands = _OPERANDS.get(func.overloadpacket.__name__)
        if self._weights is not None and self._weights.loads != self._loads:
            self._look_up()
        if operands is not None:
            inputs, weight = args[operands[0]], args[operands[1]]
            place = int(weight.storage_offset())
            for start, end, name in self._spans.get(weight.untyped_storage().data_ptr(), ()):
                if start <= place < end:
                    self._look(name, start, inputs, weight, out)
        elif self._follows and func.overloadpacket.__name__ == "_to_copy":
            self._follow(args[0], out)
        return out

    def _follow(self, tensor: Tensor, cast: Tensor) -> None:
        """Watches a cast of a whole parameter as that parameter."""
        start, size = int(tensor.storage_offset()), tensor.numel()
        for begin, end, name in self._spans.get(tensor.untyped_storage().data_ptr(), ()):
            if (begin, end) == (start, start + size) and cast.stride() == tensor.stride():
                self._casts.append(cast)  # so that its storage is no other tensor's meanwhile
                place = int(cast.storage_offset())
                self._spans.setdefault(cast.untyped_storage().data_ptr(), []).append((place, place + size, name))
                return

    def _look(self, name: str, start: int, inputs: Tensor, weight: Tensor, out: Tensor) -> None:
        if weight.dim() == 3 and weight.stride(0) == 0:  # one matrix for the whole batch
            inputs, weight, out = inputs.flatten(0, 1), weight[0], out.flatten(0, 1)
        parts = [(inputs, weight, out)] if weight.dim() == 2 else zip(inputs, weight, out, strict=True)
        for x, w, y in parts:
            place = Place(name, (w.shape[1], w.shape[0]), (w.stride(1), w.stride(0)), int(w.storage_offset()) - start)
            self._tell(place, x.detach(), y.detach())


@contextmanager
def eager_experts(model: Any) -> Iterator[None]:
    """Context in which experts compute one after the other, so that products with each of them are seen."""
    before = experts_of(model)
    if before in (None, "eager"):
        yield
        return
    set_experts(model, "eager")
    try:
        yield
    finally:
        set_experts(model, before)


def experts_of(model: Any) -> str | None:
    """Implementation by which the experts of a model compute; None where transformers has no choice of it."""
    how: str | None = getattr(model.config.get_text_config(), "_experts_implementation", None)
    return how if hasattr(model, "set_experts_implementation") else None


def set_experts(model: Any, how: str) -> None:
    """Has the experts of a model compute in another way.

    A wrapper whose text part is a model of another file has no experts of its own, and refuses to be asked itself.
    """
    config = model.config
    if (text := config.get_text_config()) is config:
        model.set_experts_implementation(how)
    else:
        parts = [key for key in config.sub_configs if getattr(config, key, None) is text]
        model.set_experts_implementation({"": config._experts_implementation, **dict.fromkeys(parts, how)})


class FusedMatrix:
    """A matrix (out, in) that is a part of a parameter, or a parameter without a Linear of its own.

    It has what pruning asks of a Linear: a `weight`, which is a view, so that what is written to it is the model's.
    """

    bias = None

    def __init__(self, model: Any, place: Place) -> None:
        owner, _, self._leaf = place.parameter.rpartition(".")
        self._owner, self.place = model.get_submodule(owner), place

    @property
    def parameter(self) -> Tensor:
        """The parameter, as its module has it now: of a block on disk, while that is at hand, with values."""
        found: Tensor = getattr(self._owner, self._leaf)
        return found

    @property
    def weight(self) -> Tensor:
        """View of the parameter, shape (out, in)."""
        return self.place.view(self.parameter.detach())

    def of(self, tensor: Tensor) -> Tensor:
        """This matrix's part of a tensor of the parameter's shape, such as its gradient."""
        return self.place.view(tensor.contiguous())


def seen_on(model: Any, parameters: Iterable[str], tokens: Tensor) -> dict[Place, int]:
    """Matrices that a forward pass on `tokens`, shape (windows, tokens), multiplies by, with the rows that each saw.

    parameters: full names of those that are watched.
    """
    rows: dict[Place, int] = {}

    def count(place: Place, inputs: Tensor, _: Tensor) -> None:
        rows[place] = rows.get(place, 0) + len(inputs)

    with torch.no_grad(), eager_experts(model), Products(model, parameters, count):
        model(input_ids=tokens, use_cache=False)
    return rows
