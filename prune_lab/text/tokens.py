"""Token windows of a corpus: what training, calibration and perplexity read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from prune_lab.errors import Refused
from prune_lab.fingerprint import tokens_key
from prune_lab.system.console import Console
from prune_lab.text.corpus import JOIN, Corpus
from prune_lab.text.encode import encode, tokenizer_sha256
from prune_lab.text.joined import tokenise_joined
from prune_lab.text.token_store import Run, Stored, stored_tokens

BATCH_BYTES = 2**21  # of documents that are tokenised at once


class Tokens:
    """A corpus as tokens of one tokenizer, split by split, tokenised when first asked for and then kept on disk.

    Raises Refused, when a split is asked for, where a token is beyond a model's vocabulary of `vocab_size`.
    """

    def __init__(
        self, corpus: Corpus, tokenizer: Any, console: Console | None = None, vocab_size: int | None = None
    ) -> None:
        self.corpus, self.vocab_size = corpus, vocab_size
        self.console = console or Console(quiet=True)
        self._tokenizer = tokenizer
        self._splits: dict[str, Stored] = {}

    def stream(self, split: str) -> Tensor:
        """All tokens of a split, shape (tokens,), int32, with the tokenizer's own special tokens.

        Documents are joined and tokenised as one text, as the published perplexities have it; those of the training
        and calibration splits, which no figure is taken from, document by document.
        """
        return self._stored(split).ids

    def windows(self, split: str, seq_len: int) -> Tensor:
        """Non-overlapping windows, shape (floor(tokens / seq_len), seq_len); the tail is dropped.

        Raises Refused where the split is shorter than one window.
        """
        stream = self.stream(split)
        count = len(stream) // seq_len
        if count == 0:
            raise Refused(
                f"dataset.seq_len={seq_len}: the {split} split of {self.corpus.name} has only {len(stream)} "
                "tokens: give more text or a smaller dataset.seq_len"
            )
        return stream[: count * seq_len].view(count, seq_len)

    def calibration_windows(self, n_samples: int, seq_len: int, seed: int) -> tuple[Tensor, list[list[int]]]:
        """Random windows, each inside one document longer than seq_len (the papers' way of sampling).

        Returns the windows, shape (n_samples, seq_len), and for each [document, first token]. Documents are drawn
        with replacement; two windows are never the same. Raises Refused where there are not enough.
        """
        stored = self._stored("calibration")
        starts = stored.starts
        if self.corpus.is_one_document("calibration"):
            starts = starts[[0, -1]]
        lengths = starts.diff()
        long_enough = (lengths > seq_len).nonzero().flatten()
        possible = int((lengths[long_enough] - seq_len).sum())
        if possible < n_samples:
            raise Refused(
                f"dataset.calibration: the calibration split of {self.corpus.name} has {possible} windows of "
                f"{seq_len} tokens, {n_samples} are asked for: lower dataset.calibration.seq_len or .n_samples"
            )
        generator = torch.Generator().manual_seed(seed)
        places: list[list[int]] = []
        while len(places) < n_samples:
            document = int(long_enough[torch.randint(len(long_enough), (1,), generator=generator)])
            place = [document, int(torch.randint(int(lengths[document]) - seq_len, (1,), generator=generator))]
            if place not in places:
                places.append(place)
        firsts = [int(starts[document]) + offset for document, offset in places]
        return torch.stack([stored.ids[first : first + seq_len] for first in firsts]).long(), places

    def bytes_per_token(self, split: str) -> float:
        """UTF-8 bytes of the split's text for each of its tokens."""
        stored = self._stored(split)
        return stored.n_bytes / len(stored.ids)

    def _stored(self, split: str) -> Stored:
        if split not in self._splits:
            joined = split not in ("train", "calibration") or self.corpus.is_one_document(split)
            key = tokens_key(self.corpus.fingerprints[split], tokenizer_sha256(self._tokenizer), split, joined)
            make = self._as_one_text if joined else self._each_by_itself
            stored = stored_tokens(key, lambda: self._watched(split, make))
            if self.vocab_size is not None and stored.largest >= self.vocab_size:
                raise Refused(
                    f"the tokenizer gives the id {stored.largest} and the model's vocabulary has {self.vocab_size} "
                    "entries: they do not belong together; give the folder or Hub id whose tokenizer it is"
                )
            self._splits[split] = stored
        return self._splits[split]

    def _as_one_text(self, split: str) -> Iterator[Run]:
        return tokenise_joined(self._tokenizer, self.corpus.pieces(split))

    def _each_by_itself(self, split: str) -> Iterator[Run]:
        """Document by document, on all cores; in training text a blank line follows each."""
        end = JOIN if split == "train" else ""
        batch: list[str] = []
        for text in chain(self.corpus.split(split), [None]):
            if text is not None:
                batch.append(text + end)
            if batch and (text is None or sum(map(len, batch)) > BATCH_BYTES):
                for row, one in zip(encode(self._tokenizer, batch, special=True), batch, strict=True):
                    yield row, len(one.encode())
                batch = []

    def _watched(self, split: str, make: Any) -> Iterator[Run]:
        with self.console.progress(None, f"tokenising {split}", unit="B") as bar:
            for ids, size in make(split):
                yield ids, size
                bar.update(size)


def sha256(windows: Tensor) -> str:
    """sha256 of token ids as little-endian int64."""
    digest = hashlib.sha256()
    for part in windows.split(4096):
        digest.update(part.contiguous().numpy().astype("<i8").tobytes())
    return digest.hexdigest()
