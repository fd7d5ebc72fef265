"""Linears with weights of 8 or 4 bits, kept and stored in the layout of the compressed-tensors library.

Symmetric, so zero is the code 0: what pruning set to zero stays zero. One float step for each output (8 bits) or for
each group of inputs of an output (4 bits): weight = code * step.

Which kernel multiplies is chosen by what was measured (tests/benchmarks/post.py): int8 inputs and weights have one
on CPU and GPU; weights alone have one for few rows of bfloat16 on a CPU; otherwise the weights are expanded to the
inputs' type before each product, which is smaller and slower.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

KERNEL_ROWS = 16  # up to so many rows the weight-only kernel beats expanding the weights
KERNEL_WIDTH = 32  # it reads inputs in whole vectors: at other widths (seen at 7, 36, 40) it crashes or reads garbage
FP8, FP8_MAX = torch.float8_e4m3fn, 448.0
CUDA_ROWS = 17  # torch._int_mm on CUDA wants more than 16 rows, and widths that 8 divides


class LowBitWeights(nn.Module):
    """Weights that are codes times steps."""

    bits: int

    def codes(self) -> Tensor:
        """The weights before their steps, in a type that has a comparison with zero."""
        raise NotImplementedError


class LowBitLinear(LowBitWeights):
    """A Linear, shape (out, in), whose weights are codes times steps; its bias stays as it was."""

    weight_scale: Tensor

    def __init__(self, in_features: int, out_features: int, has_bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype), requires_grad=False) if has_bias else None

    @property
    def has_product(self) -> bool:
        """True where the device that the weights are on multiplies codes of these widths."""
        return False

    def store(self, weight: Tensor) -> None:
        """Rounds a float weight, shape (out, in), to the nearest codes."""
        raise NotImplementedError

    def expand(self) -> Tensor:
        """The weights in the type of the steps, shape (out, in)."""
        raise NotImplementedError

    def forward(self, inputs: Tensor) -> Tensor:
        """x W^T + b, shape (..., out)."""
        return linear(inputs, self.expand().to(inputs.dtype), self.bias)

    def extra_repr(self) -> str:
        """Text that PyTorch prints of it."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}"


class Int8Linear(LowBitLinear):
    """8-bit weights, a step for each output; with `dynamic`, inputs are rounded to 8 bits too, a step for each token.

    Buffers: `weight` int8 (out, in), `weight_scale` (out, 1).
    """

    bits = 8
    weight: Tensor

    def __init__(
        self, in_features: int, out_features: int, has_bias: bool, dtype: torch.dtype, dynamic: bool = False
    ) -> None:
        super().__init__(in_features, out_features, has_bias, dtype)
        self.dynamic = dynamic
        self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=torch.int8))
        self.register_buffer("weight_scale", torch.ones(out_features, 1, dtype=dtype))

    @torch.no_grad()
    def store(self, weight: Tensor) -> None:
        """Rounds a float weight, shape (out, in), to the nearest integers."""
        step = _steps(weight.abs().amax(dim=1, keepdim=True).float() / 127, self.weight_scale.dtype)
        self.weight_scale.copy_(step)
        self.weight.copy_((weight.float() / step.float()).round().clamp(-127, 127))

    def codes(self) -> Tensor:
        """The integer weights, int8."""
        return self.weight

    def expand(self) -> Tensor:
        """The weights in the type of the steps."""
        return self.weight.to(self.weight_scale.dtype) * self.weight_scale

    def forward(self, inputs: Tensor) -> Tensor:
        """x W^T + b, shape (..., out)."""
        rows = inputs.reshape(-1, self.in_features)
        if self.has_product:
            return self._with_bias(self._int8_product(rows)).view(*inputs.shape[:-1], self.out_features)
        if self._has_kernel(rows):
            product = torch.ops.aten._weight_int8pack_mm(rows.contiguous(), self.weight, self.weight_scale[:, 0])
            return self._with_bias(product).view(*inputs.shape[:-1], self.out_features)
        return super().forward(inputs)

    @property
    def has_product(self) -> bool:
        """True where inputs are rounded too, and torch._int_mm takes these widths (one input gives garbage)."""
        fits = self.in_features % 8 == 0 == self.out_features % 8 if self.weight.is_cuda else self.in_features > 1
        return self.dynamic and fits

    @property
    def has_weight_kernel(self) -> bool:
        """True where a kernel multiplies these 8-bit weights with a few rows of inputs that keep their type."""
        narrow = self.weight_scale.dtype == torch.bfloat16 and self.weight.device.type == "cpu"
        return narrow and not self.dynamic and self.in_features % KERNEL_WIDTH == 0

    def _has_kernel(self, rows: Tensor) -> bool:
        """True where the weight-only kernel takes these rows and is worth it."""
        few = rows.dtype == torch.bfloat16 and rows.device.type == "cpu" and len(rows) <= KERNEL_ROWS
        return few and self.in_features % KERNEL_WIDTH == 0

    def _int8_product(self, rows: Tensor) -> Tensor:
        """Rows rounded to int8, multiplied exactly in int32, and scaled in float32."""
        values = rows.float()
        step = values.abs().amax(dim=1, keepdim=True).clamp_min_(1e-12).div_(127)
        integers = (values / step).round_().to(torch.int8)
        short = CUDA_ROWS - len(rows) if rows.is_cuda else 0
        if short > 0:
            integers = pad(integers, (0, 0, 0, short))
        product = torch._int_mm(integers, self.weight.t())[: len(rows)]
        return product.float().mul_(step).mul_(self.weight_scale.float().t()).to(rows.dtype)

    def _with_bias(self, product: Tensor) -> Tensor:
        return product if self.bias is None else product + self.bias


