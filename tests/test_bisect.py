"""hydra/sweeper=bisect: bisection finds what trying every amount finds, and the sweep says what it found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import Cli

from prune_lab.config.recipes import check
from prune_lab.results.bounds import Bound, read_bounds
from prune_lab.sweeps.bisection import Budget, Candidate, answer, read_candidates

QUALITY, SIZE = "quality/perplexity_ratio", "size/disk_mb"


def search(budget: Budget, curve: dict[float, dict[str, float]], step: float) -> Candidate:
    candidate = Candidate(("method=x",), min(curve), max(curve), step, budget.on_quality)
    while (amount := candidate.next_amount()) is not None:
        candidate.tell(amount, curve[amount], budget)
    return candidate


@pytest.mark.parametrize("step", [0.1, 0.02])
def test_bisection_finds_what_trying_every_amount_finds(step: float) -> None:
    for bound in (0.9, 1.0, 1.005, 1.2, 1.4999, 1.5, 9):
        check_bisection(bound, step)


def check_bisection(bound: float, step: float) -> None:
    """Quality falls and size falls with the amount: the largest that keeps to the one, the smallest to the other."""
    amounts = [round(k * step, 10) for k in range(round(0.1 / step), round(0.8 / step) + 1)]
    curve = {a: {QUALITY: 1 + a * a, SIZE: 2.0 - a, "params/reduction": a} for a in amounts}
    for metric, pick in ((QUALITY, max), (SIZE, min)):
        budget = Budget((Bound(metric, bound),))
        within = [a for a in amounts if curve[a][metric] <= bound]
        found = search(budget, curve, step)
        assert (found.best and found.best[0]) == (pick(within) if within else None)
        assert len(found.tried) <= len(amounts).bit_length()


def test_a_run_without_the_metric_is_not_within() -> None:
    """A perplexity that diverged is in no metrics."""
    assert not Budget((Bound(QUALITY, 1e9),)).holds({})


def test_the_answer_names_the_best_and_what_each_came_to() -> None:
    budget = Budget((Bound(QUALITY, 1.1),))
    small, large, none, refused = (Candidate((f"method={n}",), 0.1, 0.8, 0.1, True) for n in ("a", "b", "c", "d"))
    small.best = 0.3, {QUALITY: 1.05, "params/reduction": 0.3}
    large.best = 0.6, {QUALITY: 1.09, "params/reduction": 0.5}
    refused.refused = "it does not fit"
    lines = answer(budget, [small, none, refused, large]).splitlines()
    assert (
        lines[0] == "**Within quality/perplexity_ratio <= 1.1** (0 runs), by params/reduction: `method=b amount=0.6`."
    )
    assert lines[4:] == [
        "| method=b | 0.6 | 0.5 | 1.09 |",
        "| method=a | 0.3 | 0.3 | 1.05 |",
        "| method=c | not within the budget at any amount tried |  |  |",
        "| method=d | it does not fit |  |  |",
    ]
    assert "nothing that was tried" in answer(budget, [none]).splitlines()[0]


@pytest.mark.parametrize(
    ("bound", "best", "says"),
    [
        ([], "", "bound is required"),
        (["latency/decode_speedup<=2"], "", "is better when higher"),
        (["perplexity<=2"], "", "is not a metric"),
        (["size/dsk_mb<=2"], "", "is not a metric"),
        (["quality/dense_perplexity<=2"], "", "is not a metric"),
        ([f"{QUALITY}<=2", f"{SIZE}<=1"], "", "pull the amount both ways"),
        ([f"{QUALITY}<=2"], "model", "not a metric with a better end"),
        ([f"{QUALITY}<=2"], "parameters/reduction", "not a metric with a better end"),
    ],
)
def test_a_budget_that_is_none_is_refused(bound: list[str], best: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Budget(read_bounds(bound), best)


@pytest.mark.parametrize(("low", "high", "step"), [(-0.1, 0.5, 0.1), (0.5, 0.5, 0.1), (0.1, 1.0, 0.1), (0.1, 0.5, 0)])
def test_amounts_that_cannot_be_searched_are_refused(low: float, high: float, step: float) -> None:
    with pytest.raises(ValueError, match="needed is"):
        Candidate((), low, high, step, True)


@pytest.mark.parametrize(
    ("low", "high", "step", "multiples"),
    [
        (0.1, 0.8, 0.25, [0.25, 0.5, 0.75]),  # 0 and 1 are as near to the ends as the first and the last
        (0.1, 0.99, 0.35, [0.35, 0.7]),
        (0.3, 0.9, 0.1, [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]),  # 0.3 / 0.1 is a little below 3
        (0.15, 0.36, 0.2, [0.2]),
    ],
)
def test_only_multiples_between_the_ends_are_tried(
    low: float, high: float, step: float, multiples: list[float]
) -> None:
    """Whatever keeps to the budget; each is tried for some bound."""
    tried = set()
    for bound in (*(1 + a for a in multiples), 0.5):
        candidate = Candidate((), low, high, step, largest=True)
        while (amount := candidate.next_amount()) is not None:
            tried.add(amount)
            candidate.tell(amount, {QUALITY: 1 + amount}, Budget((Bound(QUALITY, bound),)))
    assert sorted(tried) == multiples


@pytest.mark.parametrize("entries", [[], [{"method": "wanda", "amount": 0.5}]])
def test_candidates_have_no_amount(entries: list[dict[str, object]]) -> None:
    with pytest.raises(ValueError, match="without amount"):
        read_candidates(entries)


RECIPE = """
defaults:
  - config
  - override hydra/sweeper: bisect
  - override tracking: none
  - override measure: quality_only
  - _self_
bound: ["size/disk_mb<=0.07"]
hydra:
  mode: MULTIRUN
  sweep:
    dir: sweep
  sweeper:
    candidates:
      - {method: structured}
      - {method: magnitude}
      - {method: structured, method.score: nonsense}
    low: 0.25
    high: 0.75
    step: 0.25
"""


def test_a_search(folder: Path, small: list[str], cli: Cli, tmp_path: Path) -> None:
    """Zeros make no file smaller, so only channels fit; a candidate that is refused does not stop the others."""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.yaml").write_text(RECIPE)
    check(["-cd", str(tmp_path / "recipes"), "-cn", "mine"])
    options = [override for override in small if not override.startswith("measure=")]
    bound = (folder / "model.safetensors").stat().st_size / 1e6 * 0.95
    done = cli("-cd", "recipes", "-cn", "mine", *options, f'bound=["size/disk_mb<={bound}"]')
    assert done.returncode == 1
    jobs = json.loads((tmp_path / "sweep" / "results.json").read_text())
    asked = [(job["config"]["method"].get("score"), job["config"]["amount"], job["status"]) for job in jobs[:3]]
    assert asked == [("obs", 0.5, "FINISHED"), (None, 0.5, "FINISHED"), ("nonsense", 0.5, "FAILED")]
    said = (tmp_path / "sweep" / "results.md").read_text().splitlines()
    assert "by quality/perplexity: `method=structured amount=" in said[0]
    assert said[0].replace("*", "").replace("`", "") in done.stdout
    assert any("| method=magnitude | not within the budget" in line for line in said)
    assert any("nonsense" in line and "score" in line for line in said)


def test_what_is_looked_for_is_not_given(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.yaml").write_text(RECIPE)
    done = cli("-cd", "recipes", "-cn", "mine", "amount=0.5")
    assert done.returncode == 2
    assert "amount=0.5: the amount is what is looked for" in done.stderr
