"""Channels of the hidden size: which of them stay, the refit of the Linears that read them, and their removal.

The score is Minitron's (Muralidharan et al., 2407.14679): of the outputs A of each norm before an attention or MLP, the
mean of |A| over the tokens of a window, squared and summed over windows, and its root summed over the norms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from prune_lab.errors import Refused
from prune_lab.models.anatomy import HIDDEN, Anatomy
from prune_lab.models.hidden import (
    Readers,
    axes_of,
    check_count,
    hidden_of,
    hidden_size,
    readers_of,
    remove_hidden,
)
from prune_lab.models.rebuild import tensors_of
from prune_lab.models.resize import dense_count
from prune_lab.pruning.calibration import Calibrator
from prune_lab.pruning.gram import DAMPING, damped_cholesky
from prune_lab.pruning.pruned import LayerRow, Pruned
from prune_lab.pruning.refit import check_finite
from prune_lab.pruning.selection import keep_rows

_AT_ONCE = 2**30  # numbers in the gram matrices of one pass


def check_hidden(anatomy: Anatomy, score: str, counts: Iterable[int]) -> None:
    """Raises Refused where a model cannot have such counts of channels, or not the norms that a score reads."""
    hidden_of(anatomy.model)
    if score == "minitron" and not readers_of(anatomy.model).norms:
        raise Refused(
            f"method.score=minitron: no norm of a {anatomy.config.model_type} model has outputs that its blocks' "
            "matrices read; give method.score=random"
        )
    for count in counts:
        check_count(anatomy.model, count)


def prune_hidden(
    anatomy: Anatomy, count: int, score: str, refit: bool, seed: int, calibrator: Calibrator | None
) -> Pruned:
    """Removes the channels of lowest score but for `count` of them; refit: whether what reads them is set anew."""
    now = anatomy.unit_count(HIDDEN)
    pruned = Pruned(rows=rows_of_hidden(anatomy, dense_count(anatomy, HIDDEN), count))
    if count == now:
        return pruned
    if score == "random":
        scores = torch.rand(now, generator=torch.Generator().manual_seed(seed))
    else:
        assert calibrator is not None
        scores = minitron_scores(anatomy, readers_of(anatomy.model).norms, calibrator)
    if not scores.isfinite().all():
        raise Refused("the scores of the hidden size are not finite: activations overflow; give another dtype")
    keep = keep_rows(scores[None], now - count)[0]
    if refit:
        assert calibrator is not None
        pruned.warnings += refit_readers(anatomy, readers_of(anatomy.model), keep, calibrator)
    pruned.cuts += remove_hidden(anatomy, keep)
    return pruned


def add_magnitudes(sums: Tensor, states: Tensor) -> None:
    """Adds to sums, (channels,), of each window of states (windows, tokens, channels) its mean of |states|, squared."""
    sums += states.float().abs().mean(1).square().sum(0)


def minitron_scores(anatomy: Anatomy, norms: list[str], calibrator: Calibrator) -> Tensor:
    """Score of each channel, (channels,), fp32, on the CPU; computed once for the dense model."""

    def scores() -> list[float]:
        sums = {name: torch.zeros(hidden_size(anatomy.model), device=anatomy.model.device) for name in norms}
        with _watched(anatomy, norms, lambda name, states, out: add_magnitudes(sums[name], out)):
            calibrator.pass_whole(anatomy.model, "calibrating")
        calibrator.sharing.sum(sums.values())
        found: list[float] = torch.stack([of_norm.sqrt() for of_norm in sums.values()]).sum(0).tolist()
        return found

    return torch.tensor(calibrator.remember(anatomy, "hidden_scores", {"norms": norms}, scores))


@torch.no_grad()
def refit_readers(anatomy: Anatomy, readers: Readers, keep: Tensor, calibrator: Calibrator) -> list[str]:
    """Refits the columns of the Linears that read the states for the channels that stay; returns what is to be said.

    keep: bools (channels,). A Linear is to give for what its norm makes of the states without the channels that go, X',
    what it gave for that of all of them, X: W' minimises |X W^T - X' W'^T|^2 plus a ridge towards W. The states are the
    dense model's. A head that is tied to the embedding stays as it is.
    """
    model, refitted, notes = anatomy.model, dict[str, Tensor](), list[str]()
    embedding, mask = model.get_input_embeddings().weight, keep.to(model.device)
    linears = {
        norm: [(name, linear) for name in of if (linear := model.get_submodule(name)).weight is not embedding]
        for norm, of in readers.linears.items()
    }
    norms = [norm for norm, of in linears.items() if of]
    each = max(1, _AT_ONCE // (2 * len(keep) ** 2))
    for part in (norms[start : start + each] for start in range(0, len(norms), each)):
        for norm, (inner, cross) in _grams(anatomy, part, mask, calibrator).items():
            mean = inner.diagonal().mean()
            lower, used = damped_cholesky(inner, mean, DAMPING)
            if used > DAMPING:
                notes.append(f"{norm}: the refit of what reads it needed damping {used:g} instead of {DAMPING:g}")
            for name, linear in linears[norm]:
                weight = linear.weight.float()
                solved = torch.cholesky_solve(cross @ weight.T + used * mean * weight[:, mask].T, lower).T
                refitted[name] = solved.to(linear.weight.dtype)
                check_finite(name, refitted[name])
    for name, solved in refitted.items():  # now: the passes are through the dense model
        model.get_submodule(name).weight[:, mask] = solved
    return notes + _not_refitted(model, set(refitted))


def _grams(
    anatomy: Anatomy, norms: list[str], keep: Tensor, calibrator: Calibrator
) -> dict[str, tuple[Tensor, Tensor]]:
    """X'^T X' (kept, kept) and X'^T X (kept, channels) by norm.

    X: its outputs; X': those that it has where the channels that go are zero.
    """
    width, device = int(keep.sum()), anatomy.model.device
    sums = {
        name: (torch.zeros(width, width, device=device), torch.zeros(width, len(keep), device=device)) for name in norms
    }

    def tell(name: str, states: Tensor, out: Tensor) -> None:
        without = anatomy.model.get_submodule(name).forward(states * keep)[..., keep].flatten(0, -2).float()
        inner, cross = sums[name]
        inner += without.T @ without
        cross += without.T @ out.flatten(0, -2).float()

    with _watched(anatomy, norms, tell):
        calibrator.pass_whole(anatomy.model, "calibrating")
    calibrator.sharing.sum(chain.from_iterable(sums.values()))
    return sums


def _not_refitted(model: Any, refitted: set[str]) -> list[str]:
    """Note of what reads the states and was cut alone: a tied head, matrices that are no Linear's."""
    embedding, tensors, found = model.get_input_embeddings(), tensors_of(model), list[str]()
    for name, dim in axes_of(model).items():
        owner, module = name.rpartition(".")[0], model.get_submodule(name.rpartition(".")[0])
        if module is embedding or owner in refitted or tensors[name].dim() < 2:
            continue
        if not isinstance(module, nn.Linear) or dim == 1:
            found.append(
                f"{name} (tied to the embedding)" if getattr(module, "weight", None) is embedding.weight else name
            )
    if not found:
        return []
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return [f"method.refit=inputs: cut and not refitted are {', '.join(found[:3])}{more}"]


@contextmanager
def _watched(anatomy: Anatomy, norms: Iterable[str], tell: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """Context in which `tell` is told of inputs and outputs of norms."""
    hooks = [
        anatomy.model.get_submodule(name).register_forward_hook(
            lambda _, args, out, name=name: tell(name, args[0], out)
        )
        for name in norms
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def rows_of_hidden(anatomy: Anatomy, total: int, count: int) -> list[LayerRow]:
    """Rows of the per-layer table, before shapes change: of each module the weights along the states' channels.

    A tied matrix is in the row of the first module that has it. total: channels of the dense model; count: those that
    stay.
    """
    now, seen, owned = hidden_size(anatomy.model), set[int](), dict[str, int]()
    tensors = tensors_of(anatomy.model)
    for name in axes_of(anatomy.model):
        if id(tensors[name]) in seen:
            continue
        seen.add(id(tensors[name]))
        module = name.rpartition(".")[0]
        owned[module] = owned.get(module, 0) + tensors[name].numel() // now
    return [LayerRow(name, each * total, each * (total - count)) for name, each in owned.items()]
