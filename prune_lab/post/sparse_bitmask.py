"""post=sparse_bitmask: the zeros of a pruned model take one bit each on disk, instead of a whole number.

In memory and in time nothing changes: the tensors are dense there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from prune_lab.post.base import Post

if TYPE_CHECKING:
    from prune_lab.models.anatomy import Anatomy


@dataclass(frozen=True)
class SparseBitmask(Post):
    """The layout of prune_lab/models/low_bit/bitmask.py, which prune_lab reads and stock transformers does not."""

    storage: ClassVar[str] = "bitmask"
    reading: ClassVar[str] = "prune_lab alone (`model=hf model.name=FOLDER`)"

    def compress(self, anatomy: Anatomy) -> list[str]:
        """Leaves the model as it is: only its file differs."""
        return ["sparse_bitmask: stored as bitmask and values, dense in memory; prune_lab reads it, others do not"]
