"""method=depth: removes whole decoder blocks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from prune_lab.methods.base import Method
from prune_lab.models.anatomy import check_described
from prune_lab.pruning.pruned import LayerRow, Pruned

if TYPE_CHECKING:
    from prune_lab.models.anatomy import Anatomy
    from prune_lab.pruning.calibration import Calibrator

WAYS = ("bi", "angle", "perplexity", "kl")
REFITS = ("none", "residual")


@dataclass(frozen=True)
class Depth(Method):
    """Removes the blocks that matter least; at least one stays.

    by: bi, the blocks that change the direction of the states least in the dense model (ShortGPT: Men et al.,
    2403.03853); angle, the run of consecutive blocks that together turn them least (Gromov et al., 2403.17887);
    perplexity, one block after the other, each time the one whose absence hurts calibration text least (SLEB: Song et
    al., 2402.09025); kl, likewise by the divergence from the predictions that the model had before this pruning.
    refit: none, or residual: the MLP of the block before those that go repairs the states (pruning/depth_refit.py).
    """

    by: str = "bi"
    refit: str = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.by not in WAYS:
            raise ValueError(f"by={self.by!r} is not one of {', '.join(WAYS)}")
        if self.refit not in REFITS:
            raise ValueError(f"refit={self.refit!r} is not one of {', '.join(REFITS)}")

    @property
    def calibrated(self) -> bool:
        """True: every way needs calibration text."""
        return True

    def solved_width(self, anatomy: Anatomy) -> int | None:
        """Inputs of the Linear by which an MLP writes, where that is refitted."""
        if self.refit == "none":
            return None
        return int(max(of_block[-1].weight.shape[1] for of_block in anatomy.unit_linears("mlp")))

    def check(self, config: Any, amounts: Iterable[float]) -> None:
        """Raises Refused where the family is not described, or a block's number is part of what it computes."""
        from prune_lab.models.resize import check_removable
        from prune_lab.pruning.selection import count_to_remove

        check_described(config, "method=depth")
        count = config.num_hidden_layers
        if any(min(count - 1, count_to_remove(count, amount)) for amount in amounts):
            check_removable(config)

    def prune(self, anatomy: Anatomy, amount: float, seed: int, calibrator: Calibrator | None = None) -> Pruned:
        """Removes blocks from the model and returns the table of what was removed."""
        from prune_lab.models.resize import check_removable, dense_count, keep_blocks, original_blocks
        from prune_lab.pruning.block_importance import least_distant, least_influential, least_needed
        from prune_lab.pruning.depth_refit import check_repairable, refit_before
        from prune_lab.pruning.selection import count_to_remove

        assert calibrator is not None
        count, total = len(anatomy.blocks), dense_count(anatomy, "blocks")
        remove, of_refit = max(0, count - max(1, total - count_to_remove(total, amount))), list[str]()
        if remove:
            check_removable(anatomy.config)
            if self.refit != "none":
                check_repairable(anatomy, calibrator)
            least = {"bi": least_influential, "angle": least_distant}.get(self.by) or partial(least_needed, by=self.by)
            dropped = least(anatomy, remove, calibrator)
            if self.refit != "none":
                of_refit = refit_before(anatomy, dropped, calibrator)
            keep_blocks(anatomy, [index for index in range(count) if index not in dropped])
        gone = [index for index in range(total) if index not in original_blocks(anatomy)]
        warnings = [f"blocks removed of {total}, counted from 0: {', '.join(map(str, gone))}"] if gone else []
        return Pruned(_rows(anatomy, total, gone), warnings=warnings + of_refit)


def _rows(anatomy: Anatomy, total: int, gone: list[int]) -> list[LayerRow]:
    """The per-layer table of the dense model, in which all blocks are alike."""
    of_block = [(name.split(".0.", 1), linear.weight.numel()) for name, linear in anatomy.linears_by_block()[0]]
    return [
        LayerRow(f"{before}.{index}.{after}", size, size if index in gone else 0)
        for index in range(total)
        for (before, after), size in of_block
    ]
