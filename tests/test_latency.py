"""What is timed beside the headline, and whether an interval can be trusted."""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import CPU, Cli
from rich.console import Console as RichConsole
from torch import Tensor, nn

from prune_lab.compare import latency_figures
from prune_lab.errors import Refused
from prune_lab.measure.accelerate import accelerator, check_acceleration
from prune_lab.measure.inference import prefill
from prune_lab.measure.prompts import cut_grid, cut_headline
from prune_lab.measure.settings import Measure
from prune_lab.measure.speed import Latency, Paired
from prune_lab.measure.timing import Timings, measure_timings
from prune_lab.models.load import Loaded
from prune_lab.results import outcome
from prune_lab.system.console import Console
from prune_lab.system.device import Device
from prune_lab.system.environment import gpu_clocks

QUIET = Console(quiet=True)
Noise = Callable[[random.Random, int], Iterator[float]]

# Noise of one measurement after the other, as a factor near 1. Each is the same for both models: the truth is 1.


def independent(chance: random.Random, count: int) -> Iterator[float]:
    return (1 + chance.gauss(0, 0.03) for _ in range(count))


def drifting(chance: random.Random, count: int) -> Iterator[float]:
    """The machine gets slower by half in the course of the run."""
    return (factor * (1 + 0.5 * i / count) for i, factor in enumerate(independent(chance, count)))


def spiked(chance: random.Random, count: int) -> Iterator[float]:
    """Every tenth measurement is interrupted, for half of its time on average."""
    return (f + (chance.expovariate(2) if chance.random() < 0.1 else 0) for f in independent(chance, count))


def lasting(chance: random.Random, count: int) -> Iterator[float]:
    """A neighbour's load that comes and goes: each value is close to the one before."""
    load = chance.gauss(0, 0.06)
    for factor in independent(chance, count):
        load = 0.9 * load + chance.gauss(0, 0.06 * (1 - 0.9**2) ** 0.5)
        yield factor + load


def second_is_slower(chance: random.Random, count: int) -> Iterator[float]:
    """The second place of a pair costs 6 % more, twice the noise."""
    return (factor * (1 + 0.06 * (i % 2)) for i, factor in enumerate(independent(chance, count)))


def coverage(noise: Noise, pairs: int, truth: float, series: int = 600) -> float:
    """The share of intervals that hold the true speed-up, the places of a pair alternating as the harness does."""
    chance, held = random.Random(20), 0
    for _ in range(series):
        taken = list(noise(chance, 2 * pairs))
        places = [taken[2 * i : 2 * i + 2][:: 1 if i % 2 == 0 else -1] for i in range(pairs)]
        dense, compressed = torch.tensor(places, dtype=torch.float64).T
        low, high = Paired(dense * truth, compressed).interval()
        held += low <= truth <= high
    return held / series


@pytest.mark.parametrize("pairs", [10, 11])  # the fewest, and an odd number
@pytest.mark.parametrize("noise", [independent, drifting, spiked, lasting])
def test_95_percent_of_the_intervals_hold_the_truth(noise: Noise, pairs: int) -> None:
    assert 0.90 <= coverage(noise, pairs, truth=1.0) <= 0.98


def test_intervals_hold_a_true_speedup_as_often_as_none() -> None:
    assert 0.90 <= coverage(independent, 20, truth=1.3) <= 0.98


@pytest.mark.parametrize("pairs", [10, 11, 20])
def test_a_dearer_second_place_widens_the_interval_and_does_not_shift_it(pairs: int) -> None:
    """Orders alternate, so it speaks for each model in turn. In a fixed order it would be taken for a difference."""
    assert coverage(second_is_slower, pairs, truth=1.0) >= 0.95
    chance = random.Random(3)
    taken = torch.tensor(list(second_is_slower(chance, 2 * pairs)), dtype=torch.float64).view(pairs, 2)
    assert Paired(taken[:, 0], taken[:, 1]).interval()[1] < 1


class Model(nn.Module):
    """Answers like a causal language model, and notes which object was asked for what, in `calls`."""

    calls: list[tuple[int, tuple[int, ...]]]

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        self.calls.append((self.weight.data_ptr(), tuple(input_ids.shape)))
        return SimpleNamespace(logits=torch.zeros(len(input_ids), 1, 5), past_key_values="cache")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, tuple[int, ...]]]:
    made: list[tuple[int, tuple[int, ...]]] = []
    monkeypatch.setattr(Model, "calls", made, raising=False)
    return made


