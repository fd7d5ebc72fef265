"""Checkpoints: the tensors of a folder compared with the model of its config.json, before any is read.

The model must take every tensor of the files, and the files must hold every tensor of the model. What is not so is one
of four things:

- left out without a word: buffers that are computed and not read (rotary frequencies, GPT-2's causal masks), and
  copies of a tensor that is tied;
- a note in the run: what stands beside the model, such as a classification head or blocks that predict further
  tokens, and biases that are zero;
- the head of a model whose config.json says that it is tied, when it differs from the embedding: it is the model's;
- refused: whatever says that the model of config.json is not that of the weights.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prune_lab.errors import Refused
from prune_lab.models.families import family_of
from prune_lab.models.foreign import common_prefix, explained
from prune_lab.models.formats import format_of
from prune_lab.models.low_bit import compressed_tensors
from prune_lab.models.shards import Shards, Span

OWN_HEAD = (
    "config.json says that the head is the embedding (tie_word_embeddings), but the files hold another, {head}: it is "
    "what was measured, and an export says tie_word_embeddings=false"
)
_SHOWN = 3  # names in a message
# Buffers that older versions of transformers wrote: computed, not read. Masks are no vectors, as biases are.
_FREQUENCIES = re.compile(r"(^|\.)(rotary_emb\.(inv_freq|cos_cached|sin_cached)|position_ids|decoder\.version)$")
_MASKS = re.compile(r"\.(attn|attention)\.(bias|masked_bias)$")


@dataclass
class Checkpoint:
    """Files and offsets of a model's tensors, by the model's names, and notes on tensors that are not used."""

    places: dict[str, Span]
    warnings: list[str] = field(default_factory=list)


def read_checkpoint(folder: Path, config: Any, name: str) -> Checkpoint:
    """Compares the files of `folder`, which a person calls `name`, with the model of `config`.

    Writes tie_word_embeddings=false into `config` where the files hold a head of its own. Raises Refused where they are
    not the weights of this model, ValueError where a file is damaged.
    """
    stored = format_of(folder, config).open(folder)
    comparison = _Comparison(stored, config, name)
    if (head := comparison.own_head()) is None:
        return comparison.checkpoint()
    config.tie_word_embeddings = False
    checkpoint = _Comparison(stored, config, name).checkpoint()
    checkpoint.warnings.append(OWN_HEAD.format(head=head))
    return checkpoint


class _Comparison:
    """The tensors of a model without values, and those that are stored."""

    def __init__(self, stored: Shards, config: Any, name: str) -> None:
        self.stored, self.config, self.name = stored, config, name
        self.model = skeleton(config)
        self.prefix = f"{self.model.base_model_prefix}."
        self.family = family_of(config.model_type)
        self.blocks = self.family.blocks
        named = self.model.state_dict(keep_vars=True)
        first: dict[int, str] = {}
        # By each tensor's first name all its names: several where it is tied.
        self.wanted: dict[str, list[str]] = {}
        for key, tensor in named.items():
            self.wanted.setdefault(first.setdefault(id(tensor), key), []).append(key)
        self.tensors: dict[str, Tensor] = dict(named)

    def checkpoint(self) -> Checkpoint:
        """File and offset of each tensor; raises Refused."""
        places = {key: place for key, names in self.wanted.items() if (place := self._place(names)) is not None}
        used = {stored for key in self.tensors if (stored := self._stored_name(key)) is not None}
        unused = [key for key in self.stored.spans if key not in used and not self._is_buffer(key)]
        self._check_blocks(unused)
        is_quantized = getattr(self.config, "quantization_config", None) is not None
        if not is_quantized and (foreign := explained(unused)) is not None:
            raise self._refused(foreign)
        if missing := [key for key in self.wanted if key not in places]:
            raise self._refused(self._why_missing(missing, unused))
        for key, place in places.items():
            self._check_fit(key, place)
        return Checkpoint(places, self._of_unused(unused))

    def own_head(self) -> str | None:
        """The name of a head that is tied by the config and stored with other numbers than the embedding."""
        for names in self.wanted.values():
            found = [stored for key in names if (stored := self._stored_name(key)) is not None]
            if len(found) > 1 and not all(self.stored.equal(found[0], other) for other in found[1:]):
                return found[-1]
        return None

    def _stored_name(self, key: str) -> str | None:
        """The name in the files of the model's `key`: checkpoints may leave out the base model's prefix."""
        names = (key, key.removeprefix(self.prefix), self.family.stored_name(key))
        return next((name for name in names if name in self.stored.spans), None)

    def _place(self, names: list[str]) -> Span | None:
        found = (self._stored_name(key) for key in names)
        return next((self.stored.spans[stored] for stored in found if stored is not None), None)

    def _full_name(self, stored: str) -> str:
        """The name that the model would have for it: with the base model's prefix, where that is left out."""
        is_of_base = hasattr(self.model.base_model, stored.split(".")[0])
        return f"{self.prefix}{stored}" if is_of_base and not stored.startswith(self.prefix) else stored

    def _is_buffer(self, stored: str) -> bool:
        is_mask = _MASKS.search(stored) is not None and len(self.stored.spans[stored].shape) != 1
        return is_mask or _FREQUENCIES.search(stored) is not None

    def _refused(self, reason: str) -> Refused:
        return Refused(f"model.name={self.name!r} {reason}")

    def _why_missing(self, missing: list[str], unused: list[str]) -> str:
        lacks = f"lacks the weights {_listed(missing)}"
        if (prefix := common_prefix(self.stored.spans, self.wanted)) is not None:
            return (
                f"{lacks}: its tensors have names that begin with {prefix!r}, as a wrapped model or a part of another "
                "has them; save the model inside, or take that off the names"
            )
        head = getattr(self.model.get_output_embeddings(), "weight", None)
        if missing == [key for key, tensor in self.tensors.items() if tensor is head]:
            return (
                f"{lacks}, and config.json does not tie the head to the embedding: set tie_word_embeddings=true there "
                "if it is the same matrix, else fetch the head too" + _and_holds(unused)
            )
        gone = {number for key in missing if (number := self._block(key)) is not None}
        held = {number for key in self.stored.spans if (number := self._block(self._full_name(key))) is not None}
        if gone and not gone & held and held and min(gone) > max(held):
            return (
                f"{lacks}: it holds {max(held) + 1} blocks, and config.json says num_hidden_layers="
                f"{self.config.num_hidden_layers}: one of them is not of this model, or a file is missing"
            )
        if unused:
            return f"lacks the weights {_listed(missing, 1)}{_and_holds(unused)}: it is not of the model of config.json"
        return f"{lacks}: the download is not complete; fetch it again"

    def _check_fit(self, key: str, place: Span) -> None:
        wanted = self.tensors[key]
        kind = "a float tensor" if wanted.is_floating_point() else f"{wanted.dtype}"
        fits_type = place.dtype.is_floating_point if wanted.is_floating_point() else place.dtype == wanted.dtype
        if place.shape != tuple(wanted.shape) or not fits_type:
            is_transposed = place.shape == tuple(wanted.shape)[::-1] != tuple(wanted.shape)
            raise self._refused(
                f"cannot be loaded: {key} is stored as {place.dtype} of shape {list(place.shape)}"
                f"{' (transposed)' if is_transposed else ''}, and {kind} of shape {list(wanted.shape)} is needed: the "
                "weights do not belong to this config.json"
            )

    def _of_unused(self, unused: list[str]) -> list[str]:
        """Notes on tensors that stand beside the model; raises Refused for those that say that it is another one."""
        zero_biases = [key for key in unused if key.endswith(".bias") and self.stored.is_zero(key)]
        inside = [key for key in unused if key not in zero_biases and self._changes_the_model(key)]
        if inside:
            raise self._refused(
                f"holds {_count(inside)} that the model of config.json has no place for ({_listed(inside)}): the model "
                "computes something else without them; give the config.json of these weights"
                + (" (such as attention_bias or mlp_bias)" if inside[0].endswith("_proj.bias") else "")
            )
        beside = [key for key in unused if key not in zero_biases]
        notes = [(zero_biases, "biases that are all zero"), (beside, "the model has no place for them")]
        return [
            f"{len(keys)} of the {len(self.stored.spans)} tensors of the checkpoint are not used: {_grouped(keys)} "
            f"({reason})"
            for keys, reason in notes
            if keys
        ]

    def _changes_the_model(self, stored: str) -> bool:
        """True for a tensor of a block that the model has, or of another of its modules with weights."""
        key = self._full_name(stored)
        ignored = self.model._keys_to_ignore_on_load_unexpected or ()
        if any(re.search(pattern, key) for pattern in ignored):
            return False
        number = self._block(key)
        if number is not None:
            return number < self.config.num_hidden_layers
        owner = key.rpartition(".")[0]
        return any(name.rpartition(".")[0] == owner for name in self.tensors)

    def _check_blocks(self, unused: list[str]) -> None:
        """Raises Refused for stored blocks that the model does not have and that are just like those it has.

        A block that also has parts of another kind predicts further tokens (MTP), or does something else again.
        """
        parts: dict[int, set[str]] = {}
        for stored in unused:
            key = self._full_name(stored)
            if (number := self._block(key)) is not None:
                parts.setdefault(number, set()).add(key.removeprefix(f"{self.blocks}.{number}."))
        first = f"{self.blocks}.0."
        usual = {key.removeprefix(first) for key in self.tensors if key.startswith(first)}
        if further := sorted(number for number, of_block in parts.items() if of_block == usual):
            count = self.config.num_hidden_layers
            raise self._refused(
                f"holds {len(further)} more blocks ({_ranged(further)}) than config.json says (num_hidden_layers="
                f"{count}): set it to {count + len(further)} there, or take their tensors out of the files"
            )

    def _block(self, key: str) -> int | None:
        """The number of the block that a tensor is of."""
        found = re.match(rf"{re.escape(self.blocks)}\.(\d+)\.", key)
        return int(found[1]) if found else None


