"""Calibration and test windows shared out over processes: each statistic, mask and figure is that of one process.

This file is also the program that the processes run: see `main`.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CPU, make_folder
from model_types import tiny_folder
from processes import together
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from prune_lab import dense_cache
from prune_lab.dense_cache import DenseCache
from prune_lab.measure.perplexity import measure_beside
from prune_lab.methods.base import Method
from prune_lab.methods.depth import Depth
from prune_lab.methods.experts import Experts
from prune_lab.methods.ria import Ria
from prune_lab.methods.sensitivity import Sensitivity
from prune_lab.methods.sparsegpt import SparseGPT
from prune_lab.methods.structured import Structured
from prune_lab.methods.unstructured import Unstructured
from prune_lab.methods.wanda import Wanda
from prune_lab.models.anatomy import Anatomy
from prune_lab.models.load import HubModel
from prune_lab.pruning.block_importance import _distances, block_influence
from prune_lab.pruning.calibration import Calibrator, block_statistics
from prune_lab.system.console import Console
from prune_lab.system.world import World, join

HERE, QUIET = Path(__file__).parent, Console(quiet=True)
WINDOWS = torch.randint(300, (7, 24), generator=torch.Generator().manual_seed(3))  # 4 and 3, of two processes
ALL = frozenset({"input_norm", "output_norm", "variance", "gram", "saliency", "saliency2"})


@dataclass(frozen=True)
class Case:
    """A method, the model that it prunes, and how its text passes."""

    method: Method
    model: str = "llama"
    propagate: str = "pruned"
    windows: int = 7


CASES = {
    "wanda": Case(Wanda(amount=0.5)),
    "ria 2:4 of gpt2": Case(Ria(amount=0.5, pattern="2:4"), "gpt2"),
    "owl": Case(Wanda(amount=0.5, allocation="owl")),
    "global": Case(Unstructured(amount=0.5, score="wanda", scope="global", refit="none")),
    "sparsegpt": Case(SparseGPT(amount=0.5)),
    "obs with refit": Case(Structured(amount=0.5, units=("mlp", "heads"), score="obs", refit="inputs")),
    "obs with biases": Case(Structured(amount=0.25, score="obs", refit="inputs"), "gpt2"),
    "obs behind dense blocks": Case(Structured(amount=0.25, score="obs", refit="inputs"), propagate="dense"),
    "residual": Case(Structured(amount=0.25, score="wanda", refit="residual")),
    "taylor": Case(Structured(amount=0.25, score="taylor")),
    "hidden": Case(Structured(amount=0.25, units=("hidden",), score="minitron", refit="inputs")),
    "bi": Case(Depth(amount=0.5, refit="residual")),
    "angle": Case(Depth(amount=0.5, by="angle")),
    "kl": Case(Depth(amount=0.5, by="kl")),
    "perplexity": Case(Depth(amount=0.5, by="perplexity")),
    "sensitivity": Case(Sensitivity(amounts=(0.5,))),
    "reap": Case(Experts(amount=0.25), "mixtral"),
    "ranked choice": Case(Experts(amount=0.25, score="ranked_choice"), "mixtral"),
    "leave one out": Case(Experts(amount=0.25, score="leave_one_out"), "mixtral"),
    "wanda of experts": Case(Unstructured(amount=0.5, score="moe_pruner", refit="none"), "mixtral"),
    "few windows": Case(SparseGPT(amount=0.5), windows=1),
}


def figures_of(case: Case, folder: Path, world: World, cached: bool) -> dict[str, Tensor]:
    """The weights of a pruned model, the tables that its method leaves, and its losses.

    Losses and divergence are those that one process finds in the same model, nearly to the last digit.
    """
    dense, loaded = (HubModel(name=str(folder / case.model)).load(CPU, seed=0) for _ in range(2))
    calibrator = Calibrator(WINDOWS[: case.windows], case.propagate, batch_size=2, world=world)
    cache = DenseCache(dense.model, dense.fingerprint(), CPU) if cached else None
    passed = [0, 0]
    with counting(loaded.model, passed, 0):
        pruned = case.method.prune(Anatomy(loaded.model, cache), case.method.amount, 0, calibrator)
    found = {f"weight {name}": value.detach().clone() for name, value in loaded.model.named_parameters()}
    for name, content in pruned.files.items():
        if name.endswith(".json"):
            found[f"file {name}"] = torch.tensor(json.loads(content)["blocks"])
    for compared in (0, 5, 7):
        with counting(loaded.model, passed, 1):
            losses, divergence = measure_beside(
                loaded.model, dense.model, compared, WINDOWS, 2, CPU, QUIET, world=world
            )  # fmt: skip
        found[f"losses beside {compared}"] = losses
        if world.size > 1:  # the same model, so that nothing but the batches is another one
            alone = measure_beside(loaded.model, dense.model, compared, WINDOWS, 2, CPU, QUIET)
            assert_close(losses, alone[0], atol=1e-5, rtol=1e-5)
            assert (divergence is None) == (alone[1] is None)
            if divergence is not None and alone[1] is not None:
                assert vars(divergence) == pytest.approx(vars(alone[1]), rel=1e-4, abs=1e-6)
    found["passed"] = torch.tensor(passed)
    return found


@contextmanager
def counting(model: Any, counts: list[int], place: int) -> Iterator[None]:
    """Context in which rows are counted that Linears of a model multiply."""

    def count(module: Any, args: Any) -> None:
        counts[place] += args[0].shape[:-1].numel()

    hooks = [part.register_forward_pre_hook(count) for part in model.modules() if isinstance(part, torch.nn.Linear)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def statistics_of(folder: Path, world: World, cached: bool) -> dict[str, Tensor]:
    """All statistics of all Linears, behind dense blocks, and of whole blocks.

    Cached: computed and not kept, computed and kept, served from memory, and from disk, where they are the same bits.
    """
    loaded = HubModel(name=str(folder / "gpt2")).load(CPU, seed=0)
    new = (lambda: DenseCache(loaded.model, loaded.fingerprint(), CPU)) if cached else lambda: None
    held, cache = dense_cache.MEMORY, new()
    ways = [(0, new()), (held, cache), (held, cache), (0, new())] if cached else [(held, None)]
    calibrator, found = Calibrator(WINDOWS, "dense", 2, world=world), dict[str, Tensor]()
    for memory, facts in ways:
        dense_cache.MEMORY, anatomy, now = memory, Anatomy(loaded.model, facts), dict[str, Tensor]()
        needs = {name: ALL for name, _ in anatomy.linears()}
        for of_block in block_statistics(anatomy, needs, 0, calibrator):
            for name, of in of_block.items():
                values = {field: getattr(of, field) for field in ("mean", "tokens", *ALL)}
                now |= {f"{field} {name}": value for field, value in values.items()}
        assert all(torch.equal(now[name], value) for name, value in found.items())
        found = now
    dense_cache.MEMORY, anatomy = held, Anatomy(loaded.model, cache)
    found["influence"] = torch.tensor(block_influence(calibrator, anatomy))
    found["distances"] = torch.tensor(_distances(calibrator, anatomy))
    return found


PROGRAMS: dict[str, Callable[[Path, World, bool], dict[str, Tensor]]] = {"statistics": statistics_of} | {
    name: lambda folder, world, cached, case=case: figures_of(case, folder, world, cached)
    for name, case in CASES.items()
}


def main(place: str, size: str, *names: str) -> None:
    """Runs programs in one of `size` processes and writes down what they found."""
    os.environ["PRUNE_LAB_CACHE"] = f"{place}/cache-{size}"
    world = join(CPU)
    assert world.size == int(size)
    check_exchange(world)
    for name in names:
        found = PROGRAMS[name](Path(place), world, True)
        save_file({key: value.contiguous().clone() for key, value in found.items()}, file_of(place, size, world, name))


def check_exchange(world: World) -> None:
    """What processes tell each other, of equal and unequal parts."""
    size, rank = world.size, world.rank
    for count in (size, 2 * size + 1):
        for dtype in (torch.float32, torch.float64, torch.int64):
            whole = torch.arange(3 * count, dtype=dtype).view(count, 3)
            assert torch.equal(world.over(count).gather(world.part(whole)), whole)
            turned = whole.T.clone().T  # not contiguous
            world.sum([turned])
            assert torch.equal(turned, size * whole)
    assert world.over(size - 1) == World()
    assert [world.all(True), world.all(rank > 0), world.all(False)] == [True, False, False]
    weights = [torch.ones(4, 6, dtype=torch.bfloat16), torch.zeros(5), torch.ones(3, 2, dtype=torch.bool)]
    assert world.has_same([*weights, torch.tensor(1.0), torch.zeros(0, 3), torch.ones(2, 3, 4).movedim(0, 2)])
    assert not world.has_same([torch.tensor(float(rank))])
    assert world.has_same(weights)
    for changed in weights:  # in one process alone: two places exchange what they hold, which leaves the sum
        before = changed.clone()
        changed.flatten()[0] = 0 if rank else 1
        changed.view(-1)[:2] = torch.tensor([1, 0] if rank else [0, 1])
        assert not world.has_same(weights)
        changed.copy_(before)


def file_of(place: str | Path, size: str, world: World, name: str) -> Path:
    return Path(place) / f"{name} in {world.rank} of {size}.safetensors"


QUICK = ["statistics", "wanda", "sparsegpt", "obs with refit", "taylor", "bi"]
SLOW = [name for name in PROGRAMS if name not in QUICK]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the models."""
    found = tmp_path_factory.mktemp("shared")
    for family in ("llama", "gpt2"):
        make_folder(found / family, family)
    tiny_folder(found / "mixtral", "mixtral")
    return found


