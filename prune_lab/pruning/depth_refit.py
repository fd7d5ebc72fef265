"""Refit for whole blocks that go: the block before them repairs the states that they leave behind.

The matrix by which the MLP of the last block before a run of removed ones writes to the states is set by least squares
(refit.py), with its bias where it has one, so that the states after it come as near as possible to those of the dense
model after the run. ReplaceMe (Shopkhoev et al., 2505.02819) fits hidden x hidden numbers that it multiplies into this
matrix; here the matrix itself is fitted, of which those are a special case.
"""

from __future__ import annotations

from typing import Any

import torch

from prune_lab.models.anatomy import Anatomy, UnitLinear
from prune_lab.models.blocks import BlockStream, recorded
from prune_lab.models.resize import original_blocks
from prune_lab.pruning.calibration import Calibrator
from prune_lab.pruning.dense_beside import ErrorSums, check_added, rows
from prune_lab.pruning.gram import DAMPING
from prune_lab.pruning.statistics import BlockObserver, LinearStatistics
from prune_lab.pruning.surgery import refit_reader


def check_repairable(anatomy: Anatomy, calibrator: Calibrator) -> None:
    """Raises Refused where what an MLP puts out is not added to the states as it is."""
    first = BlockStream(anatomy, calibrator.windows[: calibrator.batch_size], calibrator.batch_size)
    check_added(anatomy, first, _writer(anatomy, 0).name, "method.refit=none")


@torch.no_grad()
def refit_before(anatomy: Anatomy, dropped: list[int], calibrator: Calibrator) -> list[str]:
    """Refits the block before each run of blocks that will go, all of which are still there; returns warnings.

    From the first run to the last, each behind blocks that are refitted already; the states that are wanted are those
    of the model as it is given. A run at the beginning has no block before it.
    """
    runs, at, warnings = runs_of(dropped), 0, list[str]()
    dense, pruned = (BlockStream(anatomy, calibrator.mine, calibrator.batch_size) for _ in range(2))
    # Up to the last run's end the dense states pass every block, the others those that stay behind the first run's
    # beginning, refitted ones twice.
    alike = max(0, runs[0].start - 1)
    passes = 2 * runs[-1].stop - alike - len(dropped) + sum(run.start > 0 for run in runs)
    with calibrator.console.progress(passes * calibrator.mine.numel(), "refitting", unit="tok") as bar:
        for run in runs:
            before = run.start - 1
            for index in range(at, before):
                calibrator.forward(dense, index, bar, keep=True)
                if run is not runs[0]:
                    calibrator.forward(pruned, index, bar, keep=True)
            if run is runs[0]:
                for number in range(len(dense.states)):  # nothing before it differs
                    pruned.states[number] = dense.states[number]
            for index in range(max(at, before), run.stop):
                calibrator.forward(dense, index, bar, keep=True)
            if before < 0:
                first = ", ".join(str(original_blocks(anatomy)[index]) for index in run)
                warnings.append(f"method.refit=residual: no block stands before {first} that could make up for them")
            else:
                writer, statistics = _statistics(anatomy, before, dense, pruned, calibrator, bar)
                everything = torch.ones(writer.weight.shape[1], dtype=torch.bool)
                damping = refit_reader(writer, everything, statistics)
                if damping > DAMPING:
                    warnings.append(f"{writer.name}: the refit needed damping {damping:g} instead of {DAMPING:g}")
                calibrator.forward(pruned, before, bar, keep=True)
            at = run.stop
    return warnings


def _statistics(
    anatomy: Anatomy, block: int, dense: BlockStream, pruned: BlockStream, calibrator: Calibrator, bar: Any
) -> tuple[UnitLinear, LinearStatistics]:
    """The writer of a block, and what its refit reads: its inputs, and the error of its block's outputs."""
    writer = _writer(anatomy, block)
    needs = frozenset({"gram"} if writer.linear.bias is None else {"gram", "variance"})
    observer, sums = BlockObserver([(writer.name, writer.linear)], {writer.name: needs}, stop=False), ErrorSums()

    def compare(number: int) -> None:
        with recorded({writer.name: writer.linear}) as calls, observer.watch(anatomy.blocks[block]):
            out = pruned.output(block, number)
        sums.add(writer.name, rows(calls[writer.name][0]), rows(dense.states[number]).float() - rows(out).float())

    calibrator.by_batch(pruned, bar, compare)
    world = calibrator.sharing
    return writer, sums.put_into(observer.statistics(world), world)[writer.name]


def runs_of(dropped: list[int]) -> list[range]:
    """The runs of consecutive blocks among `dropped`, in order."""
    starts = [index for index in sorted(dropped) if index - 1 not in dropped]
    ends = [index + 1 for index in sorted(dropped) if index + 1 not in dropped]
    return [range(start, end) for start, end in zip(starts, ends, strict=True)]


def _writer(anatomy: Anatomy, block: int) -> UnitLinear:
    """The Linear by which the MLP of a block writes to the states."""
    return anatomy.unit_linears("mlp")[block][-1]
