"""dataset.add_bos: the tokenizer's BOS token before each window, for models that predict nothing sensible without it.

Gemma 2B on WikiText-2 has a perplexity of 650 without and 21 with it (https://github.com/Nota-NetsPresso/shortened-llm,
pull request 6). Llama and GPT-2 are measured without it, as in the papers: their windows begin wherever text is cut.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prune_lab.errors import Refused
from prune_lab.text.encode import encode

_WITHOUT = (
    "dataset.add_bos=false: models of the family {family} need a BOS token before their text, and these figures are "
    "taken without it"
)
_NO_TOKEN = (
    "no BOS token before the windows: models of the family {family} need one, and the tokenizer has none; the figures "
    "are those of a model outside of what it was trained for"
)
_NOT_KNOWN = (
    "no BOS token before the windows, though the tokenizer puts one before a text: whether models of the family "
    "{family} need it is not known here; compare with dataset.add_bos=true"
)


@dataclass(frozen=True)
class Bos:
    """The token that stands before every window: its id, or None for no such token; and what must be said of it."""

    id: int | None = None
    warnings: tuple[str, ...] = ()

    @property
    def length(self) -> int:
        """How many tokens stand before the text of a window: 1 or 0."""
        return int(self.id is not None)

    @property
    def stamp(self) -> int | str:
        """The id, or "none"."""
        return "none" if self.id is None else self.id

    def before(self, windows: Tensor) -> Tensor:
        """Windows, shape (windows, tokens), with the token before each: (windows, length + tokens)."""
        if self.id is None:
            return windows
        return torch.cat([windows.new_full((len(windows), 1), self.id), windows], dim=1)


NO_BOS = Bos()


def begin_with_bos(tokenizer: Any) -> None:
    """Has a tokenizer put its BOS token before each text, where it does not do so by itself."""
    if encode(tokenizer, ["a"], special=True)[0][:1] == [tokenizer.bos_token_id]:
        return
    from tokenizers.processors import Sequence, TemplateProcessing

    token = tokenizer.bos_token
    adding = TemplateProcessing(f"{token} $A", f"{token} $A $B", [(token, tokenizer.bos_token_id)])
    backend = tokenizer.backend_tokenizer
    backend.post_processor = Sequence([*filter(None, [backend.post_processor]), adding])


def resolve_bos(add_bos: str, family: str, needed: bool | None, tokenizer: Any) -> Bos:
    """BOS token for a model of `family` under `add_bos`, one of text/source.py's ADD_BOS.

    needed: whether the family needs a BOS token; None: nobody knows. Raises Refused for "true" where the tokenizer has
    no such token.
    """
    token = tokenizer.bos_token_id
    if add_bos == "false":
        return Bos(warnings=(_WITHOUT.format(family=family),) if needed else ())
    if add_bos == "true":
        if token is None:
            raise Refused(
                "dataset.add_bos=true: the tokenizer of the model has no BOS token (bos_token in "
                "tokenizer_config.json); give dataset.add_bos=false"
            )
        return Bos(token)
    if needed and token is None:
        return Bos(warnings=(_NO_TOKEN.format(family=family),))
    if needed:
        return Bos(token)
    if needed is None and token is not None and encode(tokenizer, ["a"], special=True)[0][:1] == [token]:
        return Bos(warnings=(_NOT_KNOWN.format(family=family),))
    return Bos()
