"""method=depth: removes whole decoder blocks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from prune_lab.errors import Refused
from prune_lab.methods.base import Method
from prune_lab.models.families import FAMILIES
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
    def cuts(self) -> tuple[str, ...]:
        """Blocks."""
        return ("blocks",) if self.amount > 0 else ()

    @property
    def calibrated(self) -> bool:
        """True: every way needs calibration text."""
        return True

    def forward_passes(self, blocks: int) -> float:
        """Time of one pass, and of another for a refit; of a pass for each trial where blocks are tried."""
        if self.by in ("bi", "angle"):
            return 1.0 + (self.refit != "none")
        removed = int(self.amount * blocks)
        return removed * (blocks - removed / 2)

    def solved_width(self, anatomy: Anatomy) -> int | None:
        """Inputs of the Linear by which an MLP writes, where that is refitted."""
        if self.refit == "none":
            return None
        return int(max(of_block[-1].weight.shape[1] for of_block in anatomy.unit_linears("mlp")))

    def check(self, config: Any, amounts: Iterable[float]) -> None:
        """Raises Refused where a block's number is part of what it computes, or a refit is not for the family."""
        from prune_lab.models.resize import check_removable
        from prune_lab.pruning.selection import count_to_remove

        if config.model_type not in FAMILIES:  # which blocks can go is seen once the model is there
            if self.refit != "none":
                raise Refused(
                    f"method.refit={self.refit}: which matrix of a block is the last of its MLP is known of the "
                    f"families {', '.join(sorted(FAMILIES))}, and not of {config.model_type} models: give "
                    "method.refit=none"
                )
            return
        count = config.num_hidden_layers
        if any(min(count - 1, count_to_remove(count, amount)) for amount in amounts):
            check_removable(config)

    def check_model(self, anatomy: Anatomy, amounts: Iterable[float]) -> None:
        """Raises Refused where fewer blocks can go, or can together, than one of the amounts asks for."""
        from prune_lab.models.removable_blocks import Together
        from prune_lab.models.resize import original_blocks
        from prune_lab.pruning.block_importance import runs_among

        together = Together(anatomy, original_blocks(anatomy))
        for amount in amounts:
            can_go, remove = self._removable(anatomy, amount), _to_remove(anatomy, amount)
            if self.by == "angle":
                some = any(together.can_go(range(start, start + remove)) for start in runs_among(can_go, remove))
            else:
                some = any(together.first(order, remove) is not None for order in (can_go, can_go[::-1]))
            if not some:
                raise Refused(
                    f"method.amount={amount:g} removes {remove} of {len(anatomy.blocks)} blocks, and of this "
                    f"{anatomy.config.model_type} model no {remove} are found that can go together: {together.note()}. "
                    "Give a smaller amount, or another method"
                )

    def _removable(self, anatomy: Anatomy, amount: float) -> list[int]:
        """Blocks of which as many can go as a cumulative amount asks for; raises Refused where they are fewer."""
        from prune_lab.models.removable_blocks import blocks_that_stay
        from prune_lab.models.resize import dense_count, original_blocks
        from prune_lab.pruning.block_importance import runs_among

        count, remove = len(anatomy.blocks), _to_remove(anatomy, amount)
        if not remove or anatomy.found is None:
            return list(range(count))
        staying, numbers = blocks_that_stay(anatomy), original_blocks(anatomy)
        can_go = [index for index in range(count) if index not in staying]
        if runs_among(can_go, remove) if self.by == "angle" else len(can_go) >= remove:
            return can_go
        first, reason = next(iter(staying.items()))
        row = " in a row" * (self.by == "angle")
        blocks = f"block{'s' * (len(can_go) != 1)} {', '.join(str(numbers[index]) for index in can_go)}"
        said = f"only {blocks} can" if can_go else "none can"
        raise Refused(
            f"method.amount={amount:g} removes {remove}{row} of {dense_count(anatomy, 'blocks')} blocks, and of this "
            f"{anatomy.config.model_type} model {said}, counted from 0. Block {numbers[first]} cannot: {reason}. "
            "Give a smaller amount, or another method"
        )

    def prune(self, anatomy: Anatomy, amount: float, seed: int, calibrator: Calibrator | None = None) -> Pruned:
        """Removes blocks from the model and returns the table of what was removed."""
        from prune_lab.models.cuts import Cut
        from prune_lab.models.removable_blocks import Together
        from prune_lab.models.resize import check_removable, dense_count, dense_sizes, keep_blocks, original_blocks
        from prune_lab.pruning.block_importance import least_distant, least_influential, least_needed
        from prune_lab.pruning.depth_refit import check_repairable, refit_before

        assert calibrator is not None
        count, total = len(anatomy.blocks), dense_count(anatomy, "blocks")
        remove, notes, cuts = _to_remove(anatomy, amount), list[str](), list[Cut]()
        among = self._removable(anatomy, amount)
        if remove:
            check_removable(anatomy.config)
            if self.refit != "none":
                check_repairable(anatomy, calibrator)
            least = {"bi": least_influential, "angle": least_distant}.get(self.by) or partial(least_needed, by=self.by)
            together = Together(anatomy, original_blocks(anatomy))
            dropped = least(anatomy, remove, calibrator, among, together)
            notes += [note] if (note := together.note()) is not None else []
            if self.refit != "none":
                notes += refit_before(anatomy, dropped, calibrator)
            cuts = keep_blocks(anatomy, [index for index in range(count) if index not in dropped])
        gone = [index for index in range(total) if index not in original_blocks(anatomy)]
        warnings = [f"blocks removed of {total}, counted from 0: {', '.join(map(str, gone))}"] if gone else []
        rows = [
            LayerRow(name, size, size if index in gone else 0)
            for index, of_block in enumerate(dense_sizes(anatomy))
            for name, size in of_block.items()
        ]
        return Pruned(rows, warnings=warnings + notes, cuts=cuts)


def _to_remove(anatomy: Anatomy, amount: float) -> int:
    """Blocks that go now, for a cumulative amount of those of the dense model; at least one stays."""
    from prune_lab.models.resize import dense_count
    from prune_lab.pruning.selection import count_to_remove

    total = dense_count(anatomy, "blocks")
    return max(0, len(anatomy.blocks) - max(1, total - count_to_remove(total, amount)))
