"""Work on a GPU that is done again and again: captured as a CUDA graph, one call starts all of its kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def captured(work: Callable[[], T]) -> tuple[T, Callable[[], None]]:
    """Result of `work`, and a function that repeats it, on the current GPU.

    It must be the same kernels on the same tensors each time: those that it reads are written to before it is done
    again, those that it gave hold the new result after it. Nothing is computed before that is asked for the first time.
    It must not wait for the GPU, and have been done before in the usual way: libraries prepare themselves at first use.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may be bringing the next block
        result = work()
    return result, graph.replay
