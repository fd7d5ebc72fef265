"""Experts of a mixture as units: found by the config field that counts them, and a model as it is without some of them.

The modules of experts of transformers are called with states, choices and gates, whatever router is before them:
hidden_states (tokens, hidden), the experts of each token (tokens, k), and what their outputs are multiplied by. Those
of Llama 4 are called with the states of all tokens for each expert, which the scores of the router have multiplied.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from prune_lab.models.found import ROUTER, Layout, Matrix, evaluating, found_once, is_same, layout_of, probe_tokens
from prune_lab.models.low_bit.experts import LowBitExperts
from prune_lab.models.offload.on_disk import at_hand
from prune_lab.models.products import Place, Products
from prune_lab.models.rebuild import edited, shapes, skeleton, text_parts
from prune_lab.models.unit_cut import filled, selections
from prune_lab.models.unit_fields import config_of
from prune_lab.models.unit_probe import Calls
from prune_lab.models.unit_sets import Beside, FoundGroup, FoundSet

EXPERTS = "experts"  # name and kind of the group
NO_EXPERTS = "it has no experts that a field of its config counts"
_GROUPS, _TAKEN = ("n_group", "num_expert_group"), "topk_group"  # config fields of router_groups
_CHOICES = re.compile(r"bias|correction|statics")  # added to what experts are chosen by, for each expert


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


def find_experts(model: Any, layout: Layout) -> FoundGroup | str:
    """The experts of all blocks as one group, or the reason why there are none that could be removed."""
    was = shapes(model, model.config)
    if was is None:
        return "its class of transformers cannot be built from its config"
    why = NO_EXPERTS
    for number, part in enumerate(text_parts(model.config.to_dict())):
        for key, count in part.items():
            if "expert" not in key or isinstance(count, bool) or not isinstance(count, int) or count < 2:
                continue
            group = _group_of(model, layout, (number, key), count, was)
            if isinstance(group, FoundGroup):
                return group
            why = group or why
    return why


def _group_of(
    model: Any, layout: Layout, field: tuple[int, str], count: int, was: dict[str, tuple[int, ...]]
) -> FoundGroup | str | None:
    """The group that a config field counts; None where it counts something else, or a reason."""
    number, key = field

    for other in (count + 1, count - 1):  # of one expert some types make an MLP without a router

        def _change(data: dict[str, Any], other: int = other) -> None:
            text_parts(data)[number][key] = other

        config = edited(model.config, _change)
        now = shapes(model, config) if config is not None else None
        if now is not None:
            break
    if now is None or now == was:
        return None
    routers = {name for name, reason in layout.left_alone.items() if reason == ROUTER}
    fused = {m.place.parameter for of_block in layout.matrices for m in of_block if not m.is_linear}
    changed = [name for name in was if now.get(name) != was[name]]
    if not routers & set(changed) or not fused & set(changed):
        return None
    if was.keys() != now.keys():
        return "another number of experts would be another set of tensors"
    prefix, of_block = f"{layout.blocks}.", dict[int, list[tuple[str, int, int]]]()
    for name in changed:
        for dim, (old, new) in enumerate(zip(was[name], now[name], strict=True)):
            if old == new:
                continue
            if not name.startswith(prefix) or old % count or new * count != old * other:
                return f"{name} would change, too, and has not a part for each expert"
            block = int(name.removeprefix(prefix).partition(".")[0])
            of_block.setdefault(block, []).append((name, dim, old // count))
    sets = tuple(FoundSet(block, count, ()) for block in sorted(of_block))
    beside = tuple(
        Beside(name, dim, (index,), (width,))
        for index, s in enumerate(sets)
        for name, dim, width in of_block[s.block]
    )  # fmt: skip
    return FoundGroup(EXPERTS, EXPERTS, count, (field,), sets, beside)


def mixtures_of(model: Any, group: FoundGroup) -> list[Mixture] | str:
    """The mixture of each set of a group, or the reason why what its experts are given cannot be seen."""
    layout, found = layout_of(model), list[Mixture]()
    fused = {m.place.parameter for of_block in layout.matrices for m in of_block if not m.is_linear}
    called = _called_with_choices(model, {b.tensor.rpartition(".")[0] for b in group.beside if b.tensor in fused})
    for index, s in enumerate(group.sets):
        tensors = [beside.tensor for beside in group.beside if beside.sets == (index,)]
        owners = {name.rpartition(".")[0] for name in tensors if name in fused}
        routers = [name for name in tensors if layout.left_alone.get(name) == ROUTER]
        if len(owners) != 1 or not routers:
            return f"block {s.block} has its experts in several modules"
        weights = owners.pop()
        owner, scores = called.get(weights), ""
        if owner is None:
            scores = _scores_of(model, weights, routers[0].rpartition(".")[0], group.count)
            owner = weights
        if not (owner in called.values() or scores):
            return _not_called(s.block)
        whole = _common_module([owner, *(name.rpartition(".")[0] for name in routers)])
        if (table := _table_of_tokens(model.get_submodule(whole))) is not None:
            return f"{whole}.{table} says by the token which experts it goes to"
        choices = [
            name for name in tensors if name not in routers and name not in fused and not name.startswith(f"{owner}.")
        ]
        found.append(
            Mixture(s.block, owner, whole, tuple(routers), tuple(n for n in choices if _CHOICES.search(n)), scores)
        )  # fmt: skip
    return found


def _not_called(block: int) -> str:
    return f"the experts of block {block} are not called with states, choices and gates"


def _scores_of(model: Any, experts: str, router: str, count: int) -> str:
    """Name of the router whose scores multiply the states that a module of experts is called with; empty if none does.

    The experts are called once, with the states of all tokens for one expert after the other; those of tokens that have
    not chosen it are 0.
    """

    def look() -> str:
        given, routed = list[tuple[Any, ...]](), list[tuple[Any, ...]]()
        _passed(
            model,
            model.get_submodule(experts).register_forward_pre_hook(lambda _, args: given.append(args)),
            model.get_submodule(router).register_forward_hook(lambda _, args, out: routed.append((*args, out))),
        )
        if [len(args) for args in given] != [1] or [len(call) for call in routed] != [2]:
            return ""  # called several times, or with something else
        ((rows,),), ((states, out),) = given, routed
        states, scores = states.flatten(0, -2), first_of(out)
        if scores.shape != (len(states), count) or rows.shape != (count * len(states), states.shape[-1]):
            return ""
        scaled = states.repeat(count, 1) * scores.T.reshape(-1, 1)
        chosen = (scores != 0).sum(1)
        return router if torch.equal(scaled, rows) and bool((chosen == chosen[0]).all()) else ""

    found: str = found_once(model, f"scores of {experts}", look)
    return found


def _passed(model: Any, *hooks: Any) -> None:
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


def gated_mixtures(model: Any) -> list[Mixture] | str:
    """The mixtures of a model, whatever could be removed of them, or the reason why their gates cannot be seen."""
    group = find_experts(model, layout_of(model))
    found = group if isinstance(group, str) else mixtures_of(model, group)
    if isinstance(found, str):
        return found
    scaled = [mixture.block for mixture in found if mixture.scores]
    return _not_called(scaled[0]) if scaled else found


def _called_with_choices(model: Any, owners: set[str]) -> dict[str, str]:
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
    _passed(model, *hooks)
    return {owner: name for owner, names in above.items() for name in names[::-1] if name in seen}


def with_experts(model: Any, layout: Layout, was: int, count: int) -> Layout:
    """The layout of a model that has `count` of `was` experts in each block now, of what it was before.

    The rest of it is the same: found anew, it would take as many passes through the model.
    """
    matrices = tuple(tuple(_left_of(model, of_block, was, count)) for of_block in layout.matrices)
    inside = sum(matrix.place.shape[0] * matrix.place.shape[1] for of_block in matrices for matrix in of_block)
    total = sum(parameter.numel() for parameter in model.get_submodule(layout.blocks).parameters())
    return replace(layout, matrices=matrices, share=inside / max(1, total))


def _left_of(model: Any, of_block: tuple[Matrix, ...], was: int, count: int) -> Iterator[Matrix]:
    by_parameter = dict[str, list[Matrix]]()
    for matrix in of_block:
        by_parameter.setdefault(matrix.place.parameter, []).append(matrix)
    for name, matrices in by_parameter.items():
        left = model.get_parameter(name).numel() // (matrices[0].place.shape[0] * matrices[0].place.shape[1])
        is_cut = left < len(matrices)
        yield from (replace(m, active=m.active * was / count) if is_cut else m for m in matrices[:left])


def router_groups(config: Any) -> tuple[int, int]:
    """Runs of experts that a router chooses among first, and how many of them it takes; 1 and 1 without any."""
    part = config.get_text_config().to_dict()
    groups = next((part[key] for key in _GROUPS if isinstance(part.get(key), int)), 1)
    taken = part.get(_TAKEN)
    return max(1, groups), max(1, taken if isinstance(taken, int) else groups)


def can_choose(count: int, top_k: int, groups: int, chosen: int) -> bool:
    """True where a router can choose `top_k` of `count` experts; of groups it takes the two best experts' sum first."""
    if groups == 1:
        return count >= top_k
    return count % groups == 0 and count // groups >= 2 and chosen * count // groups >= top_k


