"""hydra/sweeper=grids: the union of several grids as one sweep, and how its jobs are put together in tables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import Cli

from prune_lab.config.recipes import check
from prune_lab.errors import Refused
from prune_lab.results.series import Position, pivot, position
from prune_lab.results.summary import Summary

RECIPE = """
defaults:
  - config
  - override hydra/sweeper: grids
  - override tracking: none
  - override measure: quality_only
  - _self_
hydra:
  mode: MULTIRUN
  sweep:
    dir: sweep
  sweeper:
    params: {seed: 1}
    grids:
      - {method: "magnitude,random", amount: "0.3,0.5"}
      - {method: "magnitude,random", method.pattern: "2:4"}
      - {method: "random", amount: "0.5", method.scope: layer}
      - {method: "magnitude", amount: "0.5"}
"""


def test_the_union_of_grids_runs_once_each_and_the_command_line_overrides_all(
    small: list[str], cli: Cli, tmp_path: Path
) -> None:
    """The last grid repeats a job of the first; amount=0.4 takes the place of every grid's amounts."""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.yaml").write_text(RECIPE)
    options = [override for override in small if not override.startswith("measure=")]
    done = cli("-cd", "recipes", "-cn", "mine", *options, "amount=0.4")
    assert done.returncode == 0, done.stderr
    jobs = json.loads((tmp_path / "sweep" / "results.json").read_text())
    asked = [(j["choices"]["method"], j["config"]["method"]["pattern"], j["config"]["amount"]) for j in jobs]
    assert asked == [
        ("magnitude", None, 0.4), ("random", None, 0.4), ("magnitude", "2:4", 0.4), ("random", "2:4", 0.4),
        ("random", None, 0.4),
    ]  # fmt: skip
    assert {job["config"]["seed"] for job in jobs} == {1}
    tables = (tmp_path / "sweep" / "results.md").read_text().split("\n\n")
    assert [line.split(" | ")[0] for line in tables[0].splitlines()] == [
        "| perplexity", "| ---", "| magnitude", "| random", "| random scope=layer",
    ]  # fmt: skip


def check_recipe(folder: Path, hydra: str) -> None:
    (folder / "mine.yaml").write_text(f"defaults:\n  - config\n  - override hydra/sweeper: grids\n{hydra}")
    check(["-cd", str(folder), "-cn", "mine"])


def test_grids_are_data_and_nothing_else(tmp_path: Path) -> None:
    check_recipe(tmp_path, 'hydra: {sweeper: {grids: [{method: "wanda,ria", amount: "0.1,0.2"}]}}\n')


@pytest.mark.parametrize(
    "grid",
    [
        "{hydra.launcher: joblib}", "{+hydra.callbacks.x._target_: os.mkdir}", "{hydra/launcher: joblib}",
        "{name: '${oc.env:HOME}'}", "{method: ../../etc/passwd}",
    ],
)  # fmt: skip
def test_a_grid_cannot_reach_hydra_the_machine_or_other_folders(tmp_path: Path, grid: str) -> None:
    with pytest.raises(Refused, match=r"hydra\.sweeper\.grids\.0\."):
        check_recipe(tmp_path, f"hydra: {{sweeper: {{grids: [{grid}]}}}}\n")


def test_a_swept_name_cannot_lead_the_sweep_out_of_the_working_folder(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"hydra\.sweep\.dir"):
        check_recipe(tmp_path, 'hydra: {sweep: {dir: "a/${name}"}, sweeper: {grids: [{name: "../../x"}]}}\n')


def job(*overrides: str, amount: float = 0.5, method: str = "wanda") -> Summary:
    return Summary(
        "FINISHED", choices={"method": method}, overrides=list(overrides), metrics={"amount/requested": amount}
    )


@pytest.mark.parametrize(
    ("summary", "expected"),
    [
        (job("method=wanda", "amount=0.5", "seed=2"), Position("wanda", "0.5")),
        (job("amount=0.30000000000000004", amount=0.30000000000000004), Position("wanda", "0.3")),
        (job("method=wanda", r"method.pattern=2\:4"), Position("wanda", "2:4")),
        (job("method=depth", "method.by=bi", "name=x", method="depth"), Position("depth by=bi", "0.5")),
        (job("+recovery.steps=5", "method.pattern=null"), Position("wanda recovery.steps=5", "0.5")),
        (job("method=wanda", "method.amount=0.3", amount=0.3), Position("wanda", "0.3")),
        (job("export=none"), Position("wanda", "0.5")),
        (job("export=hf"), Position("wanda", "0.5")),
        (job("export=bitmask"), Position("wanda export=bitmask", "0.5")),
    ],
)
def test_a_series_is_everything_but_amount_pattern_and_seed(summary: Summary, expected: Position) -> None:
    assert position(summary, shared=["name=x"]) == expected


def test_the_table_has_means_and_ranges_over_seeds() -> None:
    found = [
        (Position("a", "0.5"), 10.0), (Position("a", "0.5"), 12.0), (Position("a", "2:4"), 20.0),
        (Position("b", "0.25"), 5.0), (Position("b", "0.5"), 1234.5),
    ]  # fmt: skip
    assert pivot(found) == [
        ["perplexity", "0.25", "0.5", "2:4"],
        ["a", "", "11 [10, 12]", "20"],
        ["b", "5", "1234", ""],
    ]
    assert pivot(found[:3]) == []  # one series
    steps = ["16:32", "0.5", "1e-05", "2:4", "4:8", "1:4", "0.25"]
    header, *_ = pivot([(Position(series, step), 1.0) for series in "ab" for step in steps])
    assert header == ["perplexity", "1e-05", "0.25", "0.5", "16:32", "2:4", "4:8", "1:4"]  # as the plot has them
    assert pivot([found[0], found[4]]) == []  # one step
