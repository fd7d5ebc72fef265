"""What does a sweep that shares its work cost beside separate commands, and a further amount beside its own work?

3 methods x N amounts on the tiny model in one `-m`, beside as many commands of their own. Both begin with a cache that
holds the tokenised text alone. The commands are run twice over: each with a cache of its own, as scripts without one
would work, and all with one cache. Wall-clock and processor time are printed: the latter is what is left to go by on a
machine that others use.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

METHODS = ("magnitude", "wanda", "sparsegpt")
ALL_AMOUNTS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)

Cost = tuple[float, float]  # seconds by the clock, and of the processor


def run(place: Path, cache: Path, *arguments: str) -> Cost:
    """Seconds of a command, and of the processor in it and its children."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    environment = {**os.environ, "PRUNE_LAB_CACHE": str(cache)}
    command = [sys.executable, "-m", "prune_lab", "tracking=none", "quiet=true", *arguments]
    subprocess.run(command, cwd=place, env=environment, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - began, used


def total(costs: list[Cost]) -> Cost:
    return sum(wall for wall, _ in costs), sum(used for _, used in costs)


def ratio(name: str, one: Cost, other: Cost) -> None:
    print(f"{name}: {one[0] / other[0]:.3f} by the clock, {one[1] / other[1]:.3f} of processor time", flush=True)


def further_amounts(sweep: Path, amounts: int) -> None:
    """Per calibrated method: seconds of the later jobs (from start to end) beside their selection + evaluation."""
    for number, method in enumerate(METHODS):
        shares = []
        for index in range(1, amounts):
            folder = sweep / str(number * amounts + index)
            seconds = json.loads((folder / "summary.json").read_text())["metrics"]
            alone = seconds["time/prune_s"] + seconds["time/measure_s"]
            began = (sweep / str(number * amounts + index - 1) / "summary.json").stat().st_mtime
            shares.append(((folder / "summary.json").stat().st_mtime - began) / alone)
        print(f"a further amount of {method} / its selection + evaluation: {statistics.median(shares):.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--amounts", type=int, default=8)
    parser.add_argument("--own-caches", action="store_true", help="run the commands with a cache each, too")
    parser.add_argument("overrides", nargs="*", default=["measure=quality_only"], help="of every command")
    asked = parser.parse_args()
    amounts = ALL_AMOUNTS[: asked.amounts]
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        text = place / "text only"
        run(place, text, "method=wanda", *asked.overrides)  # warm-up: tokenises, fills the page cache
        for kind in text.iterdir():
            if kind.name != "tokens":
                shutil.rmtree(kind)

        def cache(name: str) -> Path:
            return Path(shutil.copytree(text, place / name))

        of_all = [*asked.overrides, "dataset.calibration.propagate=dense"]
        grid = [f"method={','.join(METHODS)}", f"amount={','.join(map(str, amounts))}", "hydra.sweep.dir=swept"]
        swept = run(place, cache("swept cache"), *of_all, *grid, "-m")
        print(f"one sweep of {len(METHODS) * len(amounts)} jobs: {swept[0]:.1f} s, {swept[1]:.1f} s of processor time")
        further_amounts(place / "swept", len(amounts))
        shared, alone = cache("shared cache"), []
        with_own: list[Cost] = []
        for method in METHODS:
            for amount in amounts:
                job = [*of_all, f"method={method}", f"amount={amount}"]
                alone.append(run(place, shared, *job))
                if asked.own_caches:
                    with_own.append(run(place, cache(f"{method} {amount}"), *job))
        print(f"separate commands with one cache: {total(alone)[0]:.1f} s, {total(alone)[1]:.1f} s of processor time")
        ratio("sweep / separate commands with one cache", swept, total(alone))
        if with_own:
            print(f"with a cache each: {total(with_own)[0]:.1f} s, {total(with_own)[1]:.1f} s of processor time")
            ratio("sweep / separate commands with a cache each", swept, total(with_own))


if __name__ == "__main__":
    main()
