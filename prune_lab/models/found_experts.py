"""Experts of a mixture as units: found by the config field that counts them, and compared without some of them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from prune_lab.models.found import ROUTER, Layout, Matrix, found_once, is_same, layout_of
from prune_lab.models.offload.on_disk import at_hand
from prune_lab.models.rebuild import edited, shapes, skeleton, text_parts
from prune_lab.models.unit_cut import filled, selections
from prune_lab.models.unit_fields import config_of
from prune_lab.models.unit_probe import Calls
from prune_lab.models.unit_sets import Beside, FoundGroup, FoundSet
from prune_lab.models.watched_experts import (
    Mixture,
    called_with_choices,
    first_of,
    most_of_a_token,
    pass_tokens,
    without_experts,
)

EXPERTS = "experts"  # name and kind of the group
NO_EXPERTS = "it has no experts that a field of its config counts"
_GROUPS, _TAKEN = ("n_group", "num_expert_group"), "topk_group"  # config fields of router_groups
_CHOICES = re.compile(r"bias|correction|statics")  # added to what experts are chosen by, for each expert


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
    called = called_with_choices(model, {b.tensor.rpartition(".")[0] for b in group.beside if b.tensor in fused})
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
        pass_tokens(
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


def gated_mixtures(model: Any) -> list[Mixture] | str:
    """The mixtures of a model, whatever could be removed of them, or the reason why their gates cannot be seen."""
    group = find_experts(model, layout_of(model))
    found = group if isinstance(group, str) else mixtures_of(model, group)
    if isinstance(found, str):
        return found
    scaled = [mixture.block for mixture in found if mixture.scores]
    return _not_called(scaled[0]) if scaled else found


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
