"""What is timed beside the headline, and whether an interval can be trusted."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import CPU
from torch import Tensor, nn

from prune_lab.console import Console
from prune_lab.measure.settings import Measure
from prune_lab.measure.speed import Paired
from prune_lab.measure.timing import measure_timings

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


@pytest.mark.parametrize("pairs", [10, 11, 20])
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
    timings = measure_timings(dense, compressed, torch.zeros(1, 7, dtype=torch.int64), settings, CPU, QUIET)
    assert timings.aa is not None
    assert timings.aa.prefill.dense.shape == timings.aa.decode.compressed.shape == (10,)
    visits = [place for place, shape in calls if shape == (1, 7)]
    first, second = visits[:22], visits[22:]
    one, other, twin = dense.weight.data_ptr(), compressed.weight.data_ptr(), ({*second} - {dense.weight.data_ptr()})
    assert len(second) == 22
    assert len(twin) == 1  # one copy, which lies elsewhere
    assert twin != {other}
    assert (
        [place == one for place in first]
        == [place == one for place in second]
        == [True, False, False, True] * 5
        + [
            True,
            False,
        ]
    )


def test_nothing_but_the_headline_is_timed_unasked(calls: list[tuple[int, tuple[int, ...]]]) -> None:
    settings = Measure(pairs=10, warmup=1, decode_tokens=1)
    timings = measure_timings(Model(), Model(), torch.zeros(1, 7, dtype=torch.int64), settings, CPU, QUIET)
    assert timings.aa is None
    assert len(calls) == 2 * 11 * 2


def test_what_needs_a_clock_is_refused_without_one() -> None:
    with pytest.raises(ValueError, match="aa=true needs latency=true"):
        Measure(latency=False, aa=True)
