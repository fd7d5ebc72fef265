"""export=none: what is measured of the compressed model, and no more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from prune_lab.export.hf import HuggingFace


@dataclass(frozen=True)
class NoExport(HuggingFace):
    """The Hugging Face folder, gone when the run has measured it."""

    is_kept: ClassVar[bool] = False
