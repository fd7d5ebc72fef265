"""Energy from a folder in the layout of Linux's powercap, whose counters the models' own work turns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import CPU, Cli
from torch import Tensor

from prune_lab.compare import latency_figures
from prune_lab.measure.energy import Energy, measure_energy
from prune_lab.measure.settings import Measure
from prune_lab.measure.speed import Latency, Paired
from prune_lab.measure.timing import Timings

PROMPT = torch.zeros(1, 7, dtype=torch.int64)
SETTINGS = Measure(pairs=10, warmup=2, decode_tokens=4)
RANGE = 262_143_328_850  # of a real server


def domain(powercap: Path, folder: str, name: str, counter: int, most: int = RANGE) -> Path:
    """A RAPL domain; returns the file of its counter."""
    place = powercap / folder
    place.mkdir(parents=True)
    (place / "name").write_text(f"{name}\n")
    (place / "max_energy_range_uj").write_text(f"{most}\n")
    (place / "energy_uj").write_text(f"{counter}\n")
    return place / "energy_uj"


def turn(file: Path, microjoules: int, most: int = RANGE) -> None:
    """Moves a counter on; at its range it begins again at 0."""
    file.write_text(f"{(int(file.read_text()) + microjoules) % most}\n")


def model(*work: Callable[[], None]) -> Any:
    """Answers like a causal language model; every forward pass does `work`."""

    def forward(input_ids: Tensor, **_: Any) -> Any:
        for part in work:
            part()
        return SimpleNamespace(logits=torch.zeros(1, 1, 5), past_key_values="cache")

    return forward


def test_joules_per_decoded_token_with_its_share_of_the_prefill(tmp_path: Path) -> None:
    """A pass costs 3 J dense and 2 J compressed; one prefill and 4 tokens are 5 passes."""
    file = domain(tmp_path, "intel-rapl:0", "package-0", 123_456)
    dense, compressed = model(lambda: turn(file, 3_000_000)), model(lambda: turn(file, 2_000_000))
    found = measure_energy(dense, compressed, PROMPT, SETTINGS, CPU, tmp_path)
    assert found is not None
    assert (found.dense, found.compressed) == pytest.approx((5 * 3 / 4, 5 * 2 / 4))


def test_a_counter_that_begins_again_loses_nothing(tmp_path: Path) -> None:
    """It turns over in every second or third repeat of 5 passes, and so several times while one model is measured."""
    most = 40_000_000
    file = domain(tmp_path, "intel-rapl:0", "package-0", most - 1, most)
    same = model(lambda: turn(file, 3_000_000, most))
    found = measure_energy(same, same, PROMPT, SETTINGS, CPU, tmp_path)
    assert found is not None
    assert (found.dense, found.compressed) == pytest.approx((3.75, 3.75))


def test_packages_are_summed_and_nothing_else_is(tmp_path: Path) -> None:
    """Cores lie inside their package, and psys around all of them: to add them would count twice."""
    parts = {
        "intel-rapl:0": "package-0", "intel-rapl:1": "package-1", "intel-rapl:0:0": "core", "intel-rapl:1:1": "dram",
        "intel-rapl:2": "psys", "intel-rapl-mmio:0": "package-0", "dtpm": "package-5",
    }  # fmt: skip
    files = [domain(tmp_path, folder, name, 5) for folder, name in parts.items()]
    same = model(*(lambda file=file, n=n: turn(file, 1_000_000 * 10**n) for n, file in enumerate(files)))  # type: ignore[misc]
    found = measure_energy(same, same, PROMPT, SETTINGS, CPU, tmp_path)
    assert found is not None
    assert found.dense == pytest.approx((1 + 10) * 5 / 4)


def test_energy_follows_the_model_in_a_machine_that_gets_warmer(tmp_path: Path) -> None:
    """Each pass costs a little more than the one before: the blocks of one model lie around the other's."""
    file, cost = domain(tmp_path, "intel-rapl:0", "package-0", 0), [1_000_000]

    def work() -> None:
        cost[0] += 10_000
        turn(file, cost[0])

    found = measure_energy(model(work), model(work), PROMPT, SETTINGS, CPU, tmp_path)
    assert found is not None
    assert found.dense == pytest.approx(found.compressed)
    assert found.dense > 1.25


def unreadable(powercap: Path) -> None:
    """A folder in the place of a file cannot be read, whoever tries."""
    file = domain(powercap, "intel-rapl:0", "package-0", 5)
    file.unlink()
    file.mkdir()


def half_readable(powercap: Path) -> None:
    """The sum of some packages would be too little."""
    unreadable(powercap)
    domain(powercap, "intel-rapl:1", "package-1", 5)


def garbled(powercap: Path) -> None:
    domain(powercap, "intel-rapl:0", "package-0", 5).write_text("\n")


def without_packages(powercap: Path) -> None:
    domain(powercap, "intel-rapl:0", "psys", 5)


@pytest.mark.parametrize(
    "make", [lambda powercap: None, unreadable, half_readable, garbled, without_packages],
    ids=["absent", "unreadable", "half", "garbled", "no package"],
)  # fmt: skip
def test_no_counter_no_figure(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "powercap")
    assert measure_energy(model(), model(), PROMPT, SETTINGS, CPU, tmp_path / "powercap") is None


def test_a_counter_that_goes_away_leaves_no_figure(tmp_path: Path) -> None:
    file, passes = domain(tmp_path, "intel-rapl:0", "package-0", 5), [0]

    def work() -> None:
        passes[0] += 1
        if passes[0] == 60:
            file.unlink()

    assert measure_energy(model(work), model(work), PROMPT, SETTINGS, CPU, tmp_path) is None
    assert passes[0] >= 60


def test_energy_has_its_names_and_is_absent_unmeasured() -> None:
    flat = Paired(torch.ones(10, dtype=torch.float64), torch.ones(10, dtype=torch.float64))
    figures = latency_figures(Timings(Latency(flat, flat), energy=Energy(dense=3.0, compressed=2.0)))
    assert figures["energy/joules_per_token"] == 2
    assert figures["energy/dense_joules_per_token"] == 3
    assert not [name for name in latency_figures(Timings(Latency(flat, flat))) if name.startswith("energy")]


def test_a_run_says_where_it_has_no_energy(cli: Cli, small: list[str], tmp_path: Path) -> None:
    """On this machine, whatever it is: a figure of both models, or a note why there is none."""
    done = cli(*small, "measure.energy=true", "tracking=none", "hydra.run.dir=here")
    assert done.returncode == 0, done.stderr
    shown = done.stdout
    assert ("energy, J per token" in shown) != ("no energy: " in shown)
