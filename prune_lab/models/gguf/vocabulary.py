"""Vocabulary of a GGUF file, made of a tokenizer of transformers as llama.cpp's converter makes it.

llama.cpp has two kinds of BPE. Byte-level ones ("gpt2") have merges, and a name in place of the pattern by which text
is cut into words; those with a token for each byte ("llama", of SentencePiece) have scores, and the pair whose whole
has the highest score is merged first. The pattern's name is that of the GGUF file which a model came from; else the one
that llama.cpp's converter has for the tokens of a text, looked up by their hash; else that of the pattern itself
(pre_tokenizers.json: text, hashes, patterns and names of llama.cpp's conversion/base.py and src/llama-vocab.cpp).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prune_lab.errors import Refused

if TYPE_CHECKING:
    from gguf import GGUFWriter

ORIGIN = "gguf_pre"  # key of tokenizer_config.json: the name that a model's own GGUF file has for its pattern
_KNOWN = Path(__file__).parent / "pre_tokenizers.json"
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_SPACE = "\u2581"
# What llama.cpp's converter takes for control tokens beside those that are marked as special.
_LIKE_CONTROL = re.compile(r"<pad>|<mask>|<2mass>|\[@BOS@\]|<\|.*\|>|<｜.*｜>|<unused.*>", re.DOTALL)
_SPECIAL = ("bos", "eos", "unk", "sep", "pad", "mask")
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE_TYPE = range(1, 7)  # gguf.TokenType


@dataclass(frozen=True)
class Vocabulary:
    """All that a file says of a tokenizer.

    kind: gpt2 or llama. pre: the pattern's name. types: numbers of gguf.TokenType. scores: of llama alone. ids: of
    special tokens, by kind. adds: whether BOS and EOS are put around a text. notes: what a run must say of it.
    """

    kind: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None
    merges: list[str]
    ids: dict[str, int]
    adds: dict[str, bool]
    space_prefix: bool | None
    template: Any
    notes: list[str]

    def add_to(self, writer: GGUFWriter) -> None:
        """Adds it to a file that is not written yet."""
        writer.add_tokenizer_model(self.kind)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
        if self.merges:
            writer.add_token_merges(self.merges)
        for kind, number in self.ids.items():
            getattr(writer, f"add_{kind}_token_id")(number)
        for kind, value in self.adds.items():
            getattr(writer, f"add_add_{kind}_token")(value)
        if self.space_prefix is not None:
            writer.add_add_space_prefix(self.space_prefix)
        if self.template:
            writer.add_chat_template(self.template)


def vocabulary_of(tokenizer: Any, config: Any) -> Vocabulary:
    """Vocabulary of a tokenizer for a model of a config; raises Refused for one that llama.cpp does not have."""
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise Refused(
            "export=gguf writes tokenizers that have a tokenizer.json, and the model's is a "
            f"{type(tokenizer).__name__}; give export=hf"
        )
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    model = described["model"]
    is_byte_level = "ByteLevel" in {step.get("type") for step in _steps(described.get("pre_tokenizer"))}
    if model["type"] != "BPE" or not (is_byte_level or model.get("byte_fallback")):
        raise Refused(
            "export=gguf writes BPE tokenizers, byte-level ones or those with a token for each byte, and the model's "
            f"is {model['type']}{' of neither kind' * (model['type'] == 'BPE')}; give export=hf"
        )
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    pre, notes = _pre(tokenizer, described) if is_byte_level else ("default", list[str]())
    tokens, types = _tokens(tokenizer, described, config.vocab_size, is_byte_level)
    if not is_byte_level and (pairs := _merged_otherwise(tokenizer, types, merges)):
        notes = [
            f"export=gguf: llama.cpp, which has scores in place of merges, joins {pairs:,} pairs of tokens that the "
            "model's tokenizer leaves apart: some texts are cut otherwise there"
        ]
    return Vocabulary(
        kind="gpt2" if is_byte_level else "llama",
        pre=pre,
        tokens=tokens,
        types=types,
        scores=None if is_byte_level else _scores(tokenizer, types, merges),
        merges=[" ".join(part.replace(" ", "Ġ") for part in pair) for pair in merges] if is_byte_level else [],
        ids=_ids(tokenizer, config),
        adds=_adds(tokenizer),
        space_prefix=None if is_byte_level else _puts_space(described),
        template=_template(tokenizer),
        notes=notes,
    )


def _steps(step: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The pre-tokenizers, or normalizers, of a tokenizer.json, one after the other."""
    if step is None:
        return []
    if step["type"] == "Sequence":
        return [inner for part in step.get("pretokenizers", step.get("normalizers", [])) for inner in _steps(part)]
    return [step]


def _pre(tokenizer: Any, described: dict[str, Any]) -> tuple[str, list[str]]:
    """Name that llama.cpp has for the way in which a byte-level tokenizer cuts text into words, and notes on it."""
    known = json.loads(_KNOWN.read_text(encoding="utf-8"))
    if (own := tokenizer.init_kwargs.get(ORIGIN)) is not None:
        if own not in known["names"]:
            raise Refused(
                f"export=gguf: the GGUF file that the model came from cuts text by tokenizer.ggml.pre={own!r}, which "
                "llama.cpp does not have; give export=hf"
            )
        return str(own), [f"export=gguf: tokenizer.ggml.pre={own}, as in the GGUF file that the model came from"]
    tokens = tokenizer.encode(known["hashed_text"])
    if (name := known["hashes"].get(sha256(str(tokens).encode()).hexdigest())) is not None:
        return str(name), []
    cut = {"splits": _splits(described), "ignore_merges": bool(described["model"].get("ignore_merges"))}
    by_pattern = next((found["name"] for found in known["patterns"] if found == cut | {"name": found["name"]}), None)
    if by_pattern is None:
        raise Refused(
            "export=gguf: the model's tokenizer cuts text into words in a way that llama.cpp has no name for "
            f"(pre_tokenizer of tokenizer.json: {cut['splits']}); give export=hf"
        )
    return str(by_pattern), [f"export=gguf: tokenizer.ggml.pre={by_pattern}, by the pattern in tokenizer.json"]


