"""How fast the command line answers: beside a bare Hydra application, and beside the imports a run cannot do without.

python tests/benchmarks/startup.py [REPEATS]

Times are process time (user + system) of whole processes, medians of interleaved repeats: what others do on the machine
counts for little. The bare application has one option in one group. A finished run is resumed beside a process that
imports the same modules and nothing else.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[2]
BARE = """\
import hydra
@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg): pass
main()
"""
# Runs the command line, then writes down what it had imported.
NOTED = """\
import atexit, pathlib, runpy, sys
atexit.register(lambda: pathlib.Path("modules").write_text("\\n".join(sys.modules)))
runpy.run_module("prune_lab", run_name="__main__", alter_sys=True)
"""
IMPORTS = """\
import contextlib, importlib, pathlib, warnings
warnings.simplefilter("ignore")
for name in pathlib.Path("modules").read_text().splitlines():
    with contextlib.suppress(Exception):
        importlib.import_module(name)
"""
RUN = ["method=magnitude", "measure=quality_only", "measure.max_windows=4", "quiet=true"]


def make_bare_application(folder: Path) -> Path:
    """Its script, beside its configuration."""
    (folder / "conf" / "group").mkdir(parents=True)
    (folder / "conf" / "config.yaml").write_text("defaults:\n  - group: option\n  - _self_\nkey: 0.5\n")
    (folder / "conf" / "group" / "option.yaml").write_text("value: 1\n")
    (folder / "bare.py").write_text(BARE)
    return folder / "bare.py"


def seconds(place: Path, words: list[str], code: int = 0) -> tuple[float, float]:
    """Process time and wall time of a Python process."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PRUNE_LAB_CACHE": str(place / "cache")}
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [sys.executable, *words], cwd=place, env=environment, capture_output=True, text=True, check=False
    )
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != code:
        raise SystemExit(f"{words} ended with {done.returncode}: {done.stderr[-2000:]}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


def main(repeats: int) -> None:
    """Prints the table."""
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        bare, ours = [str(make_bare_application(place))], ["-m", "prune_lab"]
        (place / "noted.py").write_text(NOTED)
        (place / "imports.py").write_text(IMPORTS)
        refused = [*ours, "method=sparsegpt", "method.allocation=global"]
        cases: dict[str, Callable[[], tuple[float, float]]] = {
            "bare --help": lambda: seconds(place, [*bare, "--help"]),
            "--help": lambda: seconds(place, [*ours, "--help"]),
            "bare --cfg job": lambda: seconds(place, [*bare, "--cfg", "job"]),
            "--cfg job": lambda: seconds(place, [*ours, "--cfg", "job"]),
            "import torch": lambda: seconds(place, ["-c", "import torch"]),
            "refused root key": lambda: seconds(place, [*ours, "amount=2"], code=2),
            "refused method": lambda: seconds(place, refused, code=2),
            "imports of a resumed run": lambda: seconds(place, ["imports.py"]),
            "resumed run": lambda: seconds(place, ["noted.py", *RUN]),
        }
        seconds(place, ["noted.py", *RUN])  # the run that is resumed
        seconds(place, ["noted.py", *RUN])  # what it imports when it is
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
        for _ in range(repeats):
            for name, measure in cases.items():
                taken[name].append(measure())
    cpu = {name: median(one for one, _ in found) for name, found in taken.items()}
    print("| command | process time | wall time | beside | target |\n|---|---|---|---|---|")

    def line(name: str, beside: str, target: str) -> None:
        wall = median(one for _, one in taken[name])
        print(f"| {name} | {cpu[name]:.2f} s | {wall:.2f} s | {beside} | {target} |")

    def ratio(name: str, to: str) -> float:
        return median(a / b for (a, _), (b, _) in zip(taken[name], taken[to], strict=True))

    for flag in ("--help", "--cfg job"):
        line(f"bare {flag}", "", "")
        line(flag, f"{ratio(flag, f'bare {flag}'):.2f} x the bare application", "1.3 x")
    line("import torch", "", "")
    for name in ("refused root key", "refused method"):
        line(name, f"{ratio(name, 'import torch'):.2f} x the import of torch", "3 s")
    imports = "imports of a resumed run"
    line(imports, "", "")
    beyond = median(a - b for (a, _), (b, _) in zip(taken["resumed run"], taken[imports], strict=True))
    line("resumed run", f"{beyond:.2f} s beyond its imports", "2 s")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
