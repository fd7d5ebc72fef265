"""Bytes and seconds of a pruning of a 70B model on 8 GPUs, on paper: nothing here is measured.

    python tests/benchmarks/on_paper.py     # the tables of docs/processes.md

Each line of the table names its formula. The rates are assumptions: shares of the peaks that the maker of the GPU
states.
"""

from __future__ import annotations

from dataclasses import dataclass

PROCESSES = 8
WINDOWS, LENGTH = 128, 2048
TOKENS = WINDOWS * LENGTH
BFLOAT16, FLOAT32, FLOAT64 = 2, 4, 8  # bytes

# Llama 3.1 70B, from its config.json.
D, F, BLOCKS, KV, VOCABULARY = 8192, 28672, 80, 1024, 128256
BLOCK = 2 * D * D + 2 * KV * D + 3 * F * D  # weights of q and o, of k and v, and of the MLP
WEIGHTS = BLOCKS * BLOCK + 2 * VOCABULARY * D

# One GPU with the peaks of an H100 SXM, and how much of them is taken to be had.
TENSOR = 0.5 * 989e12  # operations a second in bfloat16, added up in float32
PLAIN = 0.5 * 67e12  # in float32, in which the solves are
LINK = 0.8 * 450e9  # bytes a second and direction over NVLink
LATENCY = 50e-6  # seconds of a reduction of hardly any bytes
DISK = 5e9  # bytes a second
ALL_REDUCE = 2 * (PROCESSES - 1) / PROCESSES  # bytes that a GPU sends for each that is reduced, in a ring

FORWARD = TOKENS * BLOCKS * (2 * BLOCK + 4 * D * LENGTH / 2)  # products with weights, and causal attention
HEAD = TOKENS * 2 * D * VOCABULARY
GRAM = 3 * D * D + F * F  # numbers of the gram matrices of a block: of what q, k and v read, o, gate and up, and down
GRAMS = TOKENS * BLOCKS * GRAM  # two operations a number, of half of the numbers
FACTORS = (6 * D**3 + F**3) / 3  # Cholesky, of each of the seven Linears
UPDATES = D * D * (2 * D + 2 * KV + 2 * F) + D * F * F  # out x in^2 of each Linear
SOLVES = BLOCKS * (FACTORS + UPDATES)
OF_DOWN = (F**3 / 3 + D * F * F) / (FACTORS + UPDATES)  # share of the largest Linear


@dataclass(frozen=True)
class Stage:
    """One line: bytes of a process, and seconds with all processes and with one."""

    name: str
    formula: str
    size: float
    several: float
    alone: float

    def line(self) -> str:
        """The line in Markdown."""
        return f"| {self.name} | {self.formula} | {_bytes(self.size)} | {_s(self.several)} | {_s(self.alone)} |"


def _bytes(size: float) -> str:
    unit, name = next((u, n) for u, n in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if size >= u)
    return f"{size / unit:.3g} {name}"


def _s(seconds: float) -> str:
    return "0" if seconds == 0 else f"{seconds:.2g}" if seconds < 10 else f"{seconds:.0f}"


def _reduced(size: float, reductions: int = 0) -> float:
    """Seconds of reductions of so many bytes."""
    return ALL_REDUCE * size / LINK + reductions * LATENCY


KEPT = BFLOAT16 * LENGTH * BLOCKS * (6 * D + 2 * KV + 4 * F)  # of a window, for its backward pass
STATES = TOKENS * D * BFLOAT16
NORMS = BLOCKS * (3 * D + F) * FLOAT32
STAGES = (
    Stage("weights are read", "2 bytes x weights, by every process from one disk", 2 * WEIGHTS, 2 * WEIGHTS / DISK,
          2 * WEIGHTS / DISK),
    Stage("dense and pruned model on each GPU", "2 x 2 bytes x weights", 4 * WEIGHTS, 0, 0),
    Stage("states of the windows", "2 bytes x tokens / 8 x hidden size", STATES / PROCESSES, 0, 0),
    Stage("calibration, two passes through each block", "2 x operations of a forward / 8", STATES / PROCESSES,
          2 * FORWARD / TENSOR / PROCESSES, 2 * FORWARD / TENSOR),
    Stage("Wanda: norms are added up", "4 bytes x inputs; 4 reductions a block", NORMS, _reduced(NORMS, 4 * BLOCKS), 0),
    Stage("SparseGPT: grams are summed", "2 x half of 3 d^2 + f^2 a token and block / 8", FLOAT32 * GRAM,
          GRAMS / TENSOR / PROCESSES, GRAMS / TENSOR),
    Stage("SparseGPT: grams are added up", "4 bytes x (3 d^2 + f^2) x 80 blocks", BLOCKS * FLOAT32 * GRAM,
          _reduced(BLOCKS * FLOAT32 * GRAM, 8 * BLOCKS), 0),
    Stage("SparseGPT: solves, in every process", "in^3 / 3 + out x in^2 of 7 Linears a block", 2 * FLOAT32 * F * F,
          SOLVES / PLAIN, SOLVES / PLAIN),
    Stage("Taylor: backward passes, a window at a time", "3 x operations of a forward / 8", KEPT,
          3 * (FORWARD + HEAD) / TENSOR / PROCESSES, 3 * (FORWARD + HEAD) / TENSOR),
    Stage("Taylor: sums over units are added up", "4 bytes x 3 x 28672 x 80 blocks", 3 * F * BLOCKS * FLOAT32,
          _reduced(3 * F * BLOCKS * FLOAT32, 3 * BLOCKS), 0),
    Stage("depth: cosines are put together", "4 bytes x tokens x 80 blocks", TOKENS * FLOAT32 * BLOCKS,
          _reduced(TOKENS * FLOAT32 * BLOCKS, 2 * BLOCKS), 0),
    Stage("perplexity beside the dense model", "2 x operations of a forward and the head / 8", STATES / PROCESSES,
          2 * (FORWARD + HEAD) / TENSOR / PROCESSES, 2 * (FORWARD + HEAD) / TENSOR),
    Stage("losses and divergences are put together", "(4 + 16 bytes) x tokens", TOKENS * (FLOAT32 + 2 * FLOAT64),
          _reduced(TOKENS * (FLOAT32 + 2 * FLOAT64), 4), 0),
)  # fmt: skip


def total(*names: str) -> tuple[float, float]:
    """Seconds of the stages whose names begin so, with all processes and with one."""
    stages = [stage for stage in STAGES if stage.name.startswith(names)]
    return sum(stage.several for stage in stages), sum(stage.alone for stage in stages)


def table() -> str:
    """The table, and what follows from it."""
    lines = ["| stage | formula | bytes of a process | s, 8 GPUs | s, 1 GPU |", "|---|---|---|---|---|"]
    (wanda, alone), (sparsegpt, by_one) = total("calibration", "Wanda"), total("calibration", "SparseGPT")
    share = total("SparseGPT: solves")[0] / sparsegpt
    said = (
        f"Wanda's pruning takes {_s(wanda)} s in place of {_s(alone)} s ({alone / wanda:.1f} times as fast),",
        f"SparseGPT's {_s(sparsegpt)} s in place of {_s(by_one)} s ({by_one / sparsegpt:.1f} times): the solves, which",
        f"every process does, are then {100 * share:.0f} % of it. To share them out by Linears would make them",
        f"at most {1 / OF_DOWN:.1f} times as fast, since `down_proj` alone is {100 * OF_DOWN:.0f} % of them.",
    )
    return "\n".join([*lines, *(stage.line() for stage in STAGES), "", *said])


if __name__ == "__main__":
    print(table())
