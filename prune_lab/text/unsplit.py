"""Unsplit corpus: another corpus used whole as calibration text, less the documents that the run has elsewhere."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from prune_lab.errors import Refused
from prune_lab.text.corpus import BLANK, Corpus
from prune_lab.text.splits import SPLITS


@dataclass(frozen=True)
class UnsplitCorpus(Corpus):
    """All text of another corpus as calibration text, less the documents of `left_out` and those that come again.

    documents, other, in_other_parts, again: how many the other corpus has, how many of them are left out because the
    run's own text has them, how many because another part of a mix has them, and how many because they come again.
    """

    name: str
    base: Corpus
    provenance: dict[str, str] = field(default_factory=dict)
    left_out: frozenset[int] = frozenset()
    documents: int = 0
    other: int = 0
    in_other_parts: int = 0
    again: int = 0

    @property
    def n_documents(self) -> int:
        """Number of documents of the other corpus."""
        return self.documents or super().n_documents

    def for_tokenizer(self, tokenizer: Any) -> UnsplitCorpus:
        """Copy whose conversations are rendered by this tokenizer."""
        return replace(self, base=self.base.for_tokenizer(tokenizer))

    @property
    def counts(self) -> dict[str, int]:
        """Counts of documents, and of those that are not used, by reason."""
        found = {"documents": self.documents, "also_in_the_run": self.other, "in_other_parts": self.in_other_parts}
        return found | {"repeated": self.again, "rows_without_text": self.survey.rows[BLANK]}

    @cached_property
    def digests(self) -> Counter[int]:
        """Number of times that each document of the other corpus is there, by its content."""
        if self.base.is_cut:
            return Counter([content_digest(self.base.as_one())])
        return Counter(content_digest([text]) for name, text in self.base.rows() if name is not BLANK)

    def is_one_document(self, name: str) -> bool:
        """True where the other corpus is one document."""
        return self.base.is_cut and name == "calibration"

    def split(self, name: str) -> Iterator[str]:
        """Documents that are left, all as calibration text."""
        return (text for split, text in self.rows() if split == name)

    def everything(self) -> Iterator[tuple[str, str]]:
        """Documents that are left, in one pass."""
        return ((name, text) for name, text in self.rows() if name in SPLITS)

    def rows(self) -> Iterator[tuple[str | None, str]]:
        """Every row of the other corpus."""
        if self.base.is_cut:
            yield from (("calibration", text) for text in self.base.as_one())
            return
        seen = set(self.left_out)
        for split, text in self.base.rows():
            if split is BLANK:
                yield BLANK, ""
            elif (digest := content_digest([text])) not in seen:
                seen.add(digest)
                yield "calibration", text

    def apart_from(self, run: Corpus, taken: Set[int] = frozenset()) -> UnsplitCorpus:
        """Less what is in the training, validation or test text of a run, and documents of these digests.

        taken: of the documents of other parts of a mix. Raises Refused where nothing is left.
        """
        mine = self.digests
        theirs = {digest for digest in _digests_of(run) if digest in mine}
        before = (mine.keys() & taken) - theirs
        if not mine.keys() - theirs:
            raise Refused(
                f"{self.name}: all its text is in the run's training, validation or test text as well, and what is "
                "trained or tested on is not calibrated on: give other text, or dataset.calibration.source=own"
            )
        if not mine.keys() - theirs - before:
            raise Refused(
                f"{self.name}: all its text is in another part of the mix as well, and the same text is not drawn "
                "from twice: give other text, or one part with both shares"
            )
        return replace(
            self,
            left_out=frozenset(theirs | before),
            documents=mine.total(),
            other=sum(mine[digest] for digest in theirs),
            in_other_parts=sum(mine[digest] for digest in before),
            again=sum(mine[digest] - 1 for digest in mine.keys() - theirs - before),
        )


def content_digest(pieces: Iterable[str]) -> int:
    """Hash of a text without its white space: 8 bytes of the sha256."""
    digest = hashlib.sha256()
    for text in pieces:
        digest.update("".join(text.split()).encode())
    return _short(digest)


def _short(digest: Any) -> int:
    return int.from_bytes(digest.digest()[:8], "big")


def _digests_of(run: Corpus) -> Iterator[int]:
    """Digests of what a run trains, validates and tests on: of its documents and of each split as one text; and of the
    one document whose parts the splits are, where that is so."""
    splits = {name: hashlib.sha256() for name in ("train", "validation", "test")}
    for name, text in run.everything():
        if name in splits:
            bare = "".join(text.split()).encode()
            splits[name].update(bare)
            yield _short(hashlib.sha256(bare))
    yield from map(_short, splits.values())
    if run.is_cut:
        yield content_digest(run.as_one())
