"""Pruning and running models of 1B and 8B parameters on a GPU, each stage beside what the device could do at best.

    python tests/benchmarks/gpu.py [--shapes 1b 8b] [--budget 570] [--stream FOLDER_ON_A_DISK]
    python tests/benchmarks/gpu.py --shapes tiny --device cpu     the same code without a GPU; its times mean little

The shapes are Llama 3's, with grouped queries. Weights are random, bfloat16, and made on the device: they are on no
disk and in no other memory. Text is random too. Amounts are 0.5; structured takes MLP channels; 2:4 kernels are
searched. Latency is taken twice, as stock software runs and replayed (measure.accelerate=cuda_graphs). A stage's
floor is counted from the shapes (floors.py) at the rates that are measured first; that of tf32 is in none. A stage
that is expected to end more than --budget seconds after the start is skipped: expected is its floor times what the
stage took in the shape before, or 30 times. Peaks are the allocator's, with the dense model that the others are
copied from. --stream writes the first shape to a folder and streams it from there (model.stream=true). Exit code 1: a
stage failed.
"""

from __future__ import annotations

import argparse
import copy
import gc
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import floors
import torch
from floors import SIZE, Shape, Step
from stages import HEADER, Row, Stages
from transformers import AutoModelForCausalLM, LlamaConfig

from prune_lab.measure.perplexity import measure_losses, quality_of
from prune_lab.measure.settings import Measure
from prune_lab.measure.speed import Paired, measure_latency
from prune_lab.methods.base import Method
from prune_lab.methods.magnitude import Magnitude
from prune_lab.methods.sparsegpt import SparseGPT
from prune_lab.methods.structured import Structured
from prune_lab.methods.wanda import Wanda
from prune_lab.models.anatomy import Anatomy
from prune_lab.models.checkpoint import read_checkpoint
from prune_lab.models.offload import streamed
from prune_lab.models.offload.on_disk import own_copy
from prune_lab.post.sparse_2_4 import Sparse24
from prune_lab.pruning.calibration import Calibrator
from prune_lab.system.console import Console
from prune_lab.system.device import Device, resolve

SHAPES = {
    "tiny": Shape(128, 384, 2, 4, 2, 512, tied=True),
    "1b": Shape(2048, 8192, 16, 32, 8, 128_256, tied=True),
    "8b": Shape(4096, 14_336, 32, 32, 8, 128_256, tied=False),
}
AMOUNT, QUIET = 0.5, Console(quiet=True)


@dataclass(frozen=True)
class Load:
    """Windows of `seq_len` tokens to calibrate and to evaluate on, and what is timed."""

    seq_len: int
    calibration: int
    evaluation: int
    measure: Measure


LARGE = Load(2048, 32, 16, Measure(pairs=10, warmup=2, prompt_tokens=2048, decode_tokens=8))
SMALL = Load(64, 4, 4, Measure(pairs=10, warmup=1, prompt_tokens=16, decode_tokens=1))
# How models are timed on a GPU: as stock software runs them, and without the time that Python takes.
WAYS = {"": "none", ", replayed": "cuda_graphs"}


