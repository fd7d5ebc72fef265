"""Identity: what each kind of kept result depends on, so that none is served for something else.

| kept result | lies in | its key | depends on |
|---|---|---|---|
| finished run, its export, its training checkpoints | tracker, cache | `fingerprint` | C P M T X S E L |
| measurements of the dense model | the sweep's folder | `baseline_key` | P M T X E S L |
| results about a dense model (statistics, gradients, losses, quality, texts) | cache | `DenseCache.key` | W M T H S L |
| tokens of a text | cache | `tokens_key` | X T S L |

C: configuration, every key but those that say where results go (NO_FIGURE) and where parts lie (_PLACES); of the
   export its identity (export/base.py), which is the same for none and hf.
P: protocol, what `Evaluator.protocol` stamps: token ids and sizes of windows, BOS, calibration, dtype, device, tasks,
   token ids of the prompts that are continued.
M: model, sha256 of all its tensors and of config.json as it is used (models/contents.py): rope, eps, activation ...
T: tokenizer, sha256 of all by which it turns text into ids (text/encode.py).
X: text, sha256 of all documents. W: windows, sha256 of token ids, and the sizes in which they pass.
E: what an export has beside these: generation config, chat template, other settings of the tokenizer, licence.
S: source of this package: all of it, or of the folders that compute the result.
L: versions of the libraries that compute (LIBRARIES; lm-eval's stands in the protocol where a task is scored).
H: hardware: device, dtype, processor or GPU, threads, which change the last bits.

Hardware beside device and dtype is no part of a finished run, so that a sweep may be completed on another machine: what
is served from another one says so (results/outcome.py).
"""

from __future__ import annotations

import hashlib
import json
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parent
LIBRARIES = ("torch", "transformers", "tokenizers")  # those whose new versions have changed figures
# Keys that change where a result goes and what is done with it, not what it is.
NO_FIGURE = ("tracking", "name", "resume", "quiet", "objectives")
_NOT_PART = (*NO_FIGURE, "device", "dtype")  # these two as they were decided: in the protocol
_DECIDED = {"dataset": ("add_bos",)}
# Where text, weights and tasks lie is not what they are: their hashes stand for them. Streamed, a model is the same.
_PLACES = {
    "model": ("name", "revision", "stream"),
    "dataset": ("name", "revision", "path", "test_path"),
    "recovery": ("teacher",),
    "measure": ("task_path",),
}
_PROTOCOL_PLACES = ("dataset", "dataset_facts", "task_path")


def fingerprint(config: dict[str, Any], protocol: dict[str, Any], hashes: dict[str, str]) -> str:
    """sha256 of a run: over the resolved configuration, the protocol stamp, and the hashes of what it works on."""
    kept = {key: value for key, value in config.items() if key not in _NOT_PART}
    for left_out in (_PLACES, _DECIDED):
        for group, names in left_out.items():
            kept[group] = _without(kept.get(group, {}), names)
    stamp = _without(protocol, _PROTOCOL_PLACES)
    for part, name in ((kept["dataset"], "name"), (stamp, "source")):
        if isinstance(part.get("calibration"), dict):
            found = _without(part["calibration"], (name,))
            mix = [_without(one, (name,)) for one in found.get("mix") or ()]
            part["calibration"] = found | ({"mix": mix} if mix else {})
    return digest_of([_code(), {"config": kept, "protocol": stamp, "hashes": hashes}])


def baseline_key(protocol: dict[str, Any], hashes: dict[str, str]) -> str:
    """The name of the dense model's figures in a sweep's folder, which may be used again later."""
    return digest_of([_code(), protocol, hashes])[:16]


def tokens_key(text_sha256: str, tokenizer_sha256: str, split: str, joined: bool) -> str:
    """The name of a split's tokens; `joined`: as one text, not document by document."""
    return digest_of([text_sha256, tokenizer_sha256, split, joined, source_sha256("text"), libraries()])[:32]


def libraries() -> dict[str, str]:
    """Versions of the libraries that compute."""
    return {name: version(name) for name in LIBRARIES}


def _code() -> list[Any]:
    return [source_sha256(), libraries()]


def _without(values: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in names}


def text_sha256(text: str) -> str:
    """sha256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def digest_of(value: Any) -> str:
    """sha256 of anything that JSON can hold, whatever the order of its keys; of other objects, as they are printed."""
    return text_sha256(json.dumps(value, sort_keys=True, default=str))


@cache
def source_sha256(*parts: str) -> str:
    """sha256 over the package's Python files, so that a result of older code is not served for newer code.

    parts: the folders and files of it that count; all by default.
    """
    digest = hashlib.sha256()
    wanted = [PACKAGE / part for part in parts or ("",)]
    for path in sorted({path for part in wanted for path in (part.rglob("*.py") if part.is_dir() else (part,))}):
        digest.update(path.relative_to(PACKAGE).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
