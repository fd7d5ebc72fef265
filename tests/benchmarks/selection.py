"""Exact selection beside a full torch.sort of the same scores, on 4096 x 4096: time, and the memory it takes on top.

python tests/benchmarks/selection.py [REPEATS]

Ours gives the finished mask, with ties by the lower index; the sort is only the sort. Medians of interleaved repeats,
by wall time, and by process time, which counts the work of all threads and not what others do on the machine.
"""

from __future__ import annotations

import platform
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from prune_lab.pruning.selection import Pattern, count_to_remove, keep_global, keep_layer, keep_pattern, keep_rows
from prune_lab.pruning.thresholds import thresholds

SIZE, AMOUNT, AMOUNTS = 4096, 0.5, [i / 10 for i in range(1, 10)]
Timed = Callable[[], object]


def cases(scores: Tensor) -> dict[str, tuple[Timed, Timed]]:
    """What is selected: ours, and the sort."""
    parts = list(scores.split(SIZE // 4))
    of_row, pattern = count_to_remove(SIZE, AMOUNT), Pattern(2, 4)
    all_of_them = [count_to_remove(scores.numel(), amount) for amount in AMOUNTS]
    return {
        "row": (lambda: keep_rows(scores, of_row), lambda: scores.sort(dim=1)),
        "layer": (lambda: keep_layer(scores, AMOUNT), lambda: scores.flatten().sort()),
        "global, 4 matrices": (lambda: keep_global(parts, AMOUNT), lambda: torch.cat(parts).flatten().sort()),
        "2:4": (lambda: keep_pattern(scores, pattern), lambda: scores.view(-1, 4).sort(dim=1)),
        f"cuts of {len(AMOUNTS)} amounts": (lambda: thresholds([scores], all_of_them), lambda: scores.flatten().sort()),
    }


def memory(name: str) -> int:
    """A figure of /proc/self/status in bytes: VmRSS, or VmHWM, its peak."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def peak(function: Timed) -> float:
    """MB that a call holds at most on top of what was there before."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory("VmRSS")
    function()
    return (memory("VmHWM") - before) / 1e6


def seconds(function: Timed) -> tuple[float, float]:
    """Wall and process time of a call."""
    wall, work = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - wall, time.process_time() - work


def main(repeats: int) -> None:
    """Prints the table."""
    int64 = f"an int64 for each score: {SIZE * SIZE * 8 / 1e6:.0f} MB"
    print(f"torch {torch.__version__}, threads: {torch.get_num_threads()}; {int64}\n")
    print("| scores | selection | ours | torch.sort | faster, wall | faster, process time | ours, peak | sort, peak |")
    print("|---|---|---|---|---|---|---|---|")
    for dtype in (torch.float32, torch.bfloat16):
        scores = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0)).abs().to(dtype)
        for name, (ours, sort) in cases(scores).items():
            with_memory = platform.system() == "Linux"
            peaks = [f"{peak(one):.0f} MB" if with_memory else "" for one in (ours, sort)]  # and the warm-up
            taken = [(seconds(ours), seconds(sort)) for _ in range(repeats)]
            wall, work = (median(b[i] / a[i] for a, b in taken) for i in (0, 1))
            times = [f"{median(pair[i][0] for pair in taken) * 1e3:.0f} ms" for i in (0, 1)]
            figures = [f"{dtype}"[6:], name, *times, f"{wall:.1f} x", f"{work:.1f} x", *peaks]
            print(f"| {' | '.join(figures)} |", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
