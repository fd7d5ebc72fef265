"""hydra/sweeper=budget: one command from a bound to the exported model, and what it costs to ask again."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest
from conftest import Cli
from transformers import AutoModelForCausalLM
from warm import start_module

from prune_lab.config.recipes import check

RECIPE = """
defaults:
  - config
  - override hydra/sweeper: budget
  - override method: shape
  - override measure: quality_only
  - override tracking: none
  - override export: hf
  - _self_
bound: ["params/total<=20000"]
hydra:
  mode: MULTIRUN
  sweep:
    dir: sweep
  sweeper:
    amounts: [0.25, 0.5]
    round_to: 8
    shapes: 2
"""
TEXT = ["dataset.calibration.n_samples=8", "dataset.calibration.seq_len=32"]


@pytest.fixture
def asked(small: list[str], tmp_path: Path) -> list[str]:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.yaml").write_text(RECIPE)
    check(["-cd", str(tmp_path / "recipes"), "-cn", "mine"])
    options = [override for override in small if not override.startswith(("measure=", "measure.prompt", "measure.dec"))]
    return ["-cd", "recipes", "-cn", "mine", *options, *TEXT]


def test_from_a_bound_to_an_exported_model(asked: list[str], cli: Cli, tmp_path: Path) -> None:
    done = cli(*asked)
    assert done.returncode == 0, done.stderr
    sweep = tmp_path / "sweep"
    jobs = json.loads((sweep / "results.json").read_text())
    assert [job["choices"]["method"] for job in jobs] == ["damage", "shape", "shape", "shape"]
    *candidates, final = jobs[1:]
    best = min(candidates, key=lambda job: job["metrics"]["shape/kl"])
    keys = ("blocks", "mlp", "heads", "hidden")
    assert [final["config"]["method"][key] for key in keys] == [best["config"]["method"][key] for key in keys]
    assert final["config"]["method"]["held_out"] == 0
    assert final["metrics"]["params/total"] <= 20000
    model = AutoModelForCausalLM.from_pretrained(sweep / "3" / "export")
    assert sum(p.numel() for p in model.parameters()) == final["metrics"]["params/total"]
    assert not (sweep / "1" / "export").exists()
    answer = (sweep / "answer.md").read_text()
    assert answer.startswith("**Within params/total <= 20,000** (4 runs): `method=shape method.")
    assert answer.splitlines()[0].replace("*", "").replace("`", "") in done.stdout
    for job in candidates:
        total = f"{job['metrics']['params/total']:,.0f}"
        assert f"{total} (predicted {total})" in answer
    assert (sweep / "results.md").read_text().startswith(answer)
    for plot in ("budget_front.png", "budget_axes.png"):
        assert (sweep / plot).read_bytes().startswith(b"\x89PNG")

    # Another bound: the damage is there already, and nothing passes the model for it.
    again = cli(*asked, "bound=['size/disk_mb<=0.09','quality/kl<=1e6']", "hydra.sweep.dir=other")
    assert again.returncode == 0, again.stderr
    first = json.loads((tmp_path / "other" / "results.json").read_text())
    assert first[0]["folder"] == jobs[0]["folder"] or first[0]["metrics"] == jobs[0]["metrics"]
    assert first[-1]["metrics"]["size/disk_mb"] <= 0.09
    axes = json.loads((sweep / "0" / "damage.json").read_text())["axes"]
    kept = list((tmp_path / "cache" / "damage").iterdir())
    assert len(kept) == sum(len(axis["kl"]) for axis in axes.values())


def test_bounds_on_quality_alone_look_for_the_cheapest(asked: list[str], cli: Cli, tmp_path: Path) -> None:
    done = cli(*asked, "bound=['quality/kl<=0.3']", "export=none")
    assert done.returncode == 0, done.stderr
    jobs = json.loads((tmp_path / "sweep" / "results.json").read_text())[1:]
    kept = [job for job in jobs if job["metrics"]["quality/kl"] <= 0.3]
    assert jobs[-1]["metrics"]["params/total"] == min(job["metrics"]["params/total"] for job in kept)
    assert jobs[-1]["metrics"]["params/total"] < jobs[-1]["metrics"]["params/dense_total"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["bound=[]"], "bound is required"),
        (["bound=['params/total<=10M']"], "its unit is parameters"),
        (["bound=['throughput/decode_tokens_per_s<=3']"], "is better when higher"),
        (["method.mlp=16"], "method.mlp=16: the shape is what is looked for"),
        (["method=wanda"], "method=wanda: the shape is what is looked for"),
        (["seed=0,1"], "seed=0,1: the shape is what is looked for"),
        (["hydra.sweeper.shapes=0"], "hydra.sweeper.shapes=0 must be at least 1"),
        (["hydra.sweeper.best=params/reduction"], "is better when higher"),
    ],
)
def test_what_is_no_search_is_refused(asked: list[str], cli: Cli, arguments: list[str], says: str) -> None:
    done = cli(*asked, *arguments)
    assert done.returncode == 2
    assert says in done.stderr


def test_a_bound_that_nothing_keeps_to_names_the_nearest(asked: list[str], cli: Cli, tmp_path: Path) -> None:
    done = cli(*asked, "bound=['params/total<=100']")
    assert done.returncode == 1
    assert "the least params/total of all shapes that were looked at is" in done.stderr
    assert "no shape" in (tmp_path / "sweep" / "answer.md").read_text()


@pytest.mark.slow
@pytest.mark.process
def test_a_search_that_is_killed_goes_on(asked: list[str], cli: Cli, tmp_path: Path) -> None:
    """At any time: what was finished is not done again."""
    running = start_module("prune_lab", asked, tmp_path, [tmp_path / "stdout", tmp_path / "stderr"])
    deadline = time.monotonic() + 300
    while not (tmp_path / "sweep" / "1" / "summary.json").exists():
        assert running.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    running.send_signal(signal.SIGKILL)
    running.wait(60)
    finished = [path for path in (tmp_path / "cache" / "damage").iterdir() if not path.name.startswith(".")]
    stamps = {path: (path / "facts.json").read_bytes() for path in finished}
    done = cli(*asked)
    assert done.returncode == 0, done.stderr
    assert {path: (path / "facts.json").read_bytes() for path in finished} == stamps
    assert "**Within" in (tmp_path / "sweep" / "answer.md").read_text()
