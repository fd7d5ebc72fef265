"""What every post-compression option has in common."""

from __future__ import annotations

from dataclasses import dataclass

from prune_lab.models.anatomy import Anatomy


@dataclass(frozen=True)
class Post:
    """A post-compression option: turns the pruned model into the one that is measured and exported."""

    def compress(self, anatomy: Anatomy) -> None:
        """Changes the model in place; raises Refused where the device has no backend for it."""
        raise NotImplementedError