class Fp8Linear(LowBitLinear):
    """8-bit floats (e4m3), a step for each output; on a GPU inputs are rounded to them too, a step for each token.

    Buffers: `weight` float8_e4m3fn (out, in), `weight_scale` (out, 1).
    """

    bits = 8
    weight: Tensor

    def __init__(self, in_features: int, out_features: int, has_bias: bool, dtype: torch.dtype) -> None:
        super().__init__(in_features, out_features, has_bias, dtype)
        self.register_buffer("weight", torch.zeros(out_features, in_features).to(FP8))
        self.register_buffer("weight_scale", torch.ones(out_features, 1, dtype=dtype))

    @torch.no_grad()
    def store(self, weight: Tensor) -> None:
        """Rounds a float weight, shape (out, in), to the nearest 8-bit floats."""
        step = _steps(weight.abs().amax(dim=1, keepdim=True).float() / FP8_MAX, self.weight_scale.dtype)
        self.weight_scale.copy_(step)
        self.weight.copy_((weight.float() / step.float()).clamp(-FP8_MAX, FP8_MAX).to(FP8))

    def codes(self) -> Tensor:
        """The 8-bit floats, as float32."""
        return self.weight.float()

    def expand(self) -> Tensor:
        """The weights in the type of the steps."""
        return self.weight.to(self.weight_scale.dtype) * self.weight_scale

    @property
    def has_product(self) -> bool:
        """True where the weights are on a GPU, which multiplies widths that 16 divides."""
        return self.weight.is_cuda and self.in_features % 16 == 0 and self.out_features % 16 == 0

    def forward(self, inputs: Tensor) -> Tensor:
        """x W^T + b, shape (..., out); on a GPU the product of 8-bit floats, by rows (torch._scaled_mm)."""
        if not self.has_product:
            return super().forward(inputs)
        rows = inputs.reshape(-1, self.in_features)
        step = rows.abs().amax(dim=1, keepdim=True).float().clamp_min_(1e-12).div_(FP8_MAX)
        codes = (rows.float() / step).clamp_(-FP8_MAX, FP8_MAX).to(FP8)
        steps = self.weight_scale.float().t()
        product = torch._scaled_mm(codes, self.weight.t(), step, steps, out_dtype=torch.bfloat16).to(inputs.dtype)
        return (product if self.bias is None else product + self.bias).view(*inputs.shape[:-1], self.out_features)


class Int4Linear(LowBitLinear):
    """4-bit weights, a step for each `group_size` consecutive inputs of an output.

    Buffers: `weight_packed` int32 (out, ceil(in / 8)), eight weights + 8 in each, the first in the lowest bits;
    `weight_scale` (out, in / group_size); `weight_shape` int64, [out, in].
    """

    bits = 4
    weight_packed: Tensor

    def __init__(
        self, in_features: int, out_features: int, has_bias: bool, dtype: torch.dtype, group_size: int
    ) -> None:
        super().__init__(in_features, out_features, has_bias, dtype)
        self.group_size = group_size
        self.register_buffer("weight_packed", torch.zeros(out_features, -(-in_features // 8), dtype=torch.int32))
        self.register_buffer("weight_scale", torch.ones(out_features, in_features // group_size, dtype=dtype))
        self.register_buffer("weight_shape", torch.tensor([out_features, in_features]))

    @torch.no_grad()
    def store(self, weight: Tensor) -> None:
        """Rounds a float weight, shape (out, in), to the nearest integers from -7 to 7."""
        groups = weight.float().unflatten(1, (-1, self.group_size))
        step = _steps(groups.abs().amax(dim=2) / 7, self.weight_scale.dtype)
        self.weight_scale.copy_(step)
        self.weight_packed.copy_(pack((groups / step.float()[:, :, None]).round().clamp(-7, 7).flatten(1)))

    def codes(self) -> Tensor:
        """The integer weights, int8."""
        return unpack(self.weight_packed, self.in_features)

    def expand(self) -> Tensor:
        """The weights in the type of the steps."""
        groups = self.codes().to(self.weight_scale.dtype).unflatten(1, (-1, self.group_size))
        return (groups * self.weight_scale[:, :, None]).flatten(1)


def pack(integers: Tensor) -> Tensor:
    """Integers from -8 to 7, shape (out, in), as int32, shape (out, ceil(in / 8)); short rows end with zeros."""
    shifted = integers.to(torch.int64) + 8
    eights = pad(shifted, (0, -shifted.shape[1] % 8)).unflatten(1, (-1, 8))
    words = (eights << torch.arange(0, 32, 4, device=integers.device)).sum(dim=2)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def unpack(words: Tensor, in_features: int) -> Tensor:
    """The int8 integers that `pack` took, shape (out, in_features)."""
    nibbles = (words[:, :, None] >> torch.arange(0, 32, 4, dtype=torch.int32, device=words.device)) & 15
    return (nibbles.flatten(1)[:, :in_features] - 8).to(torch.int8)


def _steps(step: Tensor, dtype: torch.dtype) -> Tensor:
    """Float32 steps as they are stored; 1 where a whole row or group is zero.

    Where a type's smallest numbers (float16's below 6e-5) would cut the largest weight, it is the next one above.
    """
    stored = step.to(dtype)
    above = torch.nextafter(stored, torch.full_like(stored, torch.inf))
    stored = torch.where(stored.float() * (1 + 2**-8) < step, above, stored)
    return torch.where(stored == 0, torch.ones_like(stored), stored)
