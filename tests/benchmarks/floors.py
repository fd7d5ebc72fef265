"""What pruning and running a Llama take at least: bytes to move and operations to do, at rates measured on the spot.

Nothing here is about how it is done: what a stage needs is counted from the shapes, so that no implementation of the
same computation on the same device is faster. A multiply-add is two operations.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch.nn.functional import linear

from prune_lab.system.device import Device

SIZE = 2  # bytes of a bfloat16 weight
SPARSE = 9 / 16  # of a matrix, as 2:4: half of its values, and two bits of place for each
REPEATS = 10


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama with grouped-query attention, whose heads are together as wide as its hidden states."""

    hidden: int
    intermediate: int
    blocks: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """(out, in) of a block's Linears: query, key, value, output, gate, up, down."""
        h, m, kv = self.hidden, self.intermediate, self.hidden * self.kv_heads // self.heads
        return [(h, h), (kv, h), (kv, h), (h, h), (m, h), (m, h), (h, m)]

    @property
    def inputs(self) -> list[int]:
        """Widths of the distinct inputs: query, key and value share one, gate and up another."""
        return [self.hidden, self.hidden, self.hidden, self.intermediate]

    @property
    def of_block(self) -> int:
        """Weights of a block's Linears."""
        return sum(out * inputs for out, inputs in self.matrices)

    @property
    def head(self) -> int:
        """Weights of the output layer, or of the embeddings."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """All of them, norms included."""
        return self.blocks * (self.of_block + 2 * self.hidden) + self.hidden + self.head * (1 if self.tied else 2)


@dataclass(frozen=True)
class Rates:
    """Bytes a second that a device reads and writes, and takes from the host; operations a second of its products."""

    moved: float
    from_host: float
    bfloat16: float
    tf32: float
    float32: float

    def __str__(self) -> str:
        """On one line."""
        products = {"bfloat16": self.bfloat16, "tf32": self.tf32, "float32": self.float32}
        named = ", ".join(f"{name} {rate / 1e12:.3g}" for name, rate in products.items())
        return (
            f"memory {self.moved / 1e9:.3g} GB/s, from the host {self.from_host / 1e9:.3g} GB/s, "
            f"products in TFLOP/s: {named}"
        )


@dataclass(frozen=True)
class Step:
    """Bytes of device memory read and written, bytes from the host, operations of bfloat16 and of float32 products.

    Moving and multiplying may go on at once; one step begins when the step before it has ended.
    """

    moved: float = 0.0
    from_host: float = 0.0
    bfloat16: float = 0.0
    float32: float = 0.0

    def seconds(self, rates: Rates) -> float:
        """The least time that it takes."""
        products = self.bfloat16 / rates.bfloat16 + self.float32 / rates.float32
        return max(self.moved / rates.moved, self.from_host / rates.from_host, products)


def seconds(steps: Sequence[Step], rates: Rates) -> float:
    """The least time of steps one after the other."""
    return sum(step.seconds(rates) for step in steps)


def build(shape: Shape) -> list[Step]:
    """Every parameter is written."""
    return [Step(moved=SIZE * shape.parameters)]


def magnitude(shape: Shape) -> list[Step]:
    """Weights are read to be ranked, read again and written without those that go; a mask takes a byte a weight."""
    return [Step(moved=(3 * SIZE + 1) * shape.blocks * shape.of_block)]


def pack_2_4(shape: Shape) -> list[Step]:
    """Weights are read and written as 2:4."""
    return [Step(moved=SIZE * shape.blocks * shape.of_block * (1 + SPARSE))]


def wanda(shape: Shape, tokens: int, seq_len: int) -> list[Step]:
    """Calibration behind pruned blocks, then what magnitude needs.

    A block is passed once to look at it, up to its last Linear, and once more for the next block's inputs.
    """
    attention = _attention(shape, tokens, seq_len)
    look = 2 * tokens * (shape.of_block - shape.hidden * shape.intermediate) + attention
    pass_on = 2 * tokens * shape.of_block + attention
    return [Step(bfloat16=shape.blocks * look + (shape.blocks - 1) * pass_on), *magnitude(shape)]


def sparsegpt(shape: Shape, tokens: int, seq_len: int) -> list[Step]:
    """Wanda's steps; half of a gram of each distinct input, and its factor; each weight's change, spread to the right.

    Products of bfloat16 numbers are exact in float32, so a gram may be made at the rate of bfloat16. The factor, and
    the out x in^2 operations of the changes, are float32.
    """
    grams = shape.blocks * sum(tokens * width**2 for width in shape.inputs)
    factors = sum(width**3 / 3 for width in shape.inputs)
    changes = sum(out * inputs**2 for out, inputs in shape.matrices)
    return [*wanda(shape, tokens, seq_len), Step(bfloat16=grams), Step(float32=shape.blocks * (factors + changes))]


def structured(shape: Shape, kept: int) -> list[Step]:
    """MLP weights are read to be scored; those of the `kept` channels are read again and written."""
    channel = 3 * shape.hidden * shape.blocks * SIZE
    return [Step(moved=channel * shape.intermediate), Step(moved=2 * channel * kept)]


def perplexity(shape: Shape, tokens: int, seq_len: int) -> list[Step]:
    """Blocks and head over all tokens."""
    of_blocks = shape.blocks * (2 * tokens * shape.of_block + _attention(shape, tokens, seq_len))
    return [Step(_read(shape), bfloat16=of_blocks + 2 * tokens * shape.head)]


def prefill(shape: Shape, tokens: int, sparse: bool = False) -> list[Step]:
    """One prompt through all blocks, and one position through the head; `sparse`: with 2:4 Linears."""
    products = shape.blocks * 2 * tokens * shape.of_block / (2 if sparse else 1)
    others = shape.blocks * _attention(shape, tokens, tokens) + 2 * shape.head
    return [Step(_read(shape, sparse), bfloat16=products + others)]


def decode(shape: Shape, sparse: bool = False) -> list[Step]:
    """One token of one row: weights are read once."""
    return [Step(_read(shape, sparse), bfloat16=2 * (shape.blocks * shape.of_block + shape.head))]


def streamed(shape: Shape, steps: Sequence[Step]) -> list[Step]:
    """The same steps, while the blocks' weights come from the host."""
    first, *others = steps
    from_host = SIZE * shape.blocks * shape.of_block
    return [Step(first.moved, from_host, first.bfloat16, first.float32), *others]


