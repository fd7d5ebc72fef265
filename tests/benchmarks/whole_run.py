"""A whole run from the command line beside its floor: bare forward passes of the same tokens, one load and one save.

python tests/benchmarks/whole_run.py MODEL CALIBRATION TEST [REPEATS]

MODEL: a folder in the Hub's layout or a GGUF file. CALIBRATION and TEST: files of text (.txt, .jsonl). Wanda at 0.5
from 16 windows of 1024 tokens, measured on 8, in bfloat16: the first run on a model, with an empty cache, and a further
one. The floor is a script of stock transformers in a fresh process: it imports, loads, has the calibration text pass
once or twice (behind pruned blocks a block passes it twice: to be observed, and to give the next block its inputs), the
test text once for each model that is measured, with the head, and saves. Wall time; the peak is what a process held at
most beyond one that has imported the same and loaded nothing.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

SEQ_LEN, CALIBRATED, MEASURED, BATCH = 1024, 16, 8, 8

FLOOR = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, text, out, calibrated, measured = *sys.argv[1:4], *map(int, sys.argv[4:])
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
tokens = AutoTokenizer.from_pretrained(folder)(open(text, encoding="utf-8").read()[: 2**19], return_tensors="pt")
windows = tokens.input_ids[0][: 8 * 1024].view(8, 1024)
with torch.no_grad():
    for number in range(calibrated + measured):  # each of 8 windows
        states = model.base_model(input_ids=windows, use_cache=False).last_hidden_state
        for part in states.flatten(0, 1).split(128) if number >= calibrated else ():
            model.get_output_embeddings()(part).float().logsumexp(-1)
model.save_pretrained(out)
"""

IMPORTS = "import mlflow, datasets, transformers, prune_lab.runner, prune_lab.job"


@dataclass(frozen=True)
class Cost:
    """Seconds by the clock, and the peak of memory in bytes."""

    seconds: float
    peak: int


def run(command: list[str], place: Path, cache: Path) -> Cost:
    """Cost of a command in a fresh process, which must succeed."""
    began, environment = time.perf_counter(), {**os.environ, "PRUNE_LAB_CACHE": str(cache)}
    process = subprocess.Popen(command, cwd=place, env=environment, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} ended with {os.waitstatus_to_exitcode(status)}")
    return Cost(time.perf_counter() - began, used.ru_maxrss * 1024)


def line(name: str, costs: list[Cost], floors: dict[str, list[Cost]], idle: int, size: int) -> str:
    """A row of the table: medians, ratios to each floor taken beside it, and the peak in models."""
    cells = [name, f"{statistics.median(cost.seconds for cost in costs):.1f}"]
    for beside in floors.values():
        ratios = [mine.seconds / its.seconds for mine, its in zip(costs, beside, strict=True)]
        seconds = statistics.median(cost.seconds for cost in beside)
        cells.append(f"{seconds:.1f}: {statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]")
    cells.append(f"{max(cost.peak - idle for cost in costs) / size:.2f}")
    return f"| {' | '.join(cells)} |"


def main(model: str, calibration: str, test: str, repeats: int) -> None:
    """Prints the table."""
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        (place / "none.txt").write_text("Nothing is trained.")
        texts = [f"dataset.path={place / 'none.txt'}", f"dataset.test_path={Path(test).resolve()}"]
        seen = [f"{name}={value}" for name, value in (("n_samples", CALIBRATED), ("source", "text"))]
        seen = [f"dataset.calibration.{part}" for part in [*seen, f"name={Path(calibration).resolve()}"]]
        common = [
            *(sys.executable, "-m", "prune_lab", "model=hf", "dataset=text", "dtype=bfloat16", "tracking=none"),
            *(f"dataset.seq_len={SEQ_LEN}", *texts, *seen, "measure=quality_only", f"measure.batch_size={BATCH}"),
            *(f"measure.max_windows={MEASURED}", "quiet=true", "resume=false", f"hydra.run.dir={place / 'run'}"),
        ]
        named = f"model.name={Path(model).resolve()}"
        run([*common, named, "method=none", "export=hf"], place, place / "other cache")
        folder = shutil.move(place / "run" / "export", place / "model")
        ours = [*common, f"model.name={folder}", "method=wanda"]
        idle = run([sys.executable, "-c", IMPORTS], place, place / "no cache").peak
        size = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
        names = ("first run", "further run")
        costs: dict[str, list[Cost]] = {name: [] for name in names}
        floors: dict[str, dict[str, list[Cost]]] = {name: {"twice": [], "once": []} for name in names}
        for number in range(repeats + 1):  # the first one warms up
            cache = place / f"cache {number}"
            for name, amount, models in (("first run", 0.5, 2), ("further run", 0.45, 1)):
                cost = run([*ours, f"amount={amount}"], place, cache)
                for passes, of in ((2, "twice"), (1, "once")):
                    counts = [passes * CALIBRATED // BATCH, models * MEASURED // BATCH]
                    files = [str(folder), str(Path(test).resolve()), str(place / "saved")]
                    beside = run([sys.executable, "-c", FLOOR, *files, *map(str, counts)], place, cache)
                    if number:
                        floors[name][of].append(beside)
                if number:
                    costs[name].append(cost)
        print(
            f"model {size / 1e6:.0f} MB; process before loading {idle / 1e6:.0f} MB; {repeats} repeats after a warm-up"
        )
        print("| | seconds | floor, calibration text twice: run / floor | once: run / floor | peak / model |")
        print("|---|---|---|---|---|")
        for name in names:
            print(line(name, costs[name], floors[name], idle, size))


if __name__ == "__main__":
    main(*sys.argv[1:4], int(sys.argv[4]) if len(sys.argv) > 4 else 3)