def _splits(described: dict[str, Any]) -> list[str]:
    """Regular expressions by which text is cut, one after the other; a step that is none stands for itself."""
    gpt2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    found = list[str]()
    for step in _steps(described.get("pre_tokenizer")):
        pattern = step.get("pattern", {}).get("Regex")
        if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
            found += [gpt2] if step["use_regex"] else []
        elif step["type"] == "Digits" and step["individual_digits"]:
            found.append(r"\p{N}")
        elif step["type"] == "Split" and pattern and (step["behavior"], step["invert"]) in _ISOLATING:
            found.append(pattern)
        else:
            found.append(json.dumps(step))
    return found


_ISOLATING = (("Isolated", False), ("Removed", True))  # the same for patterns that leave nothing between matches


def _tokens(tokenizer: Any, described: dict[str, Any], size: int, is_byte_level: bool) -> tuple[list[str], list[int]]:
    """Tokens by their numbers, and their types; raises Refused where there are more than rows in the embedding."""
    by_number = {number: token for token, number in tokenizer.get_vocab().items()}
    if max(by_number) >= size:
        raise Refused(
            f"export=gguf: the tokenizer has a token of number {max(by_number)}, and the model has embeddings of "
            f"{size} (vocab_size): a GGUF file has as many of both; give export=hf"
        )
    added = {entry["id"]: entry for entry in described["added_tokens"]}
    tokens, types = list[str](), list[int]()
    for number in range(size):
        token, kind = by_number.get(number), _NORMAL
        if token is None:
            token, kind = f"[PAD{number}]", _UNUSED
        elif number == tokenizer.unk_token_id and not is_byte_level:
            kind = _UNKNOWN
        elif (entry := added.get(number)) is not None:
            if is_byte_level and not entry["normalized"]:
                token = tokenizer.decode(tokenizer.encode(token, add_special_tokens=False))
            kind = _CONTROL if entry["special"] or _LIKE_CONTROL.fullmatch(token) else _USER_DEFINED
            token = token.replace(_SPACE, " ") if kind == _USER_DEFINED else token  # it is looked for in plain text
        elif not is_byte_level and _BYTE.fullmatch(token):
            kind = _BYTE_TYPE
        tokens.append(token)
        types.append(kind)
    return tokens, types


def _scores(tokenizer: Any, types: list[int], merges: list[tuple[str, ...]]) -> list[float]:
    """A score for each token: what is merged first has the highest, as in SentencePiece's own files.

    There the scores of BPE are 0, -1, -2 ... in the order of training, of single characters last.
    """
    numbers = tokenizer.get_vocab()
    rank: dict[int, int] = {}
    for place, pair in enumerate(merges):
        rank.setdefault(numbers["".join(pair)], place)
    normal = [number for number, kind in enumerate(types) if kind == _NORMAL]
    normal.sort(key=lambda number: (rank.get(number, len(merges)), number))
    scores = [0.0 if kind in (_BYTE_TYPE, _UNKNOWN, _CONTROL) else -1000.0 for kind in types]
    for place, number in enumerate(normal):
        scores[number] = -float(place)
    return scores


def _merged_otherwise(tokenizer: Any, types: list[int], merges: list[tuple[str, ...]]) -> int:
    """Number of pairs of tokens that make a token, and no merge of the tokenizer does."""
    numbers, merged = tokenizer.get_vocab(), {*merges}
    joined = [token for token, number in numbers.items() if types[number] == _NORMAL]
    halves = ((token[:cut], token[cut:]) for token in joined for cut in range(1, len(token)))
    return sum(a in numbers and b in numbers and (a, b) not in merged for a, b in halves)


def _puts_space(described: dict[str, Any]) -> bool:
    """True where a space is put before a text."""
    steps = [*_steps(described.get("normalizer")), *_steps(described.get("pre_tokenizer"))]
    return any(
        step["type"] == "Prepend" or (step["type"] == "Metaspace" and step.get("prepend_scheme") != "never")
        for step in steps
    )


def _ids(tokenizer: Any, config: Any) -> dict[str, int]:
    """Numbers of special tokens: the tokenizer's, or the config's where it has none."""
    found = {}
    for kind in _SPECIAL:
        number = getattr(tokenizer, f"{kind}_token_id", None)
        number = getattr(config, f"{kind}_token_id", None) if number is None else number
        if isinstance(number, int) and 0 <= number < config.vocab_size:
            found[kind] = number
    return found


def _adds(tokenizer: Any) -> dict[str, bool]:
    """BOS before a text, EOS behind it: whether the tokenizer puts them; always said, since defaults differ."""
    plain, around = tokenizer("a", add_special_tokens=False).input_ids, tokenizer("a").input_ids
    return {
        "bos": len(around) > len(plain) and around[0] == tokenizer.bos_token_id,
        "eos": len(around) > len(plain) and around[-1] == tokenizer.eos_token_id,
    }


def _template(tokenizer: Any) -> Any:
    """Chat template, or several by name as GGUF has them."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        return [{"name": name, "template": text} for name, text in template.items()]
    return template