def run(place: Path, size: int, names: list[str]) -> Path:
    done = together(HERE, str(place), str(size), *names, module="test_shared_windows", size=size)
    assert done.returncode == 0, done.stderr
    return place


@pytest.fixture(scope="module")
def quick(place: Path) -> Path:
    """What two processes found."""
    return run(place, 2, QUICK)


@pytest.fixture(scope="module")
def others(place: Path) -> Path:
    """What two processes found with the other methods."""
    return run(place, 2, SLOW)


def check(place: Path, name: str, size: int) -> None:
    """Every process has the same bits, and what one process has within rounding, zeros where it has them.

    Losses of a pruned model differ by more than its weights do.
    """
    alone = PROGRAMS[name](place, World(), False)
    parts = [load_file(file_of(place, str(size), World(rank, size), name)) for rank in range(size)]
    passed = [part.pop("passed", torch.zeros(2)) for part in parts]
    whole = alone.pop("passed", torch.zeros(2))
    if name in ("wanda", "sparsegpt", "obs with refit", "taylor"):
        of_all = sum(passed, torch.zeros(2))
        assert of_all[0] == whole[0]
        assert size > 2 or of_all[1] == whole[1]  # each of three takes the two windows that are not compared
        assert max(passed[0] / whole) < 0.6  # 4 of 7 windows
    first, *others = parts
    assert first.keys() == alone.keys()
    for key, value in first.items():
        assert all(torch.equal(value, other[key]) for other in others), key
        near = {"atol": 5e-4, "rtol": 2e-3} if key.startswith("losses") else {"atol": 2e-5, "rtol": 2e-4}
        assert_close(value, alone[key], **near, msg=lambda said, key=key: f"{key}: {said}")
        if key.startswith("weight"):
            assert torch.equal(value == 0, alone[key] == 0), key


@pytest.mark.parametrize("name", QUICK)
def test_two_processes_find_what_one_does(quick: Path, name: str) -> None:
    check(quick, name, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_two_processes_find_what_one_does_by_other_methods(others: Path, name: str) -> None:
    check(others, name, 2)


@pytest.mark.slow
def test_three_processes_find_what_one_does(place: Path) -> None:
    names = ["statistics", "sparsegpt", "few windows"]
    run(place, 3, names)
    for name in names:
        check(place, name, 3)


def test_the_table_on_paper_is_the_script_s() -> None:
    page = (HERE.parent / "docs/processes.md").read_text(encoding="utf-8")
    table = page.partition("<!-- on paper: begin -->")[2].partition("<!-- on paper: end -->")[0]
    assert table.strip() == runpy.run_path(str(HERE / "benchmarks/on_paper.py"))["table"]()


if __name__ == "__main__":
    main(*sys.argv[1:])
