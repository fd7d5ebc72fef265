"""Tensors of a folder as transformers reports them while it reads: what of that says that a model is another.

Of types that families.py does not describe, transformers alone knows which tensor of the files is which of the model:
it may rename them and put experts together. Tensors of the files that it has no place for are a note in the run, where
they stand beside the model, and refused, where the model computes something else without them.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Any

from prune_lab.errors import Refused
from prune_lab.models.checkpoint import OWN_HEAD
from prune_lab.models.rebuild import skeleton
from prune_lab.models.shards import Shards

_SHOWN = 3  # names in a message
_BLOCK = re.compile(r"(.+?)\.(\d+)\.(.+)")
_PARAMETERS = ("weight", "bias")  # other leaves, such as scales of caches, change nothing that is computed in floats


def notes_of(model: Any, report: Mapping[str, Any], stored: Shards, name: str) -> list[str]:
    """Notes on tensors that are not used; raises Refused where the files, called `name`, are not the model's."""
    unused, missing = sorted(report["unexpected_keys"]), sorted(report["missing_keys"])
    wrong = sorted(key if isinstance(key, str) else key[0] for key in report["mismatched_keys"])
    if wrong:
        raise _refused(name, _why_wrong(report["mismatched_keys"]))
    if missing:
        raise _refused(name, _why_missing(model, missing, unused))
    if further := _further_blocks(model, unused, stored):
        blocks = f"{len(further)} block{'s' * (len(further) > 1)}"
        raise _refused(
            name,
            f"holds {blocks} that config.json does not count ({listed(further)}): set its number of blocks (such as "
            "num_hidden_layers) to that of the files, or take their tensors out of the files",
        )
    zero = [key for key in unused if key.endswith(".bias") and key in stored.spans and stored.is_zero(key)]
    owners = {name for name, module in model.named_modules() if module._parameters}
    inside = [key for key in unused if key not in zero and _is_of(key, owners)]
    if inside:
        raise _refused(
            name,
            f"holds {len(inside)} tensor{'s' * (len(inside) > 1)} that the model of config.json has no place for "
            f"({listed(inside)}): the model computes something else without them; give the config.json of these "
            f"weights{' (such as attention_bias or mlp_bias)' if inside[0].endswith('.bias') else ''}",
        )
    return [f"{len(unused)} tensors of the checkpoint are not used: {', '.join(unused[:_SHOWN])}"] if unused else []


def untie_own_head(model: Any) -> list[str]:
    """Writes tie_word_embeddings=false into the config of a model whose files hold a head of its own; a note on it.

    Transformers keeps such a head as it reads, and leaves the config as it is: other programs, and its own older
    versions, would take the embedding in its place in what is exported.
    """
    parts = [part for part in (model.config, model.config.get_text_config()) if _says_tied(part)]
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if not parts or head is None or embedding is None or head.weight is embedding.weight:
        return []
    like = skeleton(model, model.config)
    like.tie_weights()
    if like.get_output_embeddings().weight is not like.get_input_embeddings().weight:
        return []  # of a class that ties nothing
    for part in parts:
        part.tie_word_embeddings = False
    name = next(name for name, parameter in model.named_parameters() if parameter is head.weight)
    return [OWN_HEAD.format(head=name)]


def _says_tied(config: Any) -> bool:
    return bool(getattr(config, "tie_word_embeddings", False))


def _refused(name: str, reason: str) -> Refused:
    return Refused(f"model.name={name!r} {reason}")


def listed(keys: Collection[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return ", ".join(list(keys)[:_SHOWN]) + more


def _is_of(key: str, owners: set[str]) -> bool:
    """True for a weight or bias of a module that the model has, with other parameters."""
    owner, _, leaf = key.rpartition(".")
    return leaf in _PARAMETERS and owner in owners


def _why_wrong(mismatched: Collection[Any]) -> str:
    found = sorted(mismatched, key=lambda one: one if isinstance(one, str) else one[0])
    said = [
        one if isinstance(one, str) else f"{one[0]} (stored {list(one[1])}, needed {list(one[2])})"
        for one in found[:_SHOWN]
    ]
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return (
        f"has weights in another shape than config.json says: {', '.join(said)}{more}; the weights do not belong to "
        "this config.json: give the one that was saved with them"
    )


def _why_missing(model: Any, missing: list[str], unused: list[str]) -> str:
    lacks = f"lacks the weights {listed(missing)}"
    gone, held = _by_block(missing), _by_block(set(model.state_dict()) - set(missing))
    lists = [path for path in gone if path in held and min(gone[path]) > max(held[path])]
    if lists:
        path = max(lists, key=lambda one: len(gone[one]))
        count = max(held[path]) + 1
        return (
            f"{lacks}: {path} has {count} blocks in its files, and {max(gone[path]) + 1} by config.json: one of them "
            "is not of this model, or a file is missing"
        )
    if unused:
        return f"{lacks}; it holds {listed(unused)}: it is not of the model of config.json"
    return f"{lacks}: the download is not complete; fetch it again"


def _by_block(keys: Collection[str]) -> dict[str, dict[int, set[str]]]:
    """Names within each numbered part, by the path of its list and its number."""
    found: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for key in keys:
        if (match := _BLOCK.fullmatch(key)) is not None:
            found[match[1]][int(match[2])].add(match[3])
    return found


def _further_blocks(model: Any, unused: list[str], stored: Shards) -> list[str]:
    """Paths of stored blocks that the model does not have and that have the tensors of one that it has.

    A block that also has parts of another kind predicts further tokens (MTP), or does something else again. Names are
    compared with the model's and with those of the files, where experts may be apart.
    """
    for used in (set(model.state_dict()), stored.spans.keys() - set(unused)):
        held = _by_block(used)
        further = [
            f"{path}.{number}"
            for path, blocks in _by_block(unused).items()
            for number, names in sorted(blocks.items())
            if path in held and number not in held[path] and names in held[path].values()
        ]
        if further:
            return further
    return []
