"""post=none: the pruned model as it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from prune_lab.post.base import Post

if TYPE_CHECKING:
    from prune_lab.models.anatomy import Anatomy


@dataclass(frozen=True)
class NoPost(Post):
    """Changes nothing."""

    def compress(self, anatomy: Anatomy) -> list[str]:
        """Leaves the model as it is."""
        return []