def skeleton(config: Any) -> Any:
    """The model of a config without values, on the meta device."""
    from transformers import AutoModelForCausalLM

    quantized = getattr(config, "quantization_config", None)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        if quantized is not None:
            compressed_tensors.replace_linears(model, quantized, torch.float32)
    model.tie_weights()
    return model


def _count(keys: Collection[str]) -> str:
    return f"{len(keys)} tensor{'s' * (len(keys) > 1)}"


def _listed(keys: list[str], shown: int = _SHOWN) -> str:
    more = f" and {len(keys) - shown} more" if len(keys) > shown else ""
    return ", ".join(keys[:shown]) + more


def _and_holds(unused: list[str]) -> str:
    return f"; it holds {_listed(unused, 1)}" if unused else ""


def _grouped(keys: list[str]) -> str:
    """Names in which the numbers of blocks are stars, each with how often it is there."""
    counts = Counter(re.sub(r"(?<=\.)\d+(?=\.)", "*", key) for key in keys)
    shown = [f"{key} ({count} times)" if count > 1 else key for key, count in counts.items()]
    return _listed(shown) + (" kinds" if len(shown) > _SHOWN else "")


def _ranged(numbers: list[int]) -> str:
    return f"{numbers[0]} to {numbers[-1]}" if len(numbers) > 1 else str(numbers[0])
