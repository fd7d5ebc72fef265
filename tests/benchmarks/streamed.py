"""Peak memory of pruning and evaluating a model block by block from disk, beside the same in memory.

The model has random bfloat16 weights and is written tensor by tensor: it is never in memory as a whole. Each run is a
fresh process: its peak is the one that Linux keeps (VmHWM), plus what its children hold, looked at ten times a second.

    python tests/benchmarks/streamed.py --place FOLDER_ON_A_DISK [--blocks 16] [--tokens 256] [--windows 8] [--memory]
    python tests/benchmarks/streamed.py --place FOLDER_ON_A_DISK --experts 8 --blocks 8 --methods experts
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from prune_lab.models.load import TINY
from prune_lab.models.offload.stored import as_saved, stored_tensors
from prune_lab.models.shards import lay_out

MB = 1e6


def make_model(folder: Path, blocks: int, experts: int) -> None:
    """A bfloat16 model in the Hub's layout, with the shipped tokenizer.

    Without experts a Llama of hidden 2048: 1.1B parameters in 16 blocks. Else a Mixtral of hidden 1024 whose experts
    have 50 MB each.
    """
    sizes: dict[str, Any] = {"hidden_size": 2048, "num_attention_heads": 32}
    if experts:
        sizes = {"hidden_size": 1024, "num_attention_heads": 16, "num_local_experts": experts}
    config = (MixtralConfig if experts else LlamaConfig)(
        vocab_size=32_000, intermediate_size=8192, num_hidden_layers=blocks, num_key_value_heads=8,
        max_position_embeddings=2048, tie_word_embeddings=False, dtype="bfloat16",
        architectures=["MixtralForCausalLM" if experts else "LlamaForCausalLM"], **sizes,
    )  # fmt: skip
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, folder)
    with torch.device("meta"):
        model = (MixtralForCausalLM if experts else LlamaForCausalLM)(config).bfloat16()
        tensors = as_saved(model, {name: tensor.detach() for name, tensor in stored_tensors(model).items()})
    shards, generator = lay_out(folder, tensors), torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        is_norm = tensor.dim() == 1
        drawn = torch.ones(tensor.shape) if is_norm else torch.randn(tensor.shape, generator=generator) * 0.02
        shards.write(name, drawn.bfloat16())


def run(place: Path, name: str, model: Path, options: list[str]) -> tuple[float, float]:
    """Peak megabytes and seconds of a run of the command line, whose files are left in place/name."""
    shutil.rmtree(place / name, ignore_errors=True)
    command = [
        sys.executable, "-m", "prune_lab", "model=hf", f"model.name={model}", "dtype=bfloat16", "device=cpu",
        "measure=quality_only", "tracking=none", "export=hf", "resume=false", f"hydra.run.dir={place / name}",
        *options,
    ]  # fmt: skip
    began, peak = time.perf_counter(), 0
    process = psutil.Popen(command, cwd=place, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        peak = max(peak, resident(process))
        time.sleep(0.1)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    return peak / MB, time.perf_counter() - began


def resident(process: psutil.Process) -> int:
    """Bytes of a process at its peak so far, and of its children now."""
    with suppress(psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError, StopIteration):
        status = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        own = int(next(line for line in status if line.startswith("VmHWM")).split()[1]) * 1024
        return own + sum(child.memory_info().rss for child in process.children(recursive=True))
    return 0


def report(place: Path, name: str, peak: float, seconds: float) -> None:
    """One line of a run."""
    metrics = json.loads((place / name / "summary.json").read_text())["metrics"]
    times = ", ".join(f"{stage} {metrics[f'time/{stage}_s']:.0f} s" for stage in ("prune", "measure"))
    print(
        f"{name:28} peak {peak:6.0f} MB   {seconds:5.0f} s in all, {times}   "
        f"perplexity {metrics['quality/dense_perplexity']:.6g} -> {metrics['quality/perplexity']:.6g}",
        flush=True,
    )


def are_alike(place: Path, one: str, other: str) -> bool:
    """Whether two runs have the same metrics, times aside, and the same weights byte for byte."""
    metrics = [json.loads((place / name / "summary.json").read_text())["metrics"] for name in (one, other)]
    here, there = ({key: value for key, value in of.items() if not key.startswith("time/")} for of in metrics)
    files = sorted(path.name for path in (place / one / "export").glob("model*"))
    same = all(filecmp.cmp(place / one / "export" / name, place / other / "export" / name, False) for name in files)
    return here == there and bool(files) and same


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--place", type=Path, required=True, help="a folder on a disk, not on a memory file system")
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--experts", type=int, default=0, help="of each block; a mixture then")
    parser.add_argument("--tokens", type=int, default=256, help="of a window")
    parser.add_argument("--windows", type=int, default=8, help="to evaluate on; twice as many to calibrate on")
    parser.add_argument("--methods", nargs="+", default=["magnitude", "wanda"])
    parser.add_argument("--memory", action="store_true", help="run in memory too, and compare")
    asked = parser.parse_args()
    place = asked.place.resolve()
    os.environ.setdefault("PRUNE_LAB_CACHE", str(place / "cache"))
    model = place / (f"mixtral-{asked.blocks}-{asked.experts}" if asked.experts else f"llama-{asked.blocks}")
    if not model.exists():
        make_model(model, asked.blocks, asked.experts)
    on_disk = sum(path.stat().st_size for path in model.glob("*.safetensors")) / MB
    print(
        f"{asked.blocks} blocks, {on_disk:.0f} MB on disk, windows of {asked.tokens} tokens: {asked.windows}",
        flush=True,
    )
    for method in asked.methods:
        options = [
            f"method={method}", f"dataset.seq_len={asked.tokens}", f"measure.max_windows={asked.windows}",
            f"dataset.calibration.n_samples={2 * asked.windows}",
        ]  # fmt: skip
        names = [f"{method} streamed"] + [f"{method} in memory"] * asked.memory
        for name in names:
            report(place, name, *run(place, name, model, [*options, f"model.stream={'streamed' in name}".lower()]))
        if asked.memory:
            print(
                f"{method}: {'identical' if are_alike(place, *names) else 'DIFFERENT'} metrics and weights", flush=True
            )