class Case:
    """The stages of one shape."""

    def __init__(self, stages: Stages, name: str, load: Load) -> None:
        self.stages, self.name, self.shape, self.load = stages, name, SHAPES[name], load
        shape, drawn = (load.calibration + load.evaluation, load.seq_len), torch.Generator().manual_seed(0)
        text = torch.randint(self.shape.vocabulary, shape, generator=drawn)
        self.calibration, self.evaluation = text[: load.calibration], text[load.calibration :]

    @torch.no_grad()
    def build(self) -> Any:
        """A model with random weights, the same each time, made where it is to be."""
        shape, device = self.shape, self.stages.device
        config = LlamaConfig(
            vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
            num_hidden_layers=shape.blocks, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
            max_position_embeddings=4096, tie_word_embeddings=shape.tied, bos_token_id=None, eos_token_id=0,
        )  # fmt: skip
        torch.manual_seed(0)
        with torch.device(device.torch_device):
            return AutoModelForCausalLM.from_config(config, dtype=device.dtype).eval().requires_grad_(False)

    def in_memory(self) -> None:
        """Every stage but the streamed ones."""
        shape, text = self.shape, (self.calibration.numel(), self.load.seq_len)
        dense: Any = self.stages.run(
            self.name, "build", floors.build(shape), self.build,
            lambda model: f"{sum(weight.numel() for weight in model.parameters()):,} parameters",
        )  # fmt: skip
        if dense is None:
            return
        self.evaluate("perplexity", floors.perplexity(shape, self.evaluation.numel(), self.load.seq_len), dense)
        narrow = replace(shape, intermediate=shape.intermediate // 2)
        model = self.prune("structured", Structured(), floors.structured(shape, narrow.intermediate), dense)
        if model is not None:
            self.time("structured", dense, model, narrow)
        model = None  # there is one copy at a time
        self.prune("magnitude", Magnitude(), floors.magnitude(shape), dense)
        model = self.prune("magnitude 2:4", Magnitude(pattern="2:4"), floors.magnitude(shape), dense)
        if model is not None and self.pack(model):
            self.time("2:4", dense, model, shape, sparse=True)
        model = None
        self.prune("wanda", Wanda(), floors.wanda(shape, *text), dense)
        self.prune("sparsegpt", SparseGPT(), floors.sparsegpt(shape, *text), dense)

    def streamed(self, place: Path) -> None:
        """Perplexity and Wanda of the model from a folder, which is written first."""
        shape, free = self.shape, shutil.disk_usage(place).free
        needed = 3 * SIZE * shape.parameters  # the model, its pruned copy, and some air
        if free < needed:
            note = f"skipped: {needed / 1e9:.1f} GB of disk needed, {free / 1e9:.1f} GB free"
            self.stages.add(Row(self.name, "streamed", note=note))
            return
        with tempfile.TemporaryDirectory(dir=place) as at:
            folder, model = Path(at) / "model", self.build()
            model.save_pretrained(folder)
            config, model = model.config, None
            checkpoint = read_checkpoint(folder, config, self.name)
            dense = streamed.build(folder, config, checkpoint, self.stages.device).eval()
            steps = floors.perplexity(shape, self.evaluation.numel(), self.load.seq_len)
            self.evaluate("perplexity, streamed", floors.streamed(shape, steps), dense)
            own = own_copy(dense, Path(at) / "own")
            steps = floors.wanda(shape, self.calibration.numel(), self.load.seq_len)
            self.prune_in_place("wanda, streamed", Wanda(), floors.streamed(shape, steps), own)

    def evaluate(self, stage: str, steps: Sequence[Step], model: Any) -> None:
        """Perplexity of a model."""
        text, batch_size, device = self.evaluation, self.load.measure.batch_size, self.stages.device
        self.stages.run(
            self.name, stage, steps, lambda: measure_losses(model, text, batch_size, device, QUIET),
            lambda losses: f"perplexity {quality_of(losses, 1.0).perplexity:.8g}",
        )  # fmt: skip

    def prune(self, stage: str, method: Method, steps: Sequence[Step], dense: Any) -> Any:
        """A pruned copy, or None."""
        floor = 2 * floors.seconds(floors.build(self.shape), self.stages.rates)
        copied = self.stages.attempt(self.name, f"{stage}: copy", floor, lambda: copy.deepcopy(dense))
        return None if copied is None else self.prune_in_place(stage, method, steps, copied.result)

    def prune_in_place(self, stage: str, method: Method, steps: Sequence[Step], model: Any) -> Any:
        """The model, or None where it was not pruned."""
        calibrator = Calibrator(self.calibration)
        pruned = self.stages.run(
            self.name, stage, steps, lambda: method.prune(Anatomy(model), AMOUNT, 0, calibrator),
            lambda pruned: f"{pruned.realized:.4f} removed",
        )  # fmt: skip
        return None if pruned is None else model

    def pack(self, model: Any) -> bool:
        """Puts a 2:4 model's Linears into the form that its kernels take, and says whether that went well."""
        post, device = Sparse24(kernel_search=True), self.stages.device

        def work() -> list[str]:
            post.check(device)
            return post.compress(Anatomy(model))

        return self.stages.run(self.name, "2:4 kernels", floors.pack_2_4(self.shape), work, "; ".join) is not None

    def time(self, what: str, dense: Any, other: Any, shape: Shape, sparse: bool = False) -> None:
        """Prefill and decode of a model of another shape, or of `sparse` Linears, beside the dense one."""
        settings = self.load.measure
        prompt = torch.randint(shape.vocabulary, (1, settings.prompt_tokens))
        steps = {
            "prefill": (floors.prefill(self.shape, prompt.numel()), floors.prefill(shape, prompt.numel(), sparse)),
            "decode": (floors.decode(self.shape), floors.decode(shape, sparse)),
        }
        least = {stage: [floors.seconds(one, self.stages.rates) for one in pair] for stage, pair in steps.items()}
        floor = sum(least["prefill"]) + settings.decode_tokens * sum(least["decode"])
        for way, accelerate in WAYS.items() if self.stages.device.is_cuda else [("", "none")]:
            keys = replace(settings, accelerate=accelerate)
            found = self.stages.attempt(
                self.name, f"latency, {what}{way}", floor * (settings.pairs + settings.warmup),
                lambda keys=keys: measure_latency(dense, other, prompt, keys, self.stages.device, QUIET),
            )  # fmt: skip
            if found is None:
                continue
            for stage, (of_dense, of_other) in least.items():
                pair: Paired = getattr(found.result, stage)
                low, high = pair.interval()
                note = f"{pair.speedup:.2f} [{low:.2f}, {high:.2f}] times as fast as dense"
                times = float(pair.dense.median()) / 1e3, float(pair.compressed.median()) / 1e3
                self.stages.add(Row(self.name, f"{stage}{way}, dense", times[0], of_dense, found.peak))
                self.stages.add(Row(self.name, f"{stage}{way}, {what}", times[1], of_other, found.peak, note))


def main(shapes: Sequence[str], device: str, budget: float, place: Path | None) -> list[Row]:
    """Prints and returns the table."""
    deadline, on = time.perf_counter() + budget, resolve(device, "bfloat16")
    if not on.is_cuda and set(shapes) != {"tiny"}:
        raise SystemExit("there is no GPU here: --shapes tiny runs the same code on a CPU")
    rates = floors.measure_rates(on)
    print(describe(on))
    print(rates, end="\n\n")
    if on.is_cuda:  # libraries and kernels are loaded when they are first needed
        Case(Stages(on, rates, deadline, shown=False), "tiny", SMALL).in_memory()
    stages, load = Stages(on, rates, deadline), LARGE if on.is_cuda else SMALL
    print(HEADER)
    for name in shapes:
        Case(stages, name, load).in_memory()
        if on.is_cuda:
            gc.collect()
            torch.cuda.empty_cache()
    if place is not None:
        Case(stages, shapes[0], load).streamed(place)
    return stages.rows


def describe(device: Device) -> str:
    """What was measured where and when."""
    return f"{device.name}, torch {torch.__version__}, CUDA {torch.version.cuda}, {date.today()}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--shapes", nargs="+", default=["1b", "8b"], choices=list(SHAPES))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--budget", type=float, default=570)
    parser.add_argument("--stream", dest="place", type=Path, metavar="FOLDER")
    sys.exit(any(row.note.startswith("failed") for row in main(**vars(parser.parse_args()))))
