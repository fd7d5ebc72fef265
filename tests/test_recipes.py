"""The recipes of experiments/: each composes, says what it asks, and runs in a shortened form on small things."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, Cli, make_folder
from hydra import compose, initialize_config_dir
from test_hub import c4, wikitext  # noqa: F401 - fixtures

from prune_lab.config import parts as config
from prune_lab.results.summary import flatten

FOLDER = ROOT / "experiments"
RECIPES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
STEPS = ["recovery.steps=16", "recovery.batch_size=2"]
SHORT = [*STEPS, "recovery.validate_every=8", "recovery.validate_windows=2"]  # where recovery=none is not the first one
OWN_TEXT = ["dataset.calibration.source=own", "dataset.calibration.name=null", "dataset.calibration.n_samples=4"]
OWN_TESTS = [*OWN_TEXT, "dataset.test_path=null"]
FEW_PAIRS = ["measure.prompt_tokens=16", "measure.decode_tokens=2", "measure.pairs=10"]
# What makes each recipe short; a key given on the command line takes the place of that key in every grid.
SHORTENED: dict[str, list[str]] = {
    "allocation": ["amount=0.6", "dataset.calibration.n_samples=4"],
    "bisect": ["hydra.sweeper.step=0.35"],
    "budget": ["dataset.calibration.n_samples=8", "hydra.sweeper.shapes=1", "hydra.sweeper.amounts=[0.3,0.6]"],
    "depth_vs_width": ["amount=0.5", "dataset.calibration.n_samples=4", *STEPS, *FEW_PAIRS],
    "during_vs_after": SHORT,
    "experts": ["amount=0.5", "seed=0", "dataset.calibration.n_samples=4"],
    "experts_recover": ["dataset.calibration.n_samples=4", *STEPS],
    "first_look": ["amount=0.5", *FEW_PAIRS],
    "methods": ["amount=0.5", "seed=0", "dataset.calibration.n_samples=4"],
    "paper_wikitext2": ["method=magnitude,sparsegpt", "dataset.calibration.n_samples=4"],
    "parallel": ["amount=0.5", "method=magnitude,random", "measure=quality_only"],
    "prune_then_quantize": ["amount=0.4", "dataset.calibration.n_samples=4", "post.group_size=8"],
    "ray": [],  # needs a cluster: tests/test_launchers.py
    "real_allocation": OWN_TESTS,
    "real_budget": [*OWN_TESTS, "hydra.sweeper.shapes=1", "hydra.sweeper.amounts=[0.3,0.6]"],
    "real_depth": ["amount=0.5", *OWN_TEXT],
    "real_depth_vs_width": ["amount=0.5", *OWN_TESTS],
    "real_first_sweep": ["amount=0.5", *OWN_TESTS, *FEW_PAIRS],
    "real_methods": ["amount=0.5", *OWN_TESTS],
    "real_prune_then_quantize": ["amount=0.4", *OWN_TESTS, "post.group_size=8"],
    "real_recover": [],  # chooses its own recoveries and steps: the job is that of `recover`
    "real_recover_110m": [*OWN_TESTS, *SHORT, *FEW_PAIRS, "method.mlp=32", "measure.tasks=[]"],
    "real_structured": [*OWN_TEXT, "method.refit=inputs"],
    "real_targets": [],  # the keys are those of real_structured and real_unstructured
    "real_unstructured": OWN_TEXT,
    "recover": STEPS,
    "schedules": SHORT,
    "scores_and_structures": ["dataset.calibration.n_samples=4"],
    "search": ["hydra.sweeper.n_trials=2", "dataset.calibration.n_samples=4", "post.group_size=8"],
    "sensitivity": ["dataset.calibration.n_samples=4"],
    "slurm": [],  # needs Slurm: tests/test_launchers.py runs it with submitit_local
    "train_tiny": SHORT,
    "train_tiny_moe": SHORT,
}


def recipe(name: str) -> dict[str, Any]:
    found = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


def test_every_recipe_is_here() -> None:
    assert sorted(SHORTENED) == RECIPES


def test_a_recipe_says_what_it_asks_and_how_to_run_it() -> None:
    for name in RECIPES:
        text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
        for heading in ("# Question: ", "# Command:  "):
            assert text.count(heading) == 1, f"{name}: {heading}"
        assert "# Hardware: " in text or "# Needs: " in text, name
        assert f"-cn {name}" in text.split("# Command:  ")[1]
        assert f"`{name}`" in (FOLDER / "README.md").read_text(encoding="utf-8")


def test_the_documents_count_the_runs_of_the_methods_recipe() -> None:
    grids = recipe("methods")["hydra"]["sweeper"]["grids"]
    runs = sum(math.prod(len(str(value).split(",")) for value in grid.values()) for grid in grids)
    for document in ("README.md", "experiments/README.md"):
        assert f"{runs} runs" in (ROOT / document).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", RECIPES)
def test_every_job_of_a_recipe_is_built(name: str) -> None:
    """Each grid's first values: what a typing error in a key or an option would stop."""
    config.register_schema()
    sweeper = recipe(name).get("hydra", {}).get("sweeper", {})
    jobs = sweeper.get("grids") or sweeper.get("candidates") or [{}]
    with initialize_config_dir(config.CONF_DIR, version_base="1.3"):
        for job in jobs:
            given = {**(sweeper.get("params") or {}), **job}
            overrides = [f"{key}={first(value)}" for key, value in given.items()]
            parts = config.build_parts(compose("config", [*overrides, *own_keys(name)]))
            assert parts.method is not None


