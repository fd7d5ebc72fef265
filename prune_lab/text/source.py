"""Base class of the dataset options, and the calibration part of their keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import combinations
from pathlib import Path

from prune_lab.checks import check_autocast
from prune_lab.text.corpus import Corpus
from prune_lab.text.unsplit import UnsplitCorpus

PLAIN = ("own", "stdlib", "text", "wikitext2", "c4")
SOURCES = (*PLAIN, "mix")
SLACK = Fraction(1, 10**6)  # of a sum of shares from 1: thirds are written with a few digits
PROPAGATE = ("pruned", "dense")
ADD_BOS = ("auto", "true", "false")


@dataclass(frozen=True)
class MixPart:
    """Part of a mix: a share of the windows, of one source; source, name, column: as in Calibration, no mix again."""

    source: str
    share: float
    name: str | None = None
    column: str = "text"

    def __post_init__(self) -> None:
        _check_text(self.source, self.name, self.column, PLAIN)
        if not 0 < self.share <= 1:
            raise ValueError(f"share={self.share:g} must be above 0 and at most 1: the shares of a mix sum to 1")


@dataclass(frozen=True)
class Calibration:
    """Calibration text: n_samples windows of seq_len tokens.

    source: "own", the dataset's own calibration split (apart from its training text); the name of another dataset,
    which is used whole, less what the run trains, validates or tests on; or "mix", several of these. name: where that
    one lies: a Hub repository or a local folder in its layout, or the path of a "text". column: of its rows, that which
    holds the text. mix: of source=mix, its parts.
    join: whether windows are cut from all documents put together, so that short ones count, too.
    propagate: whether blocks are calibrated behind "pruned" or "dense" ones.
    autocast: whether blocks multiply in bfloat16 while their inputs are observed, whatever the number type of the run.
    """

    n_samples: int = 128
    seq_len: int = 256
    source: str = "own"
    name: str | None = None
    column: str = "text"
    mix: tuple[MixPart, ...] = ()
    join: bool = False
    propagate: str = "pruned"
    batch_size: int = 16
    autocast: str = "none"

    def __post_init__(self) -> None:
        object.__setattr__(self, "mix", tuple(self.mix))
        if self.n_samples < 1:
            raise ValueError(f"n_samples={self.n_samples} must be at least 1")
        if self.seq_len < 2:
            raise ValueError(f"seq_len={self.seq_len} must be at least 2 tokens")
        _check_text(self.source, self.name, self.column, SOURCES)
        if self.mix and self.source != "mix":
            raise ValueError(f"mix is given with source={self.source}: give source=mix, or mix=[]")
        if self.source == "mix":
            self._check_mix()
        if self.propagate not in PROPAGATE:
            raise ValueError(f"propagate={self.propagate!r} is not one of {', '.join(PROPAGATE)}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} must be at least 1")
        check_autocast(self.autocast)

    def _check_mix(self) -> None:
        """Raises ValueError for a mix without parts, of shares that are not a whole, or of a part without a window."""
        if not self.mix:
            raise ValueError("mix=[] with source=mix: give its parts, mix=[{source: own, share: 0.5}, ...]")
        total = sum((Fraction(str(part.share)) for part in self.mix), Fraction())
        if abs(total - 1) > SLACK:
            raise ValueError(
                f"mix: its shares {', '.join(f'{part.share:g}' for part in self.mix)} sum to {float(total):g}, and the "
                "shares of a mix sum to 1"
            )
        for (i, one), (j, other) in combinations(enumerate(self.mix), 2):
            if (one.source, one.name, one.column) == (other.source, other.name, other.column):
                raise ValueError(
                    f"mix[{i}] and mix[{j}] name the same text, source={one.source}: give one part with both shares"
                )
        for index, (part, count) in enumerate(zip(self.mix, self.counts, strict=True)):
            if not count:
                raise ValueError(
                    f"mix[{index}].share={part.share:g} is no window of n_samples={self.n_samples}: give more windows, "
                    "a larger share, or leave the part out"
                )

    @property
    def parts(self) -> tuple[MixPart, ...]:
        """The parts of the text; without a mix it is one."""
        return self.mix or (MixPart(self.source, 1.0, self.name, self.column),)

    @property
    def counts(self) -> list[int]:
        """Number of windows of each part; they sum to n_samples."""
        return apportioned(self.n_samples, [part.share for part in self.parts])


def apportioned(total: int, shares: Sequence[float]) -> list[int]:
    """Whole numbers in the proportion of the shares that sum to `total`, by largest remainder.

    Of equal remainders the earlier share gets one more. Shares count as they are written: 0.1 is a tenth.
    """
    exact = [Fraction(str(share)) for share in shares]
    quotas = [total * share / sum(exact) for share in exact]
    found = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(found)), key=lambda n: found[n] - quotas[n])
    for index in by_remainder[: total - sum(found)]:
        found[index] += 1
    return found


def _check_text(source: str, name: str | None, column: str, allowed: tuple[str, ...]) -> None:
    """Raises ValueError where a source is not allowed, or its name or column do not fit it."""
    if source not in allowed:
        raise ValueError(f"source={source!r} is not one of {', '.join(allowed)}")
    if name is not None and source in ("own", "stdlib", "mix"):
        raise ValueError(f"name={name!r} with source={source}: it has no name; give source=text, wikitext2 or c4")
    if name is None and source == "text":
        raise ValueError("name is required with source=text: give the path of the text")
    if column != "text" and source != "text":
        raise ValueError(
            f"column={column!r} with source={source}: it is of the files of source=text; those of the dataset itself "
            "have dataset.column"
        )


@dataclass(frozen=True)
class TextSource:
    """A dataset option: documents in splits, and the window length they are cut into.

    add_bos: whether the tokenizer's BOS stands before each window (text/bos.py); "auto": where the model needs it.
    """

    seq_len: int = 256
    add_bos: str = "auto"
    calibration: Calibration = field(default_factory=Calibration)

    def __post_init__(self) -> None:
        if self.seq_len < 2:
            raise ValueError(f"seq_len={self.seq_len} must be at least 2 tokens")
        object.__setattr__(self, "add_bos", str(self.add_bos).lower())  # YAML's true is no text
        if self.add_bos not in ADD_BOS:
            raise ValueError(f"add_bos={self.add_bos!r} is not one of {', '.join(ADD_BOS)}")

    def files(self) -> list[Path]:
        """The files on this machine that it reads, as far as they may be edited while a process runs."""
        return []

    def corpus(self) -> Corpus:
        """Reads the corpus; raises Refused where there is none."""
        raise NotImplementedError

    def unsplit(self, key: str = "dataset.calibration") -> UnsplitCorpus:
        """All of it that may calibrate another dataset, as calibration text; refusals speak of `key`."""
        raise NotImplementedError
