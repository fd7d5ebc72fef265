"""Splits of documents: train, calibration, validation and test.

The split of a document depends on the document alone, so it never moves when others come or go, and the four
never overlap. Twenty buckets: 0 is test, 1 is validation, the rest is training; of the training part, bucket 2
is set aside for calibration, so that no statistic is taken from text that a recovery then trains on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

BUCKETS = 20
SPLITS = ("train", "calibration", "validation", "test")
_BUCKET_SPLIT = {0: "test", 1: "validation", 2: "calibration"}
# Of one document: 17 parts for training, then one each, in this order.
POSITIONS = {"train": (0, 17), "calibration": (17, 18), "validation": (18, 19), "test": (19, 20)}


def split_of(key: str) -> str:
    """The split of a document, from the sha256 of `key`, which is its text or its path."""
    bucket = int(hashlib.sha256(key.encode()).hexdigest(), 16) % BUCKETS
    return _BUCKET_SPLIT.get(bucket, "train")


def by_hash(texts: Iterable[str]) -> dict[str, list[str]]:
    """Documents sorted into splits by the hash of each."""
    splits: dict[str, list[str]] = {name: [] for name in SPLITS}
    for text in texts:
        splits[split_of(text)].append(text)
    return splits


def by_position(text: str) -> dict[str, list[str]]:
    """One document cut into its splits by position, at line ends where there are any, else between characters."""

    def cut(part: int) -> int:
        position = len(text) * part // BUCKETS
        end = text.find("\n", position)
        near = 0 <= end - position < len(text) // (2 * BUCKETS)
        return end + 1 if 0 < position < len(text) and near else position

    return {name: [text[cut(first) : cut(last)]] for name, (first, last) in POSITIONS.items()}