def test_the_dense_model_meets_a_copy_of_itself_in_the_same_way(calls: list[tuple[int, tuple[int, ...]]]) -> None:
    dense, compressed = Model(), Model()
    settings = Measure(pairs=10, warmup=1, decode_tokens=1, aa=True)
    timings = measure_timings(dense, compressed, torch.zeros(1, 7, dtype=torch.int64), {}, settings, CPU, QUIET)
    assert timings.aa is not None
    assert timings.aa.prefill.dense.shape == timings.aa.decode.compressed.shape == (10,)
    visits = [place for place, shape in calls if shape == (1, 7)]
    first, second = visits[:22], visits[22:]
    one, other, twin = dense.weight.data_ptr(), compressed.weight.data_ptr(), ({*second} - {dense.weight.data_ptr()})
    assert len(second) == 22
    assert len(twin) == 1  # one copy, which lies elsewhere
    assert twin != {other}
    alternating = [True, False, False, True] * 5 + [True, False]
    assert [place == one for place in first] == [place == one for place in second] == alternating


def test_other_shapes_are_timed_beside_the_headline(calls: list[tuple[int, tuple[int, ...]]]) -> None:
    stream = torch.arange(100, dtype=torch.int32)
    settings = Measure(
        pairs=10,
        warmup=1,
        prompt_tokens=7,
        decode_tokens=2,
        batch_sizes=[1, 3],
        lengths=[5, 20],  # type: ignore[arg-type]
    )
    prompt, grid = cut_headline(stream, settings, None), cut_grid(stream, settings, None)
    timings = measure_timings(Model(), Model(), prompt, grid, settings, CPU, QUIET)
    assert set(timings.grid) == {(1, 5), (1, 20), (3, 5), (3, 20)}
    shapes = [shape for _, shape in calls]
    for shape in ((1, 7), *timings.grid):
        assert shapes.count(shape) == 2 * 11
    assert shapes.count((3, 1)) == 2 * (2 * 2 * 11)  # two shapes of three rows: two models, two tokens, eleven pairs


def test_rows_of_a_batch_are_different_places_of_the_text() -> None:
    stream = torch.arange(100, dtype=torch.int32)
    settings = Measure(batch_sizes=(1, 3), lengths=(5, 33))
    grid = cut_grid(stream, settings, context=49)
    assert grid[1, 5].tolist() == [[0, 1, 2, 3, 4]]
    assert grid[3, 5].tolist() == [[0, 1, 2, 3, 4], [33, 34, 35, 36, 37], [66, 67, 68, 69, 70]]
    assert grid[3, 33].flatten().tolist() == list(range(99))
    assert cut_grid(stream, Measure(), None) == {}
    alone = cut_grid(stream, Measure(batch_sizes=(2,), prompt_tokens=40), context=30)
    assert list(alone) == [(2, 14)]  # as the headline, cut to the context


def test_shapes_that_do_not_fit_are_refused_with_their_key() -> None:
    stream = torch.arange(100, dtype=torch.int32)
    with pytest.raises(Refused, match=r"measure\.lengths=\[5, 34\]: 34 and measure\.decode_tokens=16 .* of 49 tokens"):
        cut_grid(stream, Measure(lengths=(5, 34)), context=49)
    with pytest.raises(Refused, match=r"measure\.batch_sizes and measure\.lengths: 3 rows of 34 .* 100 tokens"):
        cut_grid(stream, Measure(batch_sizes=(3,), lengths=(34,)), context=None)


