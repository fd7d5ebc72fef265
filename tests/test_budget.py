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


def test_keys_of_what_a_run_leaves_out_go_with_it(asked: list[str], cli: Cli, tmp_path: Path) -> None:
    """Bytes of a GGUF file are compared as such, and only the winner is trained, though both come with keys."""
    keys = ["export=gguf", "export.type=f16", "recovery=finetune", "recovery.steps=2", "hydra.sweeper.axes=[mlp,heads]"]
    done = cli(*asked, *keys, "bound=['size/disk_mb<=0.06']")
    assert done.returncode == 0, done.stderr
    jobs = json.loads((tmp_path / "sweep" / "results.json").read_text())
    candidates = [
        job for job in jobs if job["config"]["method"].get("held_out") and job["choices"]["method"] == "shape"
    ]
    assert {job["choices"]["recovery"] for job in jobs[:-1]} == {"none"}
    assert jobs[0]["choices"]["export"] == "none"
    final = jobs[-1]
    assert final["choices"]["recovery"] == "finetune"
    (same,) = [job for job in candidates if job["metrics"]["params/total"] == final["metrics"]["params/total"]]
    assert same["metrics"]["size/disk_mb"] == pytest.approx(final["metrics"]["size/disk_mb"], rel=1e-3)
    assert (tmp_path / "sweep" / str(len(jobs) - 1) / "export").is_dir()


def test_keys_that_a_recipe_itself_sets_are_kept(asked: list[str], cli: Cli, tmp_path: Path) -> None:
    recipe = RECIPE.replace("export: hf", "export: gguf") + "export:\n  type: f16\n"
    (tmp_path / "recipes" / "mine.yaml").write_text(recipe)
    done = cli(*asked, "hydra.sweeper.shapes=1", "hydra.sweeper.axes=[mlp]", "bound=['params/total<=22000']")
    assert done.returncode == 0, done.stderr


def test_one_count_of_one_axis_is_enough_for_a_cost_that_is_fitted(asked: list[str], cli: Cli, tmp_path: Path) -> None:
    """And a bound that the dense model keeps is kept by it."""
    keys = ["hydra.sweeper.axes=[heads]", "export=none"]
    done = cli(*asked, *keys, "bound=['compute/macs_per_token<=1e9','shape/kl<=1e9']")
    assert done.returncode == 0, done.stderr
    answer = (tmp_path / "sweep" / "answer.md").read_text()
    assert "the dense model, as it is; KL 0" in answer.splitlines()[0]
    assert "nan" not in answer
    assert "is not kept" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["bound=[]"], "bound is required"),
        (["bound=['params/total<=10M']"], "its unit is parameters"),
        (["bound=['throughput/decode_tokens_per_s<=3']"], "is better when higher"),
        (["method.mlp=16"], "method.mlp=16: the shape is what is looked for"),
        (["method=wanda"], "method=wanda: the shape is what is looked for"),
        (["seed=0,1"], "seed=0,1: the shape is what is looked for"),
        (["hydra.sweeper.shapes=0"], "prune_lab: hydra.sweeper.shapes=0 must be at least 1"),
        (["bound=3"], "bound=3 is not a list of METRIC<=NUMBER"),
        (["bound=null"], "bound=None is not a list of METRIC<=NUMBER"),
        (["bound=['memory/peak_mb<=9']"], "memory/peak_mb would not be measured; give measure.memory=true"),
        (["bound=['time/measure_s<=9']"], "time/measure_s is time that a run takes"),
        (["hydra.sweeper.best=quality/kl"], "hydra.sweeper.best=quality/kl is a quality"),
        (["hydra.sweeper.best=params"], "hydra.sweeper.best: 'params' is not a metric"),
        (["hydra.sweeper.round_to=0"], "prune_lab: hydra.sweeper.round_to=0 must be at least 1"),
        (["hydra.sweeper.axes=[heads,query_heads]"], "prune_lab: hydra.sweeper.axes: of heads and query_heads one"),
        (["hydra.sweeper.amounts=[0.5,0.2]"], "prune_lab: hydra.sweeper.amounts=[0.5, 0.2] must rise"),
        (["hydra.sweeper.held_out=8"], "hydra.sweeper.held_out=8 leaves no window"),
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


def test_a_quality_that_no_candidate_keeps_names_the_nearest(asked: list[str], cli: Cli, tmp_path: Path) -> None:
    done = cli(*asked, "bound=['params/total<=20000','quality/kl<=1e-9']", "hydra.sweep.dir=none")
    assert done.returncode == 1
    assert "the least quality/kl that was measured is" in done.stderr


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
