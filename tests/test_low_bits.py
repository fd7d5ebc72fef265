"""Quantized Linears: codes and steps by hand, and products against plain loops in float64."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors import pack_to_int32
from torch import Tensor, nn

from prune_lab.errors import Refused
from prune_lab.models.contents import count_nonzero, count_weights
from prune_lab.models.low_bit.linears import (
    Fp8Linear,
    Int4Linear,
    Int8Linear,
    LowBitLinear,
    pack,
    unpack,
)
from prune_lab.models.low_bit.semi_structured import check_pattern

TYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDTHS = [2, 3, 7, 8, 24, 32, 36, 40, 64]  # 36 and 40 crash the weight-only kernel


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def int8(weight: Tensor, dynamic: bool = False, bias: Tensor | None = None) -> Int8Linear:
    """A layer that holds `weight`, shape (out, in)."""
    layer = Int8Linear(weight.shape[1], weight.shape[0], bias is not None, weight.dtype, dynamic)
    layer.store(weight)
    if bias is not None:
        layer.bias.data.copy_(bias)
    return layer


def int4(weight: Tensor, group_size: int) -> Int4Linear:
    layer = Int4Linear(weight.shape[1], weight.shape[0], False, weight.dtype, group_size)
    layer.store(weight)
    return layer


def test_int8_codes_and_steps_by_hand() -> None:
    """A step for each output: its largest value is 127, also where that is a negative one; halves go to even."""
    layer = int8(torch.tensor([[127.0, -1.0, 0.4, 2.5], [-254.0, 2.0, 0.9, 3.0], [0.0, 0.0, 0.0, 0.0]]))
    assert layer.codes().tolist() == [[127, -1, 0, 2], [-127, 1, 0, 2], [0, 0, 0, 0]]
    assert layer.weight_scale.tolist() == [[1.0], [2.0], [1.0]]
    assert layer.expand().tolist() == [[127.0, -1.0, 0.0, 2.0], [-254.0, 2.0, 0.0, 4.0], [0.0, 0.0, 0.0, 0.0]]
    assert (layer.weight.dtype, layer.weight_scale.dtype) == (torch.int8, torch.float32)


def test_int4_codes_and_steps_by_hand() -> None:
    """A step for each group of an output: the largest of the group is 7; a group of zeros has the step 1."""
    layer = int4(torch.tensor([[7.0, -3.4, 1.6, 0.0, -14.0, 5.1, 0.9, 3.0], [0.0] * 4 + [0.7, -0.1, 0.0, 0.34]]), 4)
    assert layer.codes().tolist() == [[7, -3, 2, 0, -7, 3, 0, 2], [0, 0, 0, 0, 7, -1, 0, 3]]
    torch.testing.assert_close(layer.weight_scale, torch.tensor([[1.0, 2.0], [1.0, 0.1]]))
    assert layer.expand()[0].tolist() == [7.0, -3.0, 2.0, 0.0, -14.0, 6.0, 0.0, 4.0]
    assert layer.weight_shape.tolist() == [2, 8]


def test_the_step_that_is_stored_is_the_one_that_rounds() -> None:
    """1.6875 / 127 is 0.013287, which bfloat16 keeps as 0.013306: 1.3359375 is 100.4 of these steps, not 100.5."""
    weight = torch.tensor([[1.6875, 1.3359375]]).bfloat16()
    exact, kept = 1.6875 / 127, 218 / 2**14
    assert (round(1.3359375 / exact), round(1.3359375 / kept)) == (101, 100)
    layer = int8(weight)
    assert layer.weight_scale.item() == kept
    assert layer.codes().tolist() == [[127, 100]]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("bits", [8, 4])
def test_no_weight_is_off_by_more_than_half_a_step(bits: int, dtype: torch.dtype) -> None:
    """Also where float16's smallest numbers make the step a coarse one: no weight may be cut."""
    for size in (1.0, 1e-4, 2e-6):
        check_steps(bits, dtype, size)


