"""Greedy continuations of fixed prompts by a model: what it writes, which perplexity does not show.

One prompt at a time, so that no padding and no other prompt changes the last bits, with a key-value cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from prune_lab.errors import Refused
from prune_lab.fingerprint import digest_of
from prune_lab.measure.beginnings import BEGINNINGS
from prune_lab.measure.continuations import Continuation, common_prefix
from prune_lab.measure.inference import prefill, step
from prune_lab.measure.settings import Measure
from prune_lab.models.load import Loaded
from prune_lab.results.samples import Sample, printable
from prune_lab.system.console import Console
from prune_lab.system.device import Device
from prune_lab.text.bos import Bos
from prune_lab.text.chat import Chat
from prune_lab.text.encode import encode


@dataclass(frozen=True)
class Prompts:
    """Prompts as a model gets them.

    texts: as they were written, perhaps without their last words. ids: their tokens, with BOS or chat template. tokens:
    how many are put after each at most. ends: tokens that end a text. chat: rendered by the chat template.
    """

    texts: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]
    tokens: int
    ends: tuple[int, ...]
    chat: bool

    @property
    def stamp(self) -> dict[str, Any]:
        """All that continuations depend on beside the model, for the protocol."""
        return {
            "prompts": len(self.ids),
            "tokens": self.tokens,
            "chat_template": self.chat,
            "ends": list(self.ends),
            "prompts_sha256": digest_of(self.ids),
        }

    @property
    def said(self) -> str:
        """A sentence about them."""
        how = "rendered by the tokenizer's chat template" if self.chat else "as plain text"
        return f"The likeliest tokens, {self.tokens} at most, after each of {len(self.ids)} prompts {how}."


def prepare_prompts(settings: Measure, loaded: Loaded, bos: Bos, context: int | None) -> Prompts | None:
    """The first `generation_prompts` prompts for a model; None where none are asked for.

    Through the tokenizer's chat template where it has one, else as plain text with the BOS token of `bos`. In a short
    context fewer tokens are generated, half of it at most, and a prompt loses its last words. Raises Refused where a
    prompt cannot be made.
    """
    if not settings.generation_prompts:
        return None
    tokens, room = settings.generation_tokens, None
    if context is not None:
        tokens = max(1, min(tokens, context // 2))
        room = context - tokens
    is_chat = bool(getattr(loaded.tokenizer, "chat_template", None))
    key = f"measure.generation_prompts={settings.generation_prompts}"
    made = [_fitting(text, loaded.tokenizer, is_chat, bos, room, key) for text in _first(settings)]
    texts, ids = zip(*made, strict=True)
    largest, size = max(map(max, ids)), loaded.model.config.get_text_config().vocab_size
    if largest >= size:
        raise Refused(
            f"{key}: the tokenizer gives a prompt the id {largest} and the model's vocabulary has {size} entries: give "
            "the folder or Hub id whose tokenizer it is, or measure.generation_prompts=0"
        )
    return Prompts(texts, ids, tokens, _ends(loaded), is_chat)


def _first(settings: Measure) -> Sequence[str]:
    return BEGINNINGS[: settings.generation_prompts]


def _fitting(
    text: str, tokenizer: Any, is_chat: bool, bos: Bos, room: int | None, key: str
) -> tuple[str, tuple[int, ...]]:
    """The beginning of a text, in whole words, that fits into `room` tokens (None: all of it), and its tokens."""
    words = text.split(" ")
    for count in range(len(words), 0, -1):
        shorter = " ".join(words[:count])
        ids = _ids(shorter, tokenizer, is_chat, bos, key)
        if room is None or len(ids) <= room:
            break
    else:
        raise Refused(
            f"{key}: a prompt of one word has {len(ids)} tokens, and the model's context has room for {room} before "
            "the generated ones: give measure.generation_prompts=0"
        )
    if not ids:
        raise Refused(f"{key}: the tokenizer gives a prompt no token: give measure.generation_prompts=0")
    return shorter, tuple(ids)


def _ids(text: str, tokenizer: Any, is_chat: bool, bos: Bos, key: str) -> list[int]:
    if is_chat:
        try:
            text = Chat([{"role": "user", "content": text}], f"{key}: a prompt").rendered(tokenizer, answered=True)
        except Refused as error:
            raise Refused(f"{error}; give measure.generation_prompts=0, or a template that does") from error
    (ids,) = encode(tokenizer, [text], special=False)
    begins_itself = ids[:1] == [bos.id]  # as a chat template may
    return ids if bos.id is None or begins_itself else [bos.id, *ids]


def _ends(loaded: Loaded) -> tuple[int, ...]:
    """Tokens that end a text: of the generation config, as for transformers, else of the config or the tokenizer."""
    for owner in (getattr(loaded.model, "generation_config", None), loaded.model.config, loaded.tokenizer):
        found = getattr(owner, "eos_token_id", None)
        if found is not None and found != []:
            return tuple(found) if isinstance(found, list | tuple) else (int(found),)
    return ()


def continue_prompts(model: Any, prompts: Prompts | None, device: Device, console: Console) -> tuple[Continuation, ...]:
    """A model's continuation of each prompt; none without prompts."""
    if prompts is None:
        return ()
    found = []
    with console.progress(len(prompts.ids), "continuing prompts", unit="prompt") as bar:
        for ids in prompts.ids:
            prompt = torch.tensor([ids], device=device.torch_device)
            found.append(continuation(model, prompt, prompts.tokens, prompts.ends))
            bar.update()
    return tuple(found)


