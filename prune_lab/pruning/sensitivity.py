"""How much the loss on calibration text rises when one block alone is pruned."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prune_lab.models.anatomy import Anatomy
    from prune_lab.pruning.calibration import Calibrator
    from prune_lab.pruning.seen import Seen

    PruneBlock = Callable[[int, dict[str, Seen], float], None]

AMOUNTS = (0.3, 0.5, 0.7, 0.9)
WINDOWS = 32  # of the calibration text: enough to rank blocks, and the scan is blocks x amounts passes over them


def scan(
    anatomy: Anatomy,
    walk: Iterable[dict[str, Seen]],
    prune_block: PruneBlock,
    calibrator: Calibrator,
    amounts: tuple[float, ...],
    method: type,
    of: dict[str, Any],
) -> list[list[float]]:
    """rises[block][i]: rise of the loss in nats when `prune_block(block, seen, amounts[i])` prunes that block alone.

    `walk` yields what was seen of each block of the dense model. The model is afterwards as it was. It is measured once
    for the dense model; method: the class whose code it runs; of: what else it depends on beside the calibrator.
    """

    def measured() -> list[list[float]]:
        return _scan(anatomy, walk, prune_block, calibrator, amounts)

    of = {**of, "class": f"{method.__module__}.{method.__qualname__}", "amounts": amounts}
    written_in = tuple(dict.fromkeys(kind.__module__ for kind in method.__mro__ if kind is not object))
    rises: list[list[float]] = calibrator.remember(anatomy, "scan", of, measured, written_in)
    return rises


def _scan(
    anatomy: Anatomy,
    walk: Iterable[dict[str, Seen]],
    prune_block: PruneBlock,
    calibrator: Calibrator,
    amounts: tuple[float, ...],
) -> list[list[float]]:
    model, rises = anatomy.model, []
    dense = calibrator.loss(model, WINDOWS)
    blocks = anatomy.blocks
    with calibrator.console.progress(len(blocks) * len(amounts), "sensitivity", unit="pass") as bar:
        for index, (block, seen) in enumerate(zip(blocks, walk, strict=True)):
            before = {name: value.clone() for name, value in block.state_dict().items()}
            of_block = []
            for amount in amounts:
                prune_block(index, seen, amount)
                of_block.append(calibrator.loss(model, WINDOWS) - dense)
                block.load_state_dict(before)
                bar.update()
            rises.append(of_block)
    return rises
