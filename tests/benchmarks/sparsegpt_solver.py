"""SparseGPT's solver against the textbook loop, on one 2048 x 2048 layer.

python tests/benchmarks/sparsegpt_solver.py

The textbook (the structure of the paper's code): two Cholesky factors and an inverse, a full sort for each window's
threshold, an update of the whole window after each column, an update of all later columns after each window.
"""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor

from prune_lab.pruning.sparsegpt_solver import solve

SIZE, TOKENS, WINDOW, AMOUNT, REPEATS = 2048, 4096, 128, 0.5, 7


def textbook(weight: Tensor, gram: Tensor) -> Tensor:
    """Column by column, as published; returns the pruned weight."""
    weight, gram = weight.clone(), gram.clone()
    gram.diagonal().add_(0.01 * gram.diagonal().mean())
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(gram)), upper=True)
    for first in range(0, len(gram), WINDOW):
        last = first + WINDOW
        block, factor = weight[:, first:last].clone(), inverse[first:last, first:last]
        pruned, errors = torch.zeros_like(block), torch.zeros_like(block)
        scores = block**2 / factor.diagonal()[None] ** 2
        threshold = scores.flatten().sort().values[int(scores.numel() * AMOUNT) - 1]
        gone = scores <= threshold
        for column in range(WINDOW):
            value, scale = block[:, column], factor[column, column]
            kept = value.clone()
            kept[gone[:, column]] = 0
            pruned[:, column] = kept
            error = (value - kept) / scale
            block[:, column:] -= error[:, None].matmul(factor[column, column:][None])
            errors[:, column] = error
        weight[:, first:last] = pruned
        weight[:, last:] -= errors.matmul(inverse[first:last, last:])
    return weight


def main() -> None:
    """Prints both losses, their difference, and the ratio of times."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(SIZE, SIZE, generator=generator)
    mixed = torch.eye(SIZE) + torch.randn(SIZE, SIZE, generator=generator) / SIZE**0.5  # correlated inputs
    inputs = torch.randn(TOKENS, SIZE, generator=generator) @ mixed
    gram = inputs.T @ inputs

    def loss(pruned: Tensor) -> float:
        change = (weight - pruned).double()
        return float(((change @ gram.double()) * change).sum())

    theirs, ours = loss(textbook(weight, gram)), loss(solve(weight, gram, AMOUNT).weight)
    seconds: dict[str, list[float]] = {"textbook": [], "ours": []}
    for _ in range(REPEATS):
        for name in seconds:
            began = time.perf_counter()
            textbook(weight, gram) if name == "textbook" else solve(weight, gram, AMOUNT)
            seconds[name].append(time.perf_counter() - began)
    ratios = [a / b for a, b in zip(seconds["textbook"], seconds["ours"], strict=True)]
    print(f"threads {torch.get_num_threads()}, torch {torch.__version__}")
    print(f"loss: textbook {theirs:.6g}, ours {ours:.6g}, relative difference {abs(ours / theirs - 1):.1e}")
    for name, taken in seconds.items():
        print(f"{name}: {statistics.median(taken):.3f} s, median of {REPEATS} interleaved")
    print(f"textbook / ours: {statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]")


if __name__ == "__main__":
    main()
