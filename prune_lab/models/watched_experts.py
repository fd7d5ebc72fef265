"""Experts of a mixture at work: which of them each token goes to, what they give for it, and a model without some.

The modules of experts of transformers are called with states, choices and gates, whatever router is before them:
hidden_states (tokens, hidden), the experts of each token (tokens, k), and what their outputs are multiplied by. Those
of Llama 4 are called with the states of all tokens for each expert, which the scores of the router have multiplied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prune_lab.models.found import ROUTER, Layout, evaluating, found_once, probe_tokens
from prune_lab.models.low_bit.experts import LowBitExperts
from prune_lab.models.products import Place, Products


@dataclass(frozen=True)
class Mixture:
    """Mixture of a block: names of its module of experts, of the module that it and the router are in, and tensors.

    router: matrices whose rows are the experts. choices: other tensors that are added to what experts are chosen by.
    scores: module that gives (tokens, experts) scores, 0 of experts that are not chosen, where these multiply the
    states that experts are called with; empty where experts are called with choices and gates.
    """

    block: int
    experts: str
    whole: str
    router: tuple[str, ...]
    choices: tuple[str, ...]
    scores: str = ""

    @property
    def seen_at(self) -> str:
        """The module whose calls tell the experts of a token."""
        return self.scores or self.experts


def pass_tokens(model: Any, *hooks: Any) -> None:
    """Passes a few tokens through a model and removes the hooks that watch it."""
    try:
        with torch.no_grad():
            model(input_ids=probe_tokens(model)[:1], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()


def first_of(out: Any) -> Tensor:
    """First output of a module, which may give several."""
    found: Tensor = out[0] if isinstance(out, tuple | list) else out
    return found


def called_with_choices(model: Any, owners: set[str]) -> dict[str, str]:
    """The module of experts that each owner of their weights is or is in: what is called with choices and gates."""
    return found_once(model, frozenset(owners), lambda: _find_called(model, owners))


def _find_called(model: Any, owners: set[str]) -> dict[str, str]:
    seen, hooks = set[str](), list[Any]()

    def look(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if len(given) >= 3 and not given[1].is_floating_point() and given[1].shape == given[2].shape:
            seen.add(name)

    above = {owner: [owner.rsplit(".", up)[0] for up in range(3)] for owner in owners}
    for name in {name for names in above.values() for name in names}:
        hooks.append(
            model.get_submodule(name).register_forward_pre_hook(
                lambda _, args, kwargs, name=name: look(name, args, kwargs), with_kwargs=True
            )
        )
    pass_tokens(model, *hooks)
    return {owner: name for owner, names in above.items() for name in names[::-1] if name in seen}


# Told of each call of experts: the block, states (tokens, hidden), experts (tokens, k), gates (tokens, k).
Called = Callable[[int, Tensor, Tensor, Tensor], None]


def by_block(mixtures: Iterable[Mixture]) -> dict[int, str]:
    """Names, by block, of the modules whose calls tell the experts of a token."""
    return {mixture.block: mixture.seen_at for mixture in mixtures}


def modules_of_experts(model: Any, layout: Layout) -> dict[int, str]:
    """Names, by block, of the modules of experts that are called with states, choices and gates; none of most types."""
    if ROUTER not in layout.left_alone.values():
        return {}
    fused = [m.place.parameter for of_block in layout.matrices for m in of_block if not m.is_linear]
    fused += [name for name, module in model.named_modules() if isinstance(module, LowBitExperts)]
    owners = dict[int, set[str]]()
    for name in fused:
        block = int(name.removeprefix(f"{layout.blocks}.").partition(".")[0])
        owners.setdefault(block, set()).add(name.rpartition(".")[0])
    with evaluating(model):
        called = called_with_choices(model, set().union(*owners.values()))
    found = {block: {called[owner] for owner in of if owner in called} for block, of in owners.items()}
    return {block: names.pop() for block, names in found.items() if len(names) == 1}


@contextmanager
def watched(model: Any, modules: Mapping[int, str], called: Called) -> Iterator[None]:
    """Context in which every call of a module of experts is told of; modules: its full name by block.

    Of experts that are called with scaled states it is the router, whose scores are the gates (Mixture.scores).
    """

    def before(block: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = (*args, *kwargs.values())
        if len(given) < 3:  # a router
            return
        states, chosen, gates = given[:3]
        called(block, states.flatten(0, -2), chosen.reshape(-1, chosen.shape[-1]), gates.reshape(-1, gates.shape[-1]))

    def behind(block: int, args: tuple[Any, ...], out: Any) -> None:
        if len(args) != 1:  # experts
            return
        scores = first_of(out)
        gates, chosen = scores.topk(int((scores != 0).sum(1).max()), dim=1)
        called(block, args[0].flatten(0, -2), chosen, gates)

    hooks = list[Any]()
    for block, name in modules.items():
        module = model.get_submodule(name)
        hooks += [
            module.register_forward_pre_hook(
                lambda _, args, kwargs, block=block: before(block, args, kwargs), with_kwargs=True
            ),
            module.register_forward_hook(lambda _, args, out, block=block: behind(block, args, out)),
        ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def outputs_of(model: Any, mixture: Mixture, states: Tensor, chosen: Tensor) -> Tensor:
    """Output of each token's experts before the gate, (tokens, k, hidden), as the model's own module computes them.

    Where the gates multiply the states, it is that of the states without them, as REAP's authors have it for Llama 4.
    """
    tokens, k = chosen.shape
    if mixture.scores:
        count = model.get_parameter(mixture.router[0]).shape[0]
        of_all = model.get_submodule(mixture.experts).forward(states.repeat(count, 1)).view(count, tokens, -1)
        at = torch.arange(tokens, device=chosen.device)
        return torch.stack([of_all[chosen[:, i], at] for i in range(k)], 1)
    each = states.repeat_interleave(k, 0)
    ones = torch.ones(tokens * k, 1, dtype=states.dtype, device=states.device)
    module = model.get_submodule(mixture.experts)
    found: Tensor = module.forward(each, chosen.reshape(-1, 1), ones)
    return found.view(tokens, k, -1)


@contextmanager
def without_experts(model: Any, mixtures: list[Mixture], gone: Mapping[int, Tensor]) -> Iterator[None]:
    """Context in which routers give some experts of each block minus infinity, so that no token chooses them.

    gone: by block, bools (experts,), or (tokens, experts) for those of each token.
    """
    blocks = {name: mixture.block for mixture in mixtures for name in mixture.router if mixture.block in gone}

    def tell(place: Place, inputs: Tensor, outputs: Tensor) -> None:
        mask = gone[blocks[place.parameter]].to(outputs.device)
        outputs.masked_fill_(mask.expand(outputs.shape), -torch.inf)

    put = list[tuple[dict[str, Any], str, Any]]()
    try:
        for mixture in mixtures:
            mask = gone.get(mixture.block)
            if mask is None or mask.dim() > 1:
                continue
            for name in mixture.choices:
                owner, _, key = name.rpartition(".")
                module = model.get_submodule(owner)
                tensors = module._parameters if key in module._parameters else module._buffers
                put.append((tensors, key, tensors[key]))
                tensors[key] = _with_infinity(tensors[key], mask)
        with Products(model, blocks, tell, follow_casts=True):
            yield
    finally:
        for tensors, key, before in put:
            tensors[key] = before


def _with_infinity(tensor: Tensor, mask: Tensor) -> Tensor:
    """A tensor like another, a parameter or a buffer, with minus infinity where a mask of its last dimension is."""
    found = tensor.detach().clone()
    found[..., mask.to(tensor.device)] = -torch.inf
    return torch.nn.Parameter(found, requires_grad=False) if isinstance(tensor, torch.nn.Parameter) else found


def experts_of_a_token(model: Any, modules: Mapping[int, str], counts: Mapping[str, int]) -> dict[str, float]:
    """Experts with weights that a token goes to, on average, by the name of the module that has so many of them.

    Some types have experts without weights beside them (LongCat-Flash), which take a part of a token's choices.
    """
    found = dict[str, float]()

    def look(block: int, states: Tensor, chosen: Tensor, gates: Tensor) -> None:
        for owner, count in counts.items():
            if f"{owner}.".startswith(f"{modules[block]}."):
                found[owner] = float((chosen < count).sum()) / len(chosen)

    with evaluating(model), watched(model, modules, look):
        model(input_ids=probe_tokens(model), use_cache=False)
    return found


def most_of_a_token(model: Any, mixtures: list[Mixture]) -> int:
    """Largest number of experts that a block sends a token to."""
    found: int = found_once(model, "experts of a token", lambda: max(top_k_of(model, by_block(mixtures))))
    return found


def top_k_of(model: Any, modules: Mapping[int, str]) -> set[int]:
    """Numbers of experts that the blocks of a model send a token to; modules: of experts, by block."""
    found = set[int]()
    with (
        evaluating(model),
        watched(model, modules, lambda block, states, chosen, gates: found.add(chosen.shape[-1])),
    ):
        model(input_ids=probe_tokens(model)[:1], use_cache=False)
    return found