def test_the_figures_and_the_table_of_other_shapes() -> None:
    def of(ms: float, speedup: float) -> Latency:
        """Every pair takes this long; decode a tenth of it."""
        compressed = torch.full((10,), ms, dtype=torch.float64)
        return Latency(Paired(compressed * speedup, compressed), Paired(compressed * 0.1, compressed * 0.1))

    figures = latency_figures(Timings(of(8, 2), aa=of(5, 1.25), grid={(4, 128): of(16, 1.5), (16, 32): of(4, 0.5)}))
    assert figures["latency/prefill_speedup"] == 2
    assert figures["latency/aa_prefill_speedup"] == figures["latency/aa_prefill_speedup_low"] == 1.25
    assert figures["latency/aa_decode_speedup"] == figures["latency/aa_decode_speedup_high"] == 1
    assert figures["latency/prefill_ms_p50"] == 8
    expected = {"prefill_ms_p50": 16, "dense_prefill_ms_p50": 24, "prefill_speedup": 1.5}
    expected |= {"decode_ms_per_token_p50": 1.6, "dense_decode_ms_per_token_p50": 1.6, "decode_speedup": 1}
    for name, value in expected.items():
        assert figures[f"latency/{name}_b4_l128"] == pytest.approx(value)
    for end in ("_low", "_high"):
        assert figures[f"latency/prefill_speedup_b4_l128{end}"] == 1.5
        assert figures[f"latency/decode_speedup_b4_l128{end}"] == 1
    shown = io.StringIO()
    console = RichConsole(file=shown, width=150)
    for table in outcome.tables(figures, []):
        console.print(table)
    lines = [" ".join(line.split()) for line in shown.getvalue().splitlines()]
    assert "4 128 24.00 -> 16.00 1.50 [1.50, 1.50] 1.60 -> 1.60 no change [1.00, 1.00]" in lines
    assert "16 32 2.00 -> 4.00 0.50 [0.50, 0.50] 0.40 -> 0.40 no change [1.00, 1.00]" in lines
    assert "dense against itself, prefill 1.25 [1.25, 1.25]" in lines
    assert len(outcome.tables(latency_figures(Timings(of(8, 2))), [])) == 1


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"batch_sizes": []}, r"batch_sizes=\[\] must hold at least one"),
        ({"batch_sizes": [0, 1]}, r"batch_sizes=\[0, 1\] must be different whole numbers of at least 1"),
        ({"batch_sizes": [4, 4]}, r"batch_sizes=\[4, 4\] must be different"),
        ({"lengths": [16, -1]}, r"lengths=\[16, -1\] must be different"),
        ({"latency": False, "lengths": [16]}, "batch_sizes and lengths need latency=true"),
        ({"accelerate": "graphs"}, "accelerate='graphs' is not one of none, cuda_graphs, compile"),
        ({"latency": False, "accelerate": "compile"}, "accelerate='compile' needs latency=true"),
        ({"latency": False, "energy": True}, "energy=true needs latency=true"),
        ({"latency": False, "aa": True}, "aa=true needs latency=true"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(keys: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Measure(**keys)


def test_nothing_but_the_headline_is_timed_unasked(calls: list[tuple[int, tuple[int, ...]]]) -> None:
    settings = Measure(pairs=10, warmup=1, decode_tokens=1)
    timings = measure_timings(Model(), Model(), torch.zeros(1, 7, dtype=torch.int64), {}, settings, CPU, QUIET)
    assert timings.aa is None
    assert timings.grid == {}
    assert len(calls) == 2 * 11 * 2


@pytest.mark.slow
@pytest.mark.process  # the daily loop leaves it out
def test_a_compiled_model_answers_as_before_and_leaves_nothing_behind(loaded: Loaded) -> None:
    """Captured by torch.compile and run by PyTorch itself, which needs no compiler: all but the making of kernels."""
    prompt, before = torch.arange(24).view(2, 12), torch._dynamo.config.recompile_limit
    expected = prefill(loaded.model, prompt).logits
    torch._dynamo.utils.counters.clear()
    with accelerator("compile", backend="eager") as ready:
        model = ready(loaded.model)
        output = model.prefill(prompt)
        assert torch.allclose(output.logits, expected, atol=1e-5)
        model.decode(output, 4)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2  # prefill and decode were both captured
        assert torch._dynamo.config.fail_on_recompile_limit_hit
    assert torch._dynamo.config.recompile_limit == before
    with accelerator("none") as ready:
        assert ready(loaded.model).model is loaded.model


@pytest.mark.parametrize(("how", "why"), [("compile", "C++ compiler"), ("cuda_graphs", "there are none on cpu")])
def test_acceleration_is_refused_on_a_cpu_before_anything_is_loaded(cli: Cli, how: str, why: str) -> None:
    done = cli("model=hf", "model.name=no/such", f"measure.accelerate={how}", "device=cpu", "tracking=none")
    assert done.returncode == 2
    assert f"measure.accelerate='{how}' is for GPUs: " in done.stderr
    assert why in done.stderr
    check_acceleration("none", CPU)
    check_acceleration(how, Device(torch.device("cuda:0"), torch.bfloat16))


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ("1, 2, 3, 4", {"clocks.sm": 1, "clocks.mem": 2, "clocks.max.sm": 3, "clocks.max.mem": 4}),
        ("[N/A], [N/A], 3, 4", None),
        ("1980", None),
        ("No devices were found", None),
    ],
)
def test_clocks_of_a_gpu_are_what_its_tool_says_or_absent(tmp_path: Path, said: str, found: Any) -> None:
    tool = tmp_path / "tool"
    tool.write_text(f'#!/bin/sh\n[ "$1" = "--id=GPU-7" ] && echo "{said}"\n')
    tool.chmod(0o755)
    assert gpu_clocks("GPU-7", str(tool)) == found
    assert gpu_clocks("GPU-8", str(tool)) is None  # it fails
    assert gpu_clocks("GPU-7", str(tmp_path / "none")) is None