def check_steps(bits: int, dtype: torch.dtype, size: float) -> None:
    weight = (random(24, 64) * size).to(dtype)
    weight[3] = 0
    layer: LowBitLinear = int8(weight) if bits == 8 else int4(weight, 16)
    steps = layer.weight_scale.double().repeat_interleave(64 // layer.weight_scale.shape[1], dim=1)
    off = (layer.codes().double() * steps - weight.double()).abs() / steps
    assert float(off.max()) <= 0.5 + 1e-5
    assert bool((layer.codes()[3] == 0).all())
    # the steps are no coarser than they must be: the largest code is the largest there is, but for tiny numbers
    if dtype != torch.float16 or size == 1:
        assert int(layer.codes().abs().max()) == {8: 127, 4: 7}[bits]


def test_a_zero_stays_a_zero() -> None:
    weight = random(16, 32) * (random(16, 32, seed=1) > 0)
    for layer in (int8(weight), int4(weight, 8), int8(weight, dynamic=True)):
        assert bool((layer.codes()[weight == 0] == 0).all())


def looped_pack(integers: Tensor) -> Tensor:
    """The layout in plain Python: word k of a row holds weights 8k to 8k + 7, each plus 8, the first lowest."""
    rows = []
    for row in integers.tolist():
        words = []
        for start in range(0, len(row), 8):
            word = sum((value + 8) << (4 * place) for place, value in enumerate(row[start : start + 8]))
            words.append(word - 2**32 if word >= 2**31 else word)
        rows.append(words)
    return torch.tensor(rows, dtype=torch.int32)


def test_packing_against_a_loop_and_the_library_whose_layout_it_is() -> None:
    """All values from -8 to 7, in every place, at every width."""
    for width in range(1, 41):
        integers = torch.stack([(torch.arange(width) + first) % 16 - 8 for first in range(16)]).to(torch.int8)
        words = pack(integers)
        assert torch.equal(words, looped_pack(integers)), width
        assert torch.equal(words, pack_to_int32(integers, 4)), width
        assert torch.equal(unpack(words, width), integers), width


def looped_dynamic(rows: Tensor, layer: Int8Linear) -> Tensor:
    """Inputs rounded token by token as the layer should (a float32 step of max / 127), then a product in float64."""
    out = []
    for row in rows.float():
        step = row.abs().max().clamp_min(1e-12) / 127
        rounded = torch.round(row / step).double() * step.double()
        weights = zip(layer.weight.double(), layer.weight_scale.double(), strict=True)
        out.append([float((rounded * weight * scale).sum()) for weight, scale in weights])
    result = torch.tensor(out, dtype=torch.float64)
    return result if layer.bias is None else result + layer.bias.double()


@pytest.mark.parametrize("rows", [1, 5, 17])
def test_the_dynamic_product_against_a_loop(rows: int) -> None:
    """Odd widths too: torch's integer product of a single input is garbage, and must not be used."""
    for width in (1, *WIDTHS):
        check_dynamic(rows, width)


def check_dynamic(rows: int, width: int) -> None:
    layer = int8(random(5, width), dynamic=True, bias=random(5, seed=2))
    inputs = random(rows, width, seed=1)
    torch.testing.assert_close(layer(inputs).double(), looped_dynamic(inputs, layer), rtol=1e-5, atol=1e-5)
    half = int8(random(5, width).bfloat16(), dynamic=True)
    expected = looped_dynamic(inputs.bfloat16(), half)
    assert half(inputs.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(half(inputs.bfloat16()).double(), expected, rtol=2**-7, atol=1e-4)


def test_a_token_does_not_depend_on_the_others() -> None:
    """An outlier beside it changes nothing, bit for bit."""
    layer = int8(random(7, 24), dynamic=True)
    inputs = random(2, 6, 24, seed=1)
    inputs[1, 2] *= 1000
    together = layer(inputs)
    assert together.shape == (2, 6, 7)
    for i in range(2):
        for j in range(6):
            assert torch.equal(layer(inputs[i, j]), together[i, j])


def test_zero_inputs_give_the_bias_and_nan_stays_nan() -> None:
    layer = int8(random(7, 24), dynamic=True, bias=random(7, seed=2))
    inputs = torch.zeros(2, 24)
    inputs[1, 3] = torch.nan
    result = layer(inputs)
    assert torch.equal(result[0], layer.bias)
    assert bool(result[1].isnan().all())


@pytest.mark.parametrize("rows", [1, 3, 16, 17])
def test_the_weight_only_product_is_that_of_the_expanded_weights(rows: int) -> None:
    """Whatever kernel computes it, in bfloat16: its rounding of the result, and of the expanded weights."""
    for width in WIDTHS:
        layer = int8(random(9, width).bfloat16(), bias=random(9, seed=2).bfloat16())
        inputs = random(rows, width, seed=1).bfloat16()
        exact = inputs.double() @ (layer.weight.double() * layer.weight_scale.double()).T + layer.bias.double()
        size = (inputs.double().abs() @ (layer.weight.double() * layer.weight_scale.double()).abs().T).max()
        assert float((layer(inputs).double() - exact).abs().max()) <= 2**-7 * float(size), width


def test_float8_against_torchs_own_cast() -> None:
    """e4m3: the largest of an output is 448 steps; others are rounded as torch rounds to this type."""
    weight = random(6, 20)
    weight[2] = 0
    layer = Fp8Linear(20, 6, False, torch.float32)
    layer.store(weight)
    steps = weight.abs().amax(1, keepdim=True) / 448
    steps[2] = 1
    assert torch.equal(layer.weight_scale, steps)
    assert torch.equal(layer.codes(), (weight / steps).clamp(-448, 448).to(torch.float8_e4m3fn).float())
    assert torch.equal(layer.expand(), layer.codes() * steps)
    assert (
        float(((layer.expand() - weight).abs() / (weight.abs() + steps * 2**-6)).max()) <= 2**-4
    )  # 3 bits after the 1
    torch.testing.assert_close(layer(weight), weight @ layer.expand().T)


def test_weights_are_counted_whatever_they_are_kept_in() -> None:
    """Codes and float parameters, a tied one once; steps are no weights; rounding to zero shows."""
    tied = nn.Linear(4, 3, bias=False)
    tied.weight.data.fill_(1.0)
    bias = torch.ones(3)
    model = nn.ModuleList([tied, nn.Linear(4, 3, bias=False), int8(torch.ones(3, 8), bias=bias), int4(torch.eye(8), 8)])
    model[1].weight = tied.weight
    assert (count_weights(model), count_nonzero(model)) == (12 + 24 + 3 + 64, 12 + 24 + 3 + 8)


@pytest.mark.parametrize(
    ("row", "fits"),
    [
        ([1, 1, 0, 0, 0, 2, 0, 3], True),
        ([0, 0, 0, 0, 0, 2, 0, 0], True),
        ([1, 0, 0, 0, 1, 1, 1, 0], False),
        ([0, 0, 1, 1, 1, 1, 0, 0], True),
        ([0, 1, 1, 1, 0, 0, 0, 0], False),  # four of eight, yet three of the first four
        ([1, 0, 1, 0, 1, 0], False),  # six inputs are not fours
    ],
)
def test_the_2_4_pattern_by_hand(row: list[float], fits: bool) -> None:
    linear = nn.Linear(len(row), 2)
    linear.weight.data = torch.tensor([[0.0] * len(row), row])
    if fits:
        check_pattern("h.0.up", linear)
    else:
        with pytest.raises(Refused, match=r"h\.0\.up keeps more than 2 of 4 inputs.*method\.pattern=2:4"):
            check_pattern("h.0.up", linear)


def test_the_2_4_kernels_take_no_conv1d() -> None:
    from transformers.pytorch_utils import Conv1D

    with pytest.raises(Refused, match="c_fc is a Conv1D"):
        check_pattern("c_fc", Conv1D(4, 4))
