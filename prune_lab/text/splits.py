"""Which document belongs to which split: train, calibration, validation or test.

The split of a document depends on the document alone, so it never moves when others come or go, and the four
never overlap. Twenty buckets: 0 is test, 1 is validation, the rest is training; of the training part, bucket 2
is set aside for calibration, so that no statistic is taken from text that a recovery then trains on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from prune_lab.errors import Refused

BUCKETS = 20
SPLITS = ("train", "calibration", "validation", "test")
_BUCKET_SPLIT = {0: "test", 1: "validation", 2: "calibration"}


@dataclass(frozen=True)
class Documents:
    """A corpus in its splits, each a tuple of documents' texts.

    `facts` says where the text came from, for the protocol stamp and the tracker.
    """

    name: str
    train: tuple[str, ...]
    calibration: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]
    facts: dict[str, str] = field(default_factory=dict)

    def split(self, name: str) -> tuple[str, ...]:
        """The documents of one split."""
        if name not in SPLITS:
            raise ValueError(f"split={name!r} is none of {', '.join(SPLITS)}")
        documents: tuple[str, ...] = getattr(self, name)
        return documents

    def fingerprint(self) -> str:
        """sha256 over all splits' texts."""
        digest = hashlib.sha256()
        for name in SPLITS:
            for text in self.split(name):
                digest.update(f"{name}:{len(text)}:".encode())
                digest.update(text.encode())
        return digest.hexdigest()


def bucket(key: str) -> int:
    """The bucket of a document in [0, 20), from the sha256 of `key`."""
    return int(hashlib.sha256(key.encode()).hexdigest(), 16) % BUCKETS


def by_hash(texts: Iterable[str], key: Callable[[str], str] = str) -> dict[str, list[str]]:
    """Documents sorted into splits by the bucket of key(document)."""
    splits: dict[str, list[str]] = {name: [] for name in SPLITS}
    for text in texts:
        splits[_BUCKET_SPLIT.get(bucket(key(text)), "train")].append(text)
    return splits


def by_position(text: str) -> dict[str, list[str]]:
    """One document cut into 17 parts training, 1 calibration, 1 validation, 1 test, in this order.

    Cuts fall on line ends where there are any, else between characters.
    """
    cuts = [_line_end_near(text, len(text) * part // BUCKETS) for part in (0, 17, 18, 19, 20)]
    return {name: [text[start:end]] for name, start, end in zip(SPLITS, cuts, cuts[1:], strict=False)}


def of_documents(name: str, texts: list[str], facts: dict[str, str]) -> Documents:
    """A corpus split by the hash of each document, or by position where there is one document."""
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise Refused(f"{name}: there is no text in it")
    splits = by_position(texts[0]) if len(texts) == 1 else by_hash(texts)
    return Documents(name, **{split: tuple(found) for split, found in splits.items()}, facts=facts)


def _line_end_near(text: str, position: int) -> int:
    end = text.find("\n", position)
    near = 0 <= end - position < len(text) // (2 * BUCKETS)
    return end + 1 if 0 < position < len(text) and near else position
