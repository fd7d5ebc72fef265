"""Experts of a token: the field of a config that counts them, found by its effect, and a model with fewer."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch

from prune_lab.errors import Refused
from prune_lab.models.found_experts import gated_mixtures
from prune_lab.models.rebuild import edited, rebuild, rebuilt, tensors_of, text_parts
from prune_lab.models.watched_experts import Mixture, by_block, top_k_of

_KEPT = "_found_top_k"  # with the model and its copies; in no export
_NAMED = re.compile(r"expert|top_?k|moe_k")  # fields that may be it


@dataclass(frozen=True)
class TopK:
    """Experts that each token goes to: how many, and where the config has it.

    field: a part of the config by its number (rebuild.text_parts), and a key of it.
    """

    count: int
    field: tuple[int, str]
    mixtures: tuple[Mixture, ...]


def find_top_k(model: Any) -> TopK | str:
    """The experts of a token in all blocks, found once and kept with a model, or the reason why they are not known."""
    kept: TopK | str | None = model.__dict__.get(_KEPT)
    if kept is None:
        kept = model.__dict__[_KEPT] = _find(model)
    return kept


def top_k_of_model(model: Any) -> TopK:
    """The experts of a token; raises Refused where they are not known."""
    top = find_top_k(model)
    if isinstance(top, str):
        raise Refused(
            f"method=active_experts: a token of this {model.config.model_type} model cannot go to fewer experts: {top}"
        )
    return top


def _find(model: Any) -> TopK | str:
    mixtures = gated_mixtures(model)
    if isinstance(mixtures, str):
        return mixtures
    counts = top_k_of(model, by_block(mixtures))
    if len(counts) != 1:
        return f"its blocks send a token to different numbers of experts ({', '.join(map(str, sorted(counts)))})"
    count = counts.pop()
    others = range(count - 1, 0, -1) if count > 1 else (2,)
    for number, part in enumerate(text_parts(model.config.to_dict())):
        for key, value in part.items():
            top = TopK(count, (number, key), tuple(mixtures))
            if _NAMED.search(key) and _is_count(value, count) and any(has_count(model, top, n) for n in others):
                return top
    return "no field of its config changes how many experts a token goes to"


def has_count(model: Any, top: TopK, count: int) -> bool:
    """True where a model of the config with another count sends each token to so many experts in every block."""
    config = _config_of(model, top, count)
    if config is None:
        return False
    try:
        return top_k_of(rebuilt(model, config, tensors_of(model)), by_block(top.mixtures)) == {count}
    except torch.OutOfMemoryError:
        raise
    except Exception:  # of any modelling code of transformers
        return False


def set_top_k(model: Any, top: TopK, count: int) -> None:
    """Turns a model, the object stays, into one that sends each token to so many experts; no weight changes."""
    rebuild(model, _config_of(model, top, count), tensors_of(model))
    model.__dict__[_KEPT] = TopK(count, top.field, top.mixtures)


def _config_of(model: Any, top: TopK, count: int) -> Any | None:
    number, key = top.field

    def change(data: dict[str, Any]) -> None:
        part = text_parts(data)[number]
        part[key] = [count] * len(part[key]) if isinstance(part[key], list) else count

    return edited(model.config, change)


def _is_count(value: Any, count: int) -> bool:
    """True for a number, or a list with that of each block."""
    values = value if isinstance(value, list) and value else [value]
    return all(isinstance(one, int) and not isinstance(one, bool) and one == count for one in values)
