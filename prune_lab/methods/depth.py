"""method=depth: whole decoder blocks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prune_lab.methods.base import Method
from prune_lab.pruning.pruned import Pruned

if TYPE_CHECKING:
    from prune_lab.models.anatomy import Anatomy
    from prune_lab.pruning.calibration import Calibrator

WAYS = ("bi", "perplexity")


@dataclass(frozen=True)
class Depth(Method):
    """Removes the blocks that matter least; at least one stays.

    by: bi, the blocks that change the direction of the states least in the dense model (ShortGPT: Men et al.,
    2403.03853); perplexity, one block after the other, each time the one whose absence hurts calibration text least
    (SLEB: Song et al., 2402.09025).
    """

    by: str = "bi"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.by not in WAYS:
            raise ValueError(f"by={self.by!r} is none of {', '.join(WAYS)}")

    @property
    def calibrated(self) -> bool:
        """It looks at calibration text either way."""
        return True

    def check(self, config: Any, amounts: Iterable[float]) -> None:
        """Raises Refused where a block's number is part of what it computes, and blocks would go."""
        from prune_lab.models.resize import check_removable
        from prune_lab.pruning.selection import count_to_remove

        count = config.num_hidden_layers
        if any(min(count - 1, count_to_remove(count, amount)) for amount in amounts):
            check_removable(config)

    def prune(self, anatomy: Anatomy, amount: float, seed: int, calibrator: Calibrator | None = None) -> Pruned:
        """Takes blocks out of the model and returns what went with them."""
        from prune_lab.pruning import depth

        assert calibrator is not None
        return depth.prune(anatomy, amount, self.by, calibrator)