def continuation(model: Any, prompt: Tensor, tokens: int, ends: Sequence[int]) -> Continuation:
    """Greedy continuation of a prompt, shape (1, length), by `tokens` tokens, at least 1, or up to one of `ends`.

    Of equally likely tokens the first counts, as in transformers.
    """
    output, ids = prefill(model, prompt), list[int]()
    while True:
        logits = output.logits[:, -1].float()
        if bool(logits.isnan().any()):
            return Continuation(tuple(ids), "nan")
        last = logits.argmax(-1, keepdim=True)
        ids.append(int(last))
        if ids[-1] in ends:
            return Continuation(tuple(ids), "eos")
        if len(ids) == tokens:
            return Continuation(tuple(ids), "length")
        output = step(model, output, last)


def samples_of(
    prompts: Prompts | None, tokenizer: Any, dense: Sequence[Continuation], compressed: Sequence[Continuation]
) -> list[Sample]:
    """Prompts and continuations as text; none without prompts."""
    if prompts is None:
        return []
    found = []
    for text, was, now in zip(prompts.texts, dense, compressed, strict=True):
        shared = f", the first {common_prefix(was.ids, now.ids)} as the dense model's"
        before, after = (printable(text_of(tokenizer, one.text_ids)) for one in (was, now))
        found.append(Sample(printable(text), before, after, _length(was), _length(now) + shared))
    return found


def text_of(tokenizer: Any, ids: Sequence[int]) -> str:
    """Text of token ids, special tokens too; those that the tokenizer lacks, as a padded vocabulary has, by number."""
    parts = []
    for is_known, run in groupby(ids, lambda token: _is_known(tokenizer, token)):
        tokens = list(run)
        options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        parts.append(tokenizer.decode(tokens, **options) if is_known else "".join(f"<id {token}>" for token in tokens))
    return "".join(parts)


def _is_known(tokenizer: Any, token: int) -> bool:
    try:
        return tokenizer.convert_ids_to_tokens(token) is not None
    except (IndexError, KeyError, ValueError, OverflowError):  # of tokenizers that are written in Python
        return False


def _length(found: Continuation) -> str:
    said = {"eos": "then it ended", "length": "", "nan": "then NaN"}[found.end]
    tokens = f"{len(found.text_ids)} token{'s' * (len(found.text_ids) != 1)}"
    return f"{tokens}, {said}" if said else tokens
