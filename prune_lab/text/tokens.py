"""Token windows of a corpus: what training, calibration and perplexity read."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from prune_lab.errors import Refused
from prune_lab.text.splits import Documents

JOIN = "\n\n"  # between documents, as the published perplexities have it


class Tokens:
    """A corpus as tokens of one tokenizer, split by split, tokenised when first asked for."""

    def __init__(self, documents: Documents, tokenizer: Any) -> None:
        self.documents = documents
        self._tokenizer = tokenizer
        self._streams: dict[str, Tensor] = {}

    def stream(self, split: str) -> Tensor:
        """All tokens of a split, shape (tokens,), int64, with the tokenizer's own special tokens.

        Documents are joined and tokenised once, as the published perplexities have it; the training split, which
        no figure is taken from, document by document on all cores.
        """
        if split not in self._streams:
            documents = self.documents.split(split)
            if split == "train":
                rows = self._tokenizer([text + JOIN for text in documents], verbose=False)["input_ids"]
                self._streams[split] = torch.tensor([token for row in rows for token in row], dtype=torch.int64)
            else:
                self._streams[split] = self._encode(JOIN.join(documents))
        return self._streams[split]

    def windows(self, split: str, seq_len: int) -> Tensor:
        """Non-overlapping windows, shape (floor(tokens / seq_len), seq_len); the tail is dropped.

        Raises Refused where the split is shorter than one window.
        """
        stream = self.stream(split)
        count = len(stream) // seq_len
        if count == 0:
            raise Refused(
                f"dataset.seq_len={seq_len}: the {split} split of {self.documents.name} has only {len(stream)} "
                "tokens: give more text or a smaller dataset.seq_len"
            )
        return stream[: count * seq_len].view(count, seq_len)

    def calibration_windows(self, n_samples: int, seq_len: int, seed: int) -> tuple[Tensor, list[list[int]]]:
        """Random windows, each inside one document longer than seq_len (the papers' way of sampling).

        Returns the windows, shape (n_samples, seq_len), and for each [document, first token]. Documents are drawn
        with replacement; two windows are never the same. Raises Refused where there are not enough.
        """
        documents = [self._encode(text) for text in self.documents.split("calibration")]
        long_enough = [(i, tokens) for i, tokens in enumerate(documents) if len(tokens) > seq_len]
        possible = sum(len(tokens) - seq_len for _, tokens in long_enough)
        if possible < n_samples:
            raise Refused(
                f"dataset.calibration: the calibration split of {self.documents.name} has {possible} windows of "
                f"{seq_len} tokens, {n_samples} are asked for: lower dataset.calibration.seq_len or .n_samples"
            )
        generator = torch.Generator().manual_seed(seed)
        places: list[list[int]] = []
        while len(places) < n_samples:
            index = int(torch.randint(len(long_enough), (1,), generator=generator))
            document, tokens = long_enough[index]
            place = [document, int(torch.randint(len(tokens) - seq_len, (1,), generator=generator))]
            if place not in places:
                places.append(place)
        return torch.stack([documents[d][start : start + seq_len] for d, start in places]), places

    def bytes_per_token(self, split: str) -> float:
        """UTF-8 bytes of the split's text for each of its tokens."""
        return len(JOIN.join(self.documents.split(split)).encode()) / len(self.stream(split))

    def _encode(self, text: str) -> Tensor:
        # verbose=False: a stream is longer than the model's context on purpose; it is cut into windows.
        return torch.tensor(self._tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)


def sha256(tokens: Tensor) -> str:
    """sha256 of token ids as little-endian int64."""
    return hashlib.sha256(tokens.contiguous().numpy().astype("<i8").tobytes()).hexdigest()