@torch.no_grad()
def check_experts(model: Any, group: FoundGroup, calls: Calls) -> str | None:
    """None where a block without one expert of each run is what it is with a router that avoids them; else why not."""
    mixtures = mixtures_of(model, group)
    if isinstance(mixtures, str):
        return mixtures
    runs, seen = router_groups(model.config)[0], set[Any]()
    top_k = most_of_a_token(model, mixtures)
    if not can_choose(group.count - runs, top_k, *router_groups(model.config)):  # none can go
        return None
    gone = torch.zeros(runs, group.count // runs, dtype=torch.bool)
    gone[:, -1] = True
    try:
        config = config_of(model, group, group.count - runs)
        made = skeleton(model, config).eval()
        chosen = selections(model, group, [~gone.flatten() for _ in group.sets])
        for mixture in mixtures:
            path = f"{layout_of(model).blocks}.{mixture.block}"
            sort = tuple((n.removeprefix(path), p.shape) for n, p in model.get_submodule(path).named_parameters())
            if sort in seen:
                continue
            seen.add(sort)
            with at_hand(model, path), filled(made, model, path, chosen) as fewer:
                if not gives_the_same(model, mixture, gone.flatten(), calls, fewer):
                    return f"block {mixture.block} with fewer experts is not one whose router avoids the others"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of any modelling code of transformers
        return f"a block with fewer experts does not run ({type(error).__name__})"
    return None


def gives_the_same(model: Any, mixture: Mixture, gone: Tensor, calls: Calls, fewer: Any) -> bool:
    """True where a block with fewer experts gives what the model's own gives while no token chooses those that go.

    gone: bools (experts,). The block is at hand.
    """
    with without_experts(model, [mixture], {mixture.block: gone}):
        wanted = calls.output(mixture.block)
    return is_same(calls.output(mixture.block, fewer), wanted)


def _table_of_tokens(whole: Any) -> str | None:
    """The name of a tensor of whole numbers in a mixture, of more than one dimension; None where there is none."""
    tensors = [*whole.named_parameters(), *whole.named_buffers()]
    return next(
        (name for name, t in tensors if t.dim() > 1 and not t.is_floating_point() and t.dtype != torch.bool), None
    )


def _common_module(names: list[str]) -> str:
    parts = [name.split(".") for name in names]
    shared = 0
    while all(len(part) > shared + 1 for part in parts) and len({part[shared] for part in parts}) == 1:
        shared += 1
    return ".".join(parts[0][:shared])


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
        called = _called_with_choices(model, set().union(*owners.values()))
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
