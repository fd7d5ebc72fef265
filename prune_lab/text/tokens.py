"""Token windows of a corpus: what training, calibration and perplexity read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from prune_lab.errors import Refused
from prune_lab.fingerprint import tokens_key
from prune_lab.system.console import Console
from prune_lab.text.corpus import HELD_OUT, JOIN, Corpus
from prune_lab.text.encode import encode, tokenizer_sha256
from prune_lab.text.joined import special_tokens, tokenise_joined
from prune_lab.text.sampling import Drawn, at_random, covered, in_turn
from prune_lab.text.token_store import Run, Stored, stored_tokens

BATCH_BYTES = 2**21  # of documents that are tokenised at once


class Tokens:
    """A corpus as tokens of one tokenizer, split by split, tokenised when first asked for and then kept on disk.

    Raises Refused, when a split is asked for, where a token is beyond a model's vocabulary of `vocab_size`.
    """

    def __init__(
        self, corpus: Corpus, tokenizer: Any, console: Console | None = None, vocab_size: int | None = None
    ) -> None:
        self.corpus, self.vocab_size = corpus.for_tokenizer(tokenizer), vocab_size
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
        stream = self.enough(split, seq_len)
        count = len(stream) // seq_len
        return stream[: count * seq_len].view(count, seq_len)

    def enough(self, split: str, seq_len: int) -> Tensor:
        """All tokens of a split that has a window of seq_len tokens; raises Refused, with what to do, where not."""
        self._check_documents(split)
        stream = self.stream(split)
        if len(stream) < seq_len:
            place = "" if self.corpus.read_test is not None and split == "test" else f"the {split} split of "
            raise Refused(
                f"dataset.seq_len={seq_len}: {place}{self.corpus.name} has only {len(stream)} tokens: give more text "
                "or a smaller dataset.seq_len"
            )
        return stream

    def _check_documents(self, split: str) -> None:
        """Raises Refused, with what to do, where a split has no document; of one that is cut, each has a part."""
        corpus, rows = self.corpus, self.corpus.survey.rows
        apart = corpus.read_test is not None
        if rows[split] or (corpus.is_cut and not apart):
            return
        there = corpus.n_documents - (rows["test"] if apart else 0)
        if apart and rows[HELD_OUT] == there:
            raise Refused(
                f"the {split} split of {corpus.name} has no text: all its documents are in dataset.test_path as well, "
                "and what is tested on is for nothing else: give other text"
            )
        ways = {
            "test": "give the test text apart, dataset.test_path=..., or",
            "calibration": "name calibration text, dataset.calibration.source=text dataset.calibration.name=..., or",
            "validation": "train without validation, recovery.validate_every=0, or give",
        }
        documents = "document is" if there == 1 else "documents are"
        raise Refused(
            f"the {split} split of {corpus.name} has no text: its {there} {documents} too few to fill "
            f"{'three' if apart else 'four'} splits, to which documents go by their hash: "
            f"{ways.get(split, 'give more, or')} one txt file, which is cut by position"
        )

    def calibration_windows(
        self, n_samples: int, seq_len: int, seed: int, spread: bool = False, join: bool = False
    ) -> Drawn:
        """Random windows, each inside one document longer than seq_len; two windows are never the same.

        Documents are drawn with replacement, as the papers draw them; with `spread`, each in turn. With `join`, windows
        lie side by side in all documents put one after the other, a blank line between them. Raises Refused where there
        are not enough.
        """
        self._check_documents("calibration")
        is_one = self.corpus.is_one_document("calibration")
        stored = self._stored("calibration", join and not is_one)
        starts, bounds = stored.starts, stored.starts[[0, -1]] if is_one or join else stored.starts
        lengths = bounds.diff()
        long_enough = lengths > seq_len
        possible = int((lengths - seq_len).clamp(min=0).sum())
        if possible < n_samples:
            where = self.corpus.name if spread else f"the calibration split of {self.corpus.name}"
            way = ""
            if not (join or is_one) and int(starts[-1]) - seq_len >= n_samples:
                way = ", or join short documents by dataset.calibration.join=true"
            raise Refused(
                f"dataset.calibration: {where} has {possible} windows of {seq_len} tokens within "
                f"{int(long_enough.sum())} documents that are long enough; {n_samples} are asked for: lower "
                f"dataset.calibration.seq_len or .n_samples{way}"
            )
        draw = in_turn if spread or join else at_random
        firsts = [int(bounds[document]) + offset for document, offset in draw(lengths, seq_len, n_samples, seed)]
        windows = torch.stack([stored.ids[first : first + seq_len] for first in firsts]).long()
        of = bounds if is_one else starts  # joined, a window may go on into the next document
        begins = torch.tensor(firsts)
        documents = torch.searchsorted(of, begins, right=True) - 1
        last = torch.searchsorted(of, begins + seq_len, right=False) - 1
        seen = {n for a, b in zip(documents.tolist(), last.tolist(), strict=True) for n in range(a, b + 1)}
        places = torch.stack([documents, begins - of[documents]], dim=1).tolist()
        sampling = "joined" if join else "in turn" if spread else "at random"
        return Drawn(windows, places, sampling, len(seen), int((~long_enough).sum()), *covered(firsts, seq_len))

    def bytes_per_token(self, split: str) -> float:
        """UTF-8 bytes of the split's text for each of its tokens."""
        stored = self._stored(split)
        return stored.n_bytes / len(stored.ids)

    def _stored(self, split: str, join: bool = False) -> Stored:
        """Tokens of a split; with `join`, a blank line follows each document of it."""
        name = f"{split}, joined" if join else split
        if name not in self._splits:
            joined = split not in ("train", "calibration") or self.corpus.is_one_document(split)
            key = tokens_key(self.corpus.fingerprints[split], tokenizer_sha256(self._tokenizer), name, joined)
            make = self._as_one_text if joined else partial(self._each_by_itself, join=join or split == "train")
            stored = stored_tokens(key, lambda: self._watched(split, make))
            if self.vocab_size is not None and stored.largest >= self.vocab_size:
                raise Refused(
                    f"the tokenizer gives the id {stored.largest} and the model's vocabulary has {self.vocab_size} "
                    "entries: they do not belong together; give the folder or Hub id whose tokenizer it is"
                )
            self._splits[name] = stored
        return self._splits[name]

    def _as_one_text(self, split: str) -> Iterator[Run]:
        return tokenise_joined(self._tokenizer, self.corpus.pieces(split))

    def _each_by_itself(self, split: str, join: bool) -> Iterator[Run]:
        """Document by document, on all cores; with `join`, a blank line follows each."""
        end, (before, _) = JOIN if join else "", special_tokens(self._tokenizer)
        batch: list[str] = []
        for text in chain(self.corpus.split(split), [None]):
            if text is not None:
                batch.append(text + end)
            if batch and (text is None or sum(map(len, batch)) > BATCH_BYTES):
                for row, one in zip(encode(self._tokenizer, batch, special=True), batch, strict=True):
                    begins_itself = bool(before) and row[: 2 * len(before)] == before * 2  # as a chat template may
                    yield row[len(before) if begins_itself else 0 :], len(one.encode())
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
