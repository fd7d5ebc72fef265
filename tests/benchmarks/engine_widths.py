"""Widths of an MLP in llama.cpp: as they come, multiples of 32 and of 256, and the dense one, by type of the file.

    python tests/benchmarks/engine_widths.py MODEL FOLDER [--types q8_0,f16] [--rounds 10] [--prompt 64] [--no-repack]

MODEL is a folder or a GGUF file. Files are written into FOLDER (those of SmolLM2-135M take 4 GB) and used again. The
four models of a type lie in one process and take turns in another order each round; as many threads as PyTorch has.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import psutil
import torch

from prune_lab.export.gguf import FILE, TYPES, Gguf
from prune_lab.measure import llama_cpp
from prune_lab.measure.speed import Paired
from prune_lab.methods.structured import Structured
from prune_lab.models.anatomy import Anatomy
from prune_lab.models.load import HubModel, Loaded
from prune_lab.system.device import Device

ROUNDED = {"dense": None, "as it comes": 1, "round_to=32": 32, "round_to=256": 256}
STEPS = 8


def made(model: str, amount: float, round_to: int | None) -> Loaded:
    """The model in float32, without so many channels, the smallest by their norm."""
    loaded = HubModel(name=model).load(Device(torch.device("cpu"), torch.float32), seed=0)
    if round_to is not None:
        method = Structured(amount=amount, score="l2", refit="none", round_to=round_to)
        method.prune(Anatomy(loaded.model), amount, 0)
    return loaded


def write(model: str, amount: float, folder: Path, kinds: list[str]) -> None:
    """Writes the files that are not there."""
    for number, round_to in enumerate(ROUNDED.values()):
        missing = [kind for kind in kinds if not (folder / f"{number}-{kind}" / FILE).exists()]
        loaded = made(model, amount, round_to) if missing else None
        for kind in missing:
            (folder / f"{number}-{kind}").mkdir(parents=True, exist_ok=True)
            Gguf(type=kind).write(loaded, folder / f"{number}-{kind}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--amount", type=float, default=0.26)
    parser.add_argument("--types", default=",".join(TYPES))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--no-repack", action="store_true")
    asked = parser.parse_args()
    kinds = asked.types.split(",")
    write(asked.model, asked.amount, asked.folder, kinds)
    ids = torch.randint(1, 1000, (asked.prompt,), generator=torch.Generator().manual_seed(0)).tolist()
    for kind in kinds:
        files = [asked.folder / f"{number}-{kind}" / FILE for number in range(len(ROUNDED))]
        times: list[list[tuple[float, float]]] = [[] for _ in files]
        before = psutil.getloadavg()[0]
        with llama_cpp.loaded(files, len(ids) + STEPS, exact=False, repack=not asked.no_repack) as llama:
            for turn in range(asked.rounds + 1):  # the first one warms up
                places = [(turn + place) % len(files) for place in range(len(files))]
                for model in places[:: -1 if turn % 2 else 1]:
                    reply = llama.ask(model, "timed", ids=ids, tokens=STEPS)
                    times[model] += [(reply["prefill_ms"], reply["decode_ms"])] if turn else []
        taken = torch.tensor(times, dtype=torch.float64)  # model, round, stage
        for model, name in enumerate(ROUNDED):
            cells = [kind, name, f"{files[model].stat().st_size / 1e6:.1f} MB"]
            for stage, what in enumerate(("prefill", "decode")):
                pair = Paired(taken[0, :, stage], taken[model, :, stage])
                low, high = pair.interval()
                ms = float(taken[model, :, stage].quantile(0.5))
                cells.append(f"{what} {ms:.1f} ms, {pair.speedup:.2f} [{low:.2f}, {high:.2f}]")
            print(" | ".join(cells), flush=True)
        print(f"load {before:.1f}, then {psutil.getloadavg()[0]:.1f}", flush=True)


if __name__ == "__main__":
    main()