def _read(shape: Shape, sparse: bool = False) -> float:
    """Bytes of Linears and head."""
    return SIZE * (shape.blocks * shape.of_block * (SPARSE if sparse else 1) + shape.head)


def _attention(shape: Shape, tokens: int, seq_len: int) -> float:
    """Operations of QK^T and AV of one block; a token sees half of its window on average."""
    return 4 * tokens * (seq_len / 2) * shape.hidden


def measure_rates(device: Device) -> Rates:
    """What the device does now: medians of copies within it and to it, and of square products."""
    place, large = device.torch_device, device.is_cuda
    count, width = (2**30, 8192) if large else (2**25, 256)
    source, target = (torch.zeros(count, dtype=torch.uint8, device=place) for _ in range(2))
    host = torch.zeros(count // 4, dtype=torch.uint8, pin_memory=large)
    moved = 2 * count / _median_s(lambda: target.copy_(source), device)
    from_host = len(host) / _median_s(lambda: target[: len(host)].copy_(host, non_blocking=True), device)

    def products(dtype: torch.dtype, precision: str) -> float:
        matrix, before = torch.randn(width, width, device=place, dtype=dtype), torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        try:
            return 2 * width**3 / _median_s(lambda: linear(matrix, matrix), device)
        finally:
            torch.set_float32_matmul_precision(before)

    return Rates(
        moved,
        from_host,
        products(torch.bfloat16, "highest"),
        products(torch.float32, "high"),
        products(torch.float32, "highest"),
    )


def _median_s(work: Callable[[], Any], device: Device) -> float:
    times = []
    for _ in range(3 + REPEATS):
        device.synchronize()
        began = time.perf_counter()
        work()
        device.synchronize()
        times.append(time.perf_counter() - began)
    return median(times[3:])
