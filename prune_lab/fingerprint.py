"""What makes two runs the same: configuration, device, weights, tokenizer, text, code and protocol."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

# Keys that change where a result goes, not what it is.
_NOT_PART = ("tracking", "name", "resume", "quiet", "objectives", "device", "dtype")
# Where text, weights and tasks lie is not what they are: their hashes stand for them.
_PLACES = {
    "model": ("name", "revision"),
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
    text = json.dumps(whole, sort_keys=True, allow_nan=False)
    return text_sha256(text)


def _without(values: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in names}


def text_sha256(text: str) -> str:
    """sha256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def source_sha256() -> str:
    """sha256 over the package's Python files, so that a result of older code is not served for newer code."""
    digest, package = hashlib.sha256(), Path(__file__).parent
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
