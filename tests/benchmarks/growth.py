"""How time and memory grow with parameters, calibration tokens and points of a sweep.

OMP_NUM_THREADS=1 python tests/benchmarks/growth.py PLOT.png [REPEATS]

Each point is a process of its own: a Llama of random weights (hidden 128 to 1024, 4 blocks; by tokens, hidden 256) is
pruned to 0.5 in memory, or the tiny model is swept over 1 to 8 amounts by the command line. Time is the processor's
for pruning (or the whole command), memory the resident peak beyond that of the imports. Printed: medians of interleaved
repeats, and between neighbours the exponent of growth: 1 is linear.
"""

from __future__ import annotations

import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
METHODS = "magnitude", "wanda", "sparsegpt"
SIZES, WINDOWS, POINTS = (128, 256, 512, 1024), (8, 32, 128, 512), (1, 2, 4, 8)
SEQ_LEN = 128


def prune(method: str, hidden: int, windows: int) -> dict[str, float]:
    """Seconds, megabytes and parameters of one pruning in this process."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from prune_lab.methods import magnitude, sparsegpt, wanda
    from prune_lab.models.anatomy import Anatomy
    from prune_lab.pruning.calibration import Calibrator

    makers = {"magnitude": magnitude.Magnitude, "wanda": wanda.Wanda, "sparsegpt": sparsegpt.SparseGPT}
    before = psutil.Process().memory_info().rss
    config = LlamaConfig(
        vocab_size=1024, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=4,
        num_attention_heads=hidden // 32, max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    text = torch.randint(1024, (windows, SEQ_LEN))
    began = time.process_time()
    makers[method](amount=0.5).prune(Anatomy(model), 0.5, seed=0, calibrator=Calibrator(text))
    seconds = time.process_time() - began
    status = Path("/proc/self/status").read_text().splitlines()
    peak = int(next(line for line in status if line.startswith("VmHWM")).split()[1]) * 1024
    scope = sum(linear.weight.numel() for _, linear in Anatomy(model).linears())
    return {"seconds": seconds, "mb": (peak - before) / 1e6, "parameters": scope}


def in_a_process(method: str, hidden: int, windows: int) -> dict[str, float]:
    """`prune` in a fresh one."""
    command = [sys.executable, __file__, "--prune", method, str(hidden), str(windows)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def sweep(method: str, points: int) -> dict[str, float]:
    """Seconds and megabytes of a whole command with an empty cache."""
    amounts = ",".join(f"{0.1 + 0.1 * point:.1f}" for point in range(points))
    with tempfile.TemporaryDirectory() as place:
        command = [
            sys.executable, "-m", "prune_lab", f"method={method}", f"amount={amounts}", "measure=quality_only",
            "measure.max_windows=32", "dataset.calibration.n_samples=32", "dataset.calibration.propagate=dense",
            "tracking=none", "quiet=true", "-m",
        ]  # fmt: skip
        env = os.environ | {"PYTHONPATH": str(ROOT), "PRUNE_LAB_CACHE": f"{place}/cache"}
        used, peak = children_s(), 0
        process = psutil.Popen(command, cwd=place, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None:
            if process.status() != psutil.STATUS_ZOMBIE:
                peak = max(peak, process.memory_info().rss)
            time.sleep(0.05)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} failed")
        return {"seconds": children_s() - used, "mb": peak / 1e6}


def children_s() -> float:
    """Processor time of all children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def exponents(xs: list[float], ys: list[float]) -> list[float]:
    """Of growth from each point to the next: the slopes of a line on logarithmic axes."""
    pairs = list(zip(xs, ys, strict=True))
    return [math.log(d / b) / math.log(c / a) for (a, b), (c, d) in pairwise(pairs)]


def main(plot: Path, repeats: int) -> None:
    """Prints the table and draws the plot."""
    questions: dict[str, tuple[list[float], Any]] = {
        "weights that are ranked": ([], lambda method, hidden: in_a_process(method, hidden, 32)),
        "calibration tokens": ([n * SEQ_LEN for n in WINDOWS], lambda method, n: in_a_process(method, 256, n)),
        "points of a sweep": (list(POINTS), sweep),
    }
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    print("| grows with | method | at | seconds | exponents | MB | exponents |\n|---|---|---|---|---|---|---|")
    for (question, (xs, measure)), values in zip(questions.items(), (SIZES, WINDOWS, POINTS), strict=True):
        taken: dict[tuple[str, int], list[dict[str, float]]] = {(m, v): [] for m in METHODS for v in values}
        for _ in range(repeats):
            for (method, value), results in taken.items():
                results.append(measure(method, value))
        for method in METHODS:
            line = [
                {key: median(one[key] for one in taken[method, value]) for key in taken[method, value][0]}
                for value in values
            ]
            found[question, method] = line
            if not xs:
                xs.extend(one["parameters"] for one in line)
            cells = [", ".join(f"{x:,.0f}" for x in xs)]
            for key, digits in (("seconds", 2), ("mb", 0)):
                ys = [one[key] for one in line]
                cells += [", ".join(f"{y:.{digits}f}" for y in ys), ", ".join(f"{e:.2f}" for e in exponents(xs, ys))]
            print(f"| {question} | {method} | {' | '.join(cells)} |", flush=True)
    draw(plot, {question: xs for question, (xs, _) in questions.items()}, found)


def draw(plot: Path, axes: dict[str, list[float]], found: dict[tuple[str, str], list[dict[str, float]]]) -> None:
    """Time above, memory below; a dotted line grows as the axis does."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(2, len(axes), figsize=(12, 7), constrained_layout=True)
    for column, (question, xs) in enumerate(axes.items()):
        for row, (key, unit) in enumerate((("seconds", "seconds"), ("mb", "MB"))):
            axis = grid[row][column]
            for method in METHODS:
                axis.loglog(xs, [one[key] for one in found[question, method]], marker="o", label=method)
            first = found[question, METHODS[-1]][0][key]
            axis.loglog(xs, [first * x / xs[0] for x in xs], ":", color="gray", label="linear")
            axis.set(xlabel=question, ylabel=unit)
    grid[0][0].legend()
    figure.savefig(plot, dpi=100)


if __name__ == "__main__":
    if sys.argv[1] == "--prune":
        print(json.dumps(prune(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))
    else:
        main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 3)
