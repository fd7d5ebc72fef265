"""What every dataset option has in common."""

from __future__ import annotations

from dataclasses import dataclass, field

from prune_lab.text.corpus import Corpus


@dataclass(frozen=True)
class Calibration:
    """How many windows of calibration text a method may look at: n_samples windows of seq_len tokens."""

    n_samples: int = 128
    seq_len: int = 256

    def __post_init__(self) -> None:
        if self.n_samples < 1:
            raise ValueError(f"n_samples={self.n_samples} must be at least 1")
        if self.seq_len < 2:
            raise ValueError(f"seq_len={self.seq_len} must be at least 2 tokens")


@dataclass(frozen=True)
class TextSource:
    """A dataset option: documents in splits, and the window length they are cut into."""

    seq_len: int = 256
    calibration: Calibration = field(default_factory=Calibration)

    def __post_init__(self) -> None:
        if self.seq_len < 2:
            raise ValueError(f"seq_len={self.seq_len} must be at least 2 tokens")

    def corpus(self) -> Corpus:
        """Reads the corpus; raises Refused where there is none."""
        raise NotImplementedError
