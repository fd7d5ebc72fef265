"""What makes two runs the same: configuration, device, weights, tokenizer, text, code and protocol."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parent
# Keys that change where a result goes and what is done with it, not what it is.
NO_FIGURE = ("tracking", "name", "resume", "quiet", "objectives", "export")
_NOT_PART = (*NO_FIGURE, "device", "dtype")  # these two as they were decided: in the protocol
# Where text, weights and tasks lie is not what they are: their hashes stand for them. Streamed, a model is the same.
_PLACES = {
    "model": ("name", "revision", "stream"),
    "dataset": ("name", "revision", "path", "test_path"),
    "recovery": ("teacher",),
    "measure": ("task_path",),
}
_PROTOCOL_PLACES = ("dataset", "dataset_facts", "task_path")


def fingerprint(config: dict[str, Any], protocol: dict[str, Any], hashes: dict[str, str]) -> str:
    """sha256 over the resolved configuration, the protocol stamp, and the hashes of weights, tokenizer and text."""
    kept = {key: value for key, value in config.items() if key not in _NOT_PART}
    for group, names in _PLACES.items():
        kept[group] = _without(kept.get(group, {}), names)
    stamp = _without(protocol, _PROTOCOL_PLACES)
    for part, name in ((kept["dataset"], "name"), (stamp, "source")):
        if isinstance(part.get("calibration"), dict):
            part["calibration"] = _without(part["calibration"], (name,))
    whole = {"config": kept, "source": source_sha256(), "protocol": stamp, "hashes": hashes}
    return digest_of(whole)


def _without(values: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in names}


def text_sha256(text: str) -> str:
    """sha256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def digest_of(value: Any) -> str:
    """sha256 of anything that JSON can hold, whatever the order of its keys."""
    return text_sha256(json.dumps(value, sort_keys=True))


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
