"""What jobs at one's side do to timings: alone, beside jobs that pause meanwhile, and beside jobs that do not.

python tests/benchmarks/side_by_side.py [JOBS]        about a minute; JOBS defaults to the number of cores

Each round takes a shipped model's prefill in the three situations, one after the other; printed are medians over the
rounds of each situation's milliseconds, and of their ratio to the same round's time alone.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from prune_lab.measure.inference import prefill
from prune_lab.models.load import Tiny
from prune_lab.system.device import Device
from prune_lab.system.timing_lock import TimingLock

ROUNDS, REPEATS = 15, 15

# A job that computes in steps of a few milliseconds; while the file `rest` is there it does nothing.
JOB = """
import sys, time, torch
from pathlib import Path
from prune_lab.system.timing_lock import TimingLock

torch.set_num_threads(1)
turns, rest, a = TimingLock(Path(sys.argv[1])), Path(sys.argv[1]) / "rest", torch.randn(512, 512)
with turns.sharing():
    while True:
        if rest.exists():
            time.sleep(0.01)
        else:
            a @ a
        turns.pause()
"""


def median_ms(model: torch.nn.Module, prompt: torch.Tensor) -> float:
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        prefill(model, prompt)
        times.append((time.perf_counter() - began) * 1e3)
    return statistics.median(times)


def main(jobs: int) -> None:
    model = Tiny().load(Device(torch.device("cpu"), torch.float32), seed=0).model
    prompt = torch.arange(256)[None]
    found: dict[str, list[float]] = {"alone": [], "beside, pausing": [], "beside, not pausing": []}
    load: dict[str, list[float]] = {name: [] for name in found}
    with tempfile.TemporaryDirectory() as place:
        folder, turns = Path(place), TimingLock(Path(place))
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        started = [subprocess.Popen([sys.executable, "-c", JOB, place], env=env) for _ in range(jobs)]
        try:
            time.sleep(10)
            for _ in range(ROUNDS):
                for name in found:
                    rests = folder / "rest"
                    rests.touch() if name == "alone" else rests.unlink(missing_ok=True)
                    time.sleep(0.2)
                    # One that times without its turn uses locks of its own, which nobody else knows.
                    own = turns if name != "beside, not pausing" else TimingLock(Path(tempfile.mkdtemp(dir=place)))
                    with own.sharing(), own.alone() as seen:
                        median_ms(model, prompt)
                        found[name].append(median_ms(model, prompt))
                    load[name].append(seen.cores)
        finally:
            for process in started:
                process.kill()
                process.wait()
    for name, times in found.items():
        ratio = statistics.median(b / a for a, b in zip(found["alone"], times, strict=True))
        print(
            f"{name:20} {statistics.median(times):8.2f} ms   x{ratio:.2f}   {statistics.median(load[name]):.2f} cores"
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else os.cpu_count() or 1)
