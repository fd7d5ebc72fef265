"""The cost of refits: of columns beside the calibrated method without one, of rows beside SparseGPT's solver.

python tests/benchmarks/refits.py [MODEL]        MODEL: a folder in the Hub's layout or a GGUF file; without one, four
                                                 random blocks of the shape of SmolLM2-135M

Random tokens, 8 windows of 1024, behind pruned blocks, bfloat16 where the processor multiplies it natively.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from prune_lab.methods.structured import Structured
from prune_lab.models.anatomy import Anatomy
from prune_lab.models.load import HubModel
from prune_lab.pruning.calibration import Calibrator
from prune_lab.pruning.refit import refit_rows
from prune_lab.pruning.sparsegpt_solver import solve
from prune_lab.system.device import Device, uses_bfloat16

WINDOWS, SEQ_LEN, REPEATS = 8, 1024, 5


def model_of(name: str | None) -> Any:
    dtype = torch.bfloat16 if uses_bfloat16("auto", torch.device("cpu")) else torch.float32
    if name is not None:
        return HubModel(name=name).load(Device(torch.device("cpu"), dtype), seed=0).model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=4, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49152, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(dtype).eval().requires_grad_(False)


def ratios(name: str, plain: Callable[[], Any], other: Callable[[], Any]) -> None:
    """Prints the seconds of both, taken in turns, and the median of their ratio with its range."""
    pairs = []
    for _ in range(REPEATS + 1):  # the first warms up
        taken = []
        for call in (plain, other):
            began = time.perf_counter()
            call()
            taken.append(time.perf_counter() - began)
        pairs.append(taken)
    found = [b / a for a, b in pairs[1:]]
    seconds = [statistics.median(side) for side in zip(*pairs[1:], strict=True)]
    print(
        f"{name}: {seconds[1]:.3f} s beside {seconds[0]:.3f} s, x{statistics.median(found):.3f} "
        f"[{min(found):.3f}, {max(found):.3f}]"
    )


def main(name: str | None) -> None:
    """Prints a line for each refit."""
    model = model_of(name)
    windows = torch.randint(
        model.config.vocab_size, (WINDOWS, SEQ_LEN), generator=torch.Generator().manual_seed(0)
    )  # fmt: skip
    print(f"threads {torch.get_num_threads()}, torch {torch.__version__}, {model.dtype}")

    def prune(**keys: Any) -> Callable[[], Any]:
        def run() -> None:
            Structured(**{"score": "wanda", **keys}).prune(
                Anatomy(copy.deepcopy(model)), 0.4, 0, Calibrator(windows, "pruned", 4)
            )

        return run

    for refit in ("inputs", "residual"):
        ratios(f"channels by Wanda, refit={refit} / none", prune(), prune(refit=refit))
    ratios("channels by obs, refit=inputs / by Wanda, none", prune(), prune(score="obs", refit="inputs"))
    for rows, columns in ((576, 576), (1536, 576), (576, 1536)):
        generator = torch.Generator().manual_seed(1)
        weight = torch.randn(rows, columns, generator=generator)
        inputs = torch.randn(4 * columns, columns, generator=generator)
        gram = inputs.T @ inputs
        keep = torch.rand(rows, columns, generator=generator) > 0.5
        ratios(
            f"rows of {rows} x {columns}, refit / SparseGPT's solver",
            lambda weight=weight, gram=gram: solve(weight, gram, 0.5),
            lambda weight=weight, gram=gram, keep=keep: refit_rows(weight, weight * keep, gram, keep),
        )


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
