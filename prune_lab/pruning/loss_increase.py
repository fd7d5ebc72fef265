"""Loss increase: how much the loss on calibration text grows when one decoder block alone is pruned."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prune_lab.models.anatomy import Anatomy
    from prune_lab.pruning.calibration import Calibrator
    from prune_lab.pruning.statistics import LinearStatistics

    PruneBlock = Callable[[int, dict[str, LinearStatistics], float], None]

AMOUNTS = (0.3, 0.5, 0.7, 0.9)
WINDOWS = 32  # of the calibration text: enough to rank blocks, and the analysis is blocks x amounts passes over them


def loss_increases(
    anatomy: Anatomy,
    statistics: Iterable[dict[str, LinearStatistics]],
    prune_block: PruneBlock,
    calibrator: Calibrator,
    amounts: tuple[float, ...],
    rule: type,
    key: dict[str, Any],
) -> list[list[float]]:
    """increases[block][i]: loss increase in nats when `prune_block(block, statistics, amounts[i])` prunes one block.

    statistics: those of each block of the dense model. The model is left as it was. Measured once for the dense model;
    rule: the class of the method whose code prunes; key: its keys, and all else that the result depends on.
    """

    def measured() -> list[list[float]]:
        return _measure(anatomy, statistics, prune_block, calibrator, amounts)

    of = {**key, "class": f"{rule.__module__}.{rule.__qualname__}", "amounts": amounts}
    written_in = tuple(dict.fromkeys(kind.__module__ for kind in rule.__mro__ if kind is not object))
    increases: list[list[float]] = calibrator.remember(anatomy, "sensitivity", of, measured, written_in)
    return increases


def _measure(
    anatomy: Anatomy,
    statistics: Iterable[dict[str, LinearStatistics]],
    prune_block: PruneBlock,
    calibrator: Calibrator,
    amounts: tuple[float, ...],
) -> list[list[float]]:
    model, increases = anatomy.model, []
    dense = calibrator.loss(model, WINDOWS)
    blocks = anatomy.blocks
    with calibrator.console.progress(len(blocks) * len(amounts), "sensitivity", unit="pass") as bar:
        for index, (block, of_block) in enumerate(zip(blocks, statistics, strict=True)):
            before = {name: value.clone() for name, value in block.state_dict().items()}
            of_amounts = []
            for amount in amounts:
                prune_block(index, of_block, amount)
                of_amounts.append(calibrator.loss(model, WINDOWS) - dense)
                block.load_state_dict(before)
                bar.update()
            increases.append(of_amounts)
    return increases
