"""The benchmark for GPUs, on a CPU: what it counts beside other counts, and that every stage of it is there."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from prune_lab.errors import Refused
from prune_lab.measure.macs import count_macs
from prune_lab.models.anatomy import Anatomy
from prune_lab.system.device import Device

PLACE = Device(torch.device("cpu"), torch.bfloat16)


@pytest.fixture(scope="module")
def gpu() -> Iterator[Any]:
    """The script, as it finds the modules beside it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(Path(__file__).parent / "benchmarks"), *sys.path])
        import gpu

        yield gpu


@pytest.fixture(scope="module")
def rates(gpu: Any) -> Any:
    """A device that moves 2 bytes a second, and so on."""
    return gpu.floors.Rates(moved=2.0, from_host=0.5, bfloat16=8.0, tf32=4.0, float32=1.0)


def test_a_step_takes_as_long_as_the_slowest_of_what_goes_on_at_once(gpu: Any, rates: Any) -> None:
    step = gpu.floors.Step
    assert step(moved=6).seconds(rates) == 3
    assert step(moved=6, from_host=2).seconds(rates) == 4
    assert step(moved=6, bfloat16=16, float32=3).seconds(rates) == 5
    assert gpu.floors.seconds([step(moved=6), step(bfloat16=16)], rates) == 5


def test_floors_are_of_the_model_that_is_built(gpu: Any, rates: Any) -> None:
    """Its matrices by its own modules, its products by the project's count of multiply-adds."""
    stages = gpu.Stages(PLACE, rates, time.perf_counter() + 1e6)
    case, floors = gpu.Case(stages, "tiny", gpu.SMALL), gpu.floors
    model, shape = case.build(), case.shape
    anatomy = Anatomy(model)
    assert [tuple(linear.weight.shape) for _, linear in anatomy.linears_by_block()[0]] == shape.matrices
    assert sum(weight.numel() for weight in model.parameters()) == shape.parameters
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    (step,) = floors.perplexity(shape, tokens=640, seq_len=64)  # a token sees 32 on average
    assert step.bfloat16 == 640 * 2 * count_macs(anatomy, 32).total


def test_floors_by_hand(gpu: Any) -> None:
    """hidden 4, 8 channels, 3 blocks, 2 heads of which 1 KV head, vocabulary 10: 144 weights a block, head 40."""
    floors, shape = gpu.floors, gpu.Shape(4, 8, 3, 2, 1, 10, tied=True)
    assert shape.of_block == 16 + 8 + 8 + 16 + 3 * 32
    assert shape.parameters == 3 * (144 + 8) + 4 + 40
    assert [step.moved for step in floors.magnitude(shape)] == [3 * 144 * (2 + 2 + 2 + 1)]
    assert [step.moved for step in floors.structured(shape, kept=2)] == [3 * 96 * 2, 2 * 3 * 24 * 2]
    assert [step.moved for step in floors.decode(shape)] == [2 * (3 * 144 + 40)]
    assert [step.moved for step in floors.decode(shape, sparse=True)] == [3 * 144 + 3 * 144 / 8 + 2 * 40]
    attention = 4 * 10 * 1 * 4  # 10 tokens in windows of 2
    forward, _ = floors.wanda(shape, tokens=10, seq_len=2)
    assert forward.bfloat16 == 3 * (20 * (144 - 32) + attention) + 2 * (20 * 144 + attention)
    *_, gram, solve = floors.sparsegpt(shape, tokens=10, seq_len=2)
    assert gram.bfloat16 == 3 * 10 * (3 * 16 + 64)
    changes = 16 * (4 + 2 + 2 + 4 + 8 + 8) + 64 * 4
    assert solve.float32 == pytest.approx(3 * ((3 * 64 + 512) / 3 + changes))


def test_every_stage_runs_without_a_gpu(gpu: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = {row.stage: row for row in gpu.main(["tiny"], "cpu", 1e6, tmp_path)}
    timed = ["build", "perplexity", "structured", "magnitude", "magnitude 2:4", "wanda", "sparsegpt"]
    timed += ["prefill, dense", "prefill, structured", "decode, dense", "decode, structured"]
    timed += ["perplexity, streamed", "wanda, streamed"]
    assert {stage for stage, row in rows.items() if row.seconds and row.floor} == set(timed)
    assert set(rows) - set(timed) == {"2:4 kernels"}
    assert rows["2:4 kernels"].note.startswith("refused: post=sparse_2_4 needs a GPU")
    for stage in ("structured", "magnitude", "magnitude 2:4", "wanda", "sparsegpt", "wanda, streamed"):
        assert rows[stage].note == "0.5000 removed"
    assert rows["perplexity, streamed"].note == rows["perplexity"].note
    assert not list(tmp_path.iterdir())
    printed = capsys.readouterr().out
    assert torch.__version__ in printed.splitlines()[0]
    assert printed.count("\n| tiny | ") == len(timed) + 1


def test_what_does_not_fit_is_skipped_and_what_fails_is_not_the_end(gpu: Any, rates: Any) -> None:
    def fail(error: Exception) -> None:
        raise error

    stages = gpu.Stages(PLACE, rates, time.perf_counter() + 100, shown=False)
    assert stages.attempt("tiny", "slow", 1e4, lambda: 1) is None  # expected at 30 times its floor
    assert stages.attempt("tiny", "broken", 1e-9, lambda: fail(RuntimeError("out of memory\nmore"))) is None
    assert stages.attempt("tiny", "refused", 1e-9, lambda: fail(Refused("not here"))) is None
    assert stages.attempt("tiny", "good", 1e-15, lambda: 1).result == 1
    assert stages.attempt("tiny", "good", 1e-3, lambda: 1) is None  # it was seen to take many times its floor
    notes = [row.note for row in stages.rows]
    assert notes[0].startswith("skipped: 300000 s expected, ")
    assert notes[1:3] == ["failed: out of memory", "refused: not here"]
    assert notes[3].startswith("skipped: ")
