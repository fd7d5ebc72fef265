"""Wanda and SparseGPT of a 63M Llama, calibration and pruning, beside the data flow of the published code.

python tests/benchmarks/calibration.py [--windows 128] [--repeats 3] [--methods wanda sparsegpt]

The reference takes one window at a time twice through each block, gathers a statistic for every Linear, orders all
scores by a full sort, and computes in float32 (the structure of the papers' code; SparseGPT's solver is the textbook
one of sparsegpt_solver.py). Ours does the same pruning behind pruned blocks, and, for the flow that needs one pass,
behind dense ones; in bfloat16 too where the processor multiplies it. Medians of interleaved repeats, by wall time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from sparsegpt_solver import textbook
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from prune_lab.methods.base import Method
from prune_lab.methods.sparsegpt import SparseGPT
from prune_lab.methods.wanda import Wanda
from prune_lab.models.anatomy import Anatomy
from prune_lab.models.blocks import BlockStream
from prune_lab.pruning.calibration import Calibrator
from prune_lab.system.device import native_bfloat16

AMOUNT, SEQ_LEN = 0.5, 256
METHODS: dict[str, Method] = {"wanda": Wanda(amount=AMOUNT), "sparsegpt": SparseGPT(amount=AMOUNT)}


def make_model() -> Any:
    """63M parameters, random: hidden 768, intermediate 2048, 8 blocks, 12 heads in 4 KV groups, vocabulary 8192."""
    config = LlamaConfig(
        vocab_size=8192, hidden_size=768, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=12,
        num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def reference(model: Any, windows: Tensor, name: str) -> None:
    """The published data flow, in place."""
    anatomy = Anatomy(model)
    stream = BlockStream(anatomy, windows, batch_size=1)
    for index, of_block in enumerate(anatomy.linears_by_block()):
        seen: dict[str, Tensor] = {}
        hooks = []
        for key, linear in of_block:

            def gather(_: Any, args: tuple[Tensor], key: str = key, seen: dict[str, Tensor] = seen) -> None:
                rows = args[0].reshape(-1, args[0].shape[-1]).float()
                found = rows.norm(p=2, dim=0) ** 2 if name == "wanda" else rows.T @ rows
                seen[key] = seen[key] + found if key in seen else found

            hooks.append(linear.register_forward_pre_hook(gather))
        for number in range(len(stream.states)):
            stream.output(index, number)
        for hook in hooks:
            hook.remove()
        for key, linear in of_block:
            weight = linear.weight
            if name == "sparsegpt":
                weight.copy_(textbook(weight, seen[key]))
                continue
            order = torch.sort(weight.abs() * seen[key].sqrt(), dim=-1, stable=True).indices
            weight.scatter_(1, order[:, : int(weight.shape[1] * AMOUNT)], 0)
        for number in range(len(stream.states)):
            stream.states[number] = stream.output(index, number)


def ours(propagate: str, bfloat16: bool = False) -> Callable[[Any, Tensor, str], None]:
    """Our pruning, in place."""

    def run(model: Any, windows: Tensor, name: str) -> None:
        calibrator = Calibrator(windows, propagate, bfloat16=bfloat16)
        METHODS[name].prune(Anatomy(model), AMOUNT, seed=0, calibrator=calibrator)

    return run


@torch.no_grad()
def forward(model: Any, windows: Tensor, name: str) -> None:
    """The floor of one pass: the blocks' bare forward, 16 windows at once."""
    for batch in windows.split(16):
        model.base_model(input_ids=batch, use_cache=False)


def main(windows: int, repeats: int, methods: list[str]) -> None:
    """Prints the table of each method."""
    model, text = make_model(), torch.randint(8192, (windows, SEQ_LEN), generator=torch.Generator().manual_seed(1))
    dense = {key: value.clone() for key, value in model.state_dict().items()}
    flows = {
        "bare forward, once": forward,
        "reference": reference,
        "ours": ours("pruned"),
        "ours, propagate=dense": ours("dense"),
    }
    if native_bfloat16(torch.device("cpu")):
        flows |= {"ours, bfloat16": ours("pruned", True), "ours, propagate=dense, bfloat16": ours("dense", True)}
    print(f"torch {torch.__version__}, threads: {torch.get_num_threads()}, {windows} x {SEQ_LEN} tokens", flush=True)
    for name in methods:
        seconds: dict[str, list[float]] = {flow: [] for flow in flows}
        kept: dict[str, dict[str, Tensor]] = {}
        for _ in range(repeats):
            for flow, run in flows.items():
                model.load_state_dict(dense)
                began = time.perf_counter()
                run(model, text, name)
                seconds[flow].append(time.perf_counter() - began)
                kept[flow] = {key: linear.weight != 0 for key, linear in Anatomy(model).linears()}
        print(f"\n| {name} | seconds | reference / it | places kept as the reference keeps |\n|---|---|---|---|")
        for flow, taken in seconds.items():
            ratio = median(a / b for a, b in zip(seconds["reference"], taken, strict=True))
            same = sum(int((kept[flow][key] == mask).sum()) for key, mask in kept["reference"].items())
            share = "" if flow.startswith("bare") else f"{same / sum(m.numel() for m in kept[flow].values()):.4%}"
            print(f"| {flow} | {median(taken):.1f} | {ratio:.2f} | {share} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    main(**vars(parser.parse_args()))