def first(value: Any) -> Any:
    """The first of the values that are swept: of a list, choice(...), interval(...) or range(...); or the one list."""
    if isinstance(value, str) and re.fullmatch(r"\[[^\]]*\]", value):
        return value
    if isinstance(value, str) and (found := re.match(r"(choice|interval|range)\((.*)\)$", value)):
        value = found[2]
    return value.split(",")[0] if isinstance(value, str) else value


def own_keys(name: str) -> list[str]:
    """What the recipe and those it builds on choose and set, as overrides."""
    tree, found = recipe(name), []
    for entry in tree["defaults"]:
        if isinstance(entry, str) and entry not in ("config", "_self_"):
            found += own_keys(entry)
        elif isinstance(entry, dict):
            ((key, option),) = entry.items()
            if "hydra" not in key:
                found.append(f"{key.removeprefix('override ')}={option}")
    leaves = flatten({key: value for key, value in tree.items() if key not in ("defaults", "hydra")})
    return found + [f"{key}={'null' if value is None else value}" for key, value in leaves.items()]


SWEEP = """
defaults:
  - config
  - override tracking: none
  - override measure: quality_only
  - override export: hf
  - _self_
hydra:
  mode: MULTIRUN
  sweep:
    dir: sweep
  sweeper:
    params: {method: magnitude, method.pattern: "2:4,4:8"}
"""


def test_the_command_on_a_model_card_repeats_the_job(small: list[str], cli: Cli, tmp_path: Path) -> None:
    """A shell runs the line as it stands: one run, not the recipe's sweep, and the one that was finished."""
    (tmp_path / "my recipes").mkdir()
    (tmp_path / "my recipes" / "mine.yaml").write_text(SWEEP)
    options = [override for override in small if not override.startswith("measure=")]
    done = cli("-cd", "my recipes", "-cn", "mine", *options)
    assert done.returncode == 0, done.stderr
    card = (tmp_path / "sweep" / "1" / "export" / "README.md").read_text(encoding="utf-8")
    (command,) = [line.strip() for line in card.splitlines() if line.startswith("    python -m prune_lab ")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    line = f"{command} hydra.run.dir=again"
    again = subprocess.run(line, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    first, second = (
        json.loads((tmp_path / place / "summary.json").read_text(encoding="utf-8")) for place in ("sweep/1", "again")
    )
    assert first["config"]["method"]["pattern"] == "4:8"
    assert second["fingerprint"] == first["fingerprint"]
    assert second["reused_from"]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(name for name, short in SHORTENED.items() if short))
def test_a_recipe_runs_in_a_shortened_form(
    cli: Cli,
    folder: Path,
    corpus: Path,
    wikitext: Path,  # noqa: F811
    c4: Path,  # noqa: F811
    tmp_path: Path,
    name: str,
) -> None:
    if name == "paper_wikitext2":  # an OPT, and corpora in the Hub's layout
        opt = make_folder(tmp_path / "opt", "opt")
        things = [f"model.name={opt}", f"dataset.name={wikitext}", f"dataset.calibration.name={c4}"]
        things += ["dataset.calibration.seq_len=32"]
    elif name.startswith("train_tiny"):  # the shipped models' configs
        things = ["dataset=text", f"dataset.path={corpus}"]
    else:
        things = ["model=hf", f"model.name={folder}", "dataset=text", f"dataset.path={corpus}"]
    few = ["dataset.seq_len=32", "measure.max_windows=4", "tracking=none", "hydra.sweep.dir=sweep", "hydra.run.dir=run"]
    done = cli("-cd", str(FOLDER), "-cn", name, *things, *few, *SHORTENED[name])
    assert done.returncode == 0, done.stderr
    is_sweep = name not in ("real_recover_110m", "sensitivity", "train_tiny", "train_tiny_moe")
    files = (tmp_path / "sweep").glob("*/summary.json") if is_sweep else [tmp_path / "run" / "summary.json"]
    for path in sorted(files):
        summary = json.loads(path.read_text(encoding="utf-8"))
        assert summary["status"] == "FINISHED", summary["reason"]
        calibration = summary["protocol"]["calibration"]
        if name == "paper_wikitext2" and calibration is not None:  # magnitude looks at none
            assert (calibration["source"], calibration["own"]) == ("c4", False)
    assert (tmp_path / "sweep" / "results.md").is_file() == is_sweep
