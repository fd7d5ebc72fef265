"""Calibration windows of a run: drawn from each part of its calibration text, mixed, and stamped."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prune_lab.results.run_warnings import SAME_TEXT
from prune_lab.text.sampling import Drawn, holding
from prune_lab.text.source import Calibration
from prune_lab.text.tokens import Tokens, sha256
from prune_lab.text.unsplit import UnsplitCorpus

Stamp = dict[str, Any]


def draw_windows(
    asked: Calibration, own: Tokens, parts: list[Tokens | None], tested: Tensor, seed: int
) -> tuple[Tensor, Stamp]:
    """The windows, shape (n_samples, seq_len), int64, and the stamp of their text.

    own: the run's text; parts: the texts of `asked.parts`, None for its own calibration split; tested: token ids of the
    test windows. The windows of a mix take turns, so that those of any stretch are about in the shares of the whole.
    Raises Refused where a part has not enough text.
    """
    drawn, stamps = [], []
    for part, tokens, count in zip(asked.parts, parts, asked.counts, strict=True):
        text = own if tokens is None else tokens
        found = text.calibration_windows(count, asked.seq_len, seed, spread=tokens is not None, join=asked.join)
        drawn.append(found)
        stamps.append(_stamp(found, text, tokens is None, tested) | ({"share": part.share} if asked.mix else {}))
    if not asked.mix:
        return drawn[0].windows, {**stamps[0], "windows": drawn[0].places, "mix": None}
    order = turns([len(found.windows) for found in drawn])
    windows = torch.stack([drawn[part].windows[number] for part, number in order])
    mixed = {
        "source": " + ".join(f"{stamp['share']:g} {stamp['source']}" for stamp in stamps),
        "own": any(stamp["own"] for stamp in stamps),
        "n_samples": len(windows),
        "sampling": "mixed",
        "text": None,  # of each part in "mix"
        **{
            name: sum(stamp[name] for stamp in stamps)
            for name in ("documents", "documents_too_short", "distinct_tokens", "windows_tested_on")
        },
        "overlap": max(stamp["overlap"] for stamp in stamps),
        "tokens_sha256": sha256(windows),
        "windows": [[part, *drawn[part].places[number]] for part, number in order],  # [part, document, first token]
        "mix": stamps,
    }
    return windows, mixed


def turns(counts: list[int]) -> list[tuple[int, int]]:
    """The order of a mix, as (part, window of it): each part spread evenly over the whole, the earlier part first."""
    windows = [(part, number, count) for part, count in enumerate(counts) for number in range(count)]
    return [(part, number) for part, number, _ in sorted(windows, key=lambda w: ((2 * w[1] + 1) / (2 * w[2]), w[0]))]


def _stamp(drawn: Drawn, text: Tokens, is_own: bool, tested: Tensor) -> Stamp:
    """The stamp of windows of one text."""
    # However it is cut into documents; two splits of one text share what it repeats, and no more.
    is_other = not is_own or text.corpus.read_test is not None
    return {
        "source": text.corpus.name,
        "own": is_own,
        "n_samples": len(drawn.windows),
        "sampling": drawn.sampling,
        "documents": drawn.documents,
        "documents_too_short": drawn.too_short,
        "distinct_tokens": drawn.distinct_tokens,
        "overlap": drawn.overlap,  # the most windows that share a token
        "text": text.corpus.counts if isinstance(text.corpus, UnsplitCorpus) else None,
        "windows_tested_on": holding(drawn.windows, tested, SAME_TEXT) if is_other else 0,
        "tokens_sha256": sha256(drawn.windows),
    }
