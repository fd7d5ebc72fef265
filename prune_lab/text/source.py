"""What every dataset option has in common."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from prune_lab.checks import check_autocast
from prune_lab.text.corpus import Corpus
from prune_lab.text.unsplit import UnsplitCorpus

SOURCES = ("own", "stdlib", "text", "wikitext2", "c4")
PROPAGATE = ("pruned", "dense")
ADD_BOS = ("auto", "true", "false")


@dataclass(frozen=True)
class Calibration:
    """What calibrated methods look at: n_samples windows of seq_len tokens.

    source: "own", the dataset's own calibration split (apart from its training text); or the name of another dataset,
    which is used whole, less what the run trains, validates or tests on. name: where that one lies: a Hub repository or
    a local folder in its layout, or the path of a "text". column: of its rows, that which holds the text.
    join: whether windows are cut from all documents put together, so that short ones count, too.
    propagate: whether blocks are calibrated behind "pruned" or "dense" ones.
    autocast: whether blocks multiply in bfloat16 while their inputs are observed, whatever the number type of the run.
    """

    n_samples: int = 128
    seq_len: int = 256
    source: str = "own"
    name: str | None = None
    column: str = "text"
    join: bool = False
    propagate: str = "pruned"
    batch_size: int = 16
    autocast: str = "none"

    def __post_init__(self) -> None:
        if self.n_samples < 1:
            raise ValueError(f"n_samples={self.n_samples} must be at least 1")
        if self.seq_len < 2:
            raise ValueError(f"seq_len={self.seq_len} must be at least 2 tokens")
        if self.source not in SOURCES:
            raise ValueError(f"source={self.source!r} is none of {', '.join(SOURCES)}")
        if self.name is not None and self.source in ("own", "stdlib"):
            raise ValueError(
                f"name={self.name!r} with source={self.source}: it has no name; give source=text, wikitext2 or c4"
            )
        if self.name is None and self.source == "text":
            raise ValueError("name is required with source=text: give the path of the text")
        if self.column != "text" and self.source != "text":
            raise ValueError(
                f"column={self.column!r} with source={self.source}: it is of the files of source=text; those of the "
                "dataset itself have dataset.column"
            )
        if self.propagate not in PROPAGATE:
            raise ValueError(f"propagate={self.propagate!r} is none of {', '.join(PROPAGATE)}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} must be at least 1")
        check_autocast(self.autocast)


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
            raise ValueError(f"add_bos={self.add_bos!r} is none of {', '.join(ADD_BOS)}")

    def files(self) -> list[Path]:
        """The files on this machine that it reads, as far as they may be edited while a process runs."""
        return []

    def corpus(self) -> Corpus:
        """Reads the corpus; raises Refused where there is none."""
        raise NotImplementedError

    def unsplit(self) -> UnsplitCorpus:
        """All of it that may calibrate another dataset, as calibration text; refusals speak of dataset.calibration."""
        raise NotImplementedError
