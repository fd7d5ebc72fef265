"""export=bitmask: the zeros of a pruned model take one bit each on disk, instead of a whole number.

In memory and in time nothing changes: the tensors are dense there.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from prune_lab.export.hf import HuggingFace

if TYPE_CHECKING:
    from prune_lab.export.loads_in import Verdict
    from prune_lab.models.load import Loaded


@dataclass(frozen=True)
class Bitmask(HuggingFace):
    """The layout of prune_lab/models/low_bit/bitmask.py, which prune_lab reads and stock transformers does not."""

    is_plain: ClassVar[bool] = False
    takes_low_bits: ClassVar[bool] = False
    takes_streamed: ClassVar[bool] = False

    def write(self, loaded: Loaded, folder: Path) -> None:
        """Writes a Hugging Face folder and puts its safetensors into one bitmask file."""
        from prune_lab.models.low_bit.bitmask import compress_folder

        super().write(loaded, folder)
        compress_folder(folder)

    def notes(self, loaded: Loaded) -> list[str]:
        """The one that concerns every such export."""
        return ["export=bitmask: zeros take one bit on disk, dense in memory; prune_lab alone reads it"]

    def reading(self, loaded: Loaded) -> str:
        """prune_lab."""
        return "prune_lab alone (`model=hf model.name=FOLDER`)"

    def loads_in(self, loaded: Loaded, cuts: Collection[str] = ()) -> list[Verdict]:
        """None of them."""
        from prune_lab.export.loads_in import of_bitmask

        return of_bitmask()
