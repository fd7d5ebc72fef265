"""What holds for any scores, any schedule and any configuration, not only for the examples of the other tests."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prune_lab.errors import Refused
from prune_lab.fingerprint import fingerprint
from prune_lab.pruning.selection import Pattern, count_to_remove, keep_global, keep_layer, keep_pattern, keep_rows
from prune_lab.schedules import Event, Gradual, Iterative, OneShot, Schedule

# The same examples in every run: a test that fails fails again.
settings.register_profile("stable", derandomize=True, deadline=None, max_examples=60, database=None)
settings.load_profile("stable")

DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])
AMOUNTS = st.floats(0, 1, exclude_max=True)


@st.composite
def scores(draw: st.DrawFn, columns: int | None = None) -> Tensor:
    """A matrix of scores: from few values, so that most are tied, or from many."""
    shape = draw(st.integers(1, 6)), columns or draw(st.integers(1, 24))
    value = draw(st.sampled_from([st.integers(0, 2), st.floats(-1e4, 1e4, width=16)]))
    values = draw(st.lists(value, min_size=math.prod(shape), max_size=math.prod(shape)))
    return torch.tensor(values, dtype=draw(DTYPES)).view(shape)


def naive_keep(row: Tensor, remove: int) -> list[bool]:
    """The definition: sorted by score, then by index, the first `remove` go."""
    values = [Fraction(float(value)) for value in row]
    gone = set(sorted(range(len(values)), key=lambda i: (values[i], i))[:remove])
    return [i not in gone for i in range(len(values))]


# --- Selection ---


@given(st.integers(0, 10**6), AMOUNTS)
def test_a_count_is_the_nearest_whole_number_and_grows_with_the_amount(numel: int, amount: float) -> None:
    count = count_to_remove(numel, amount)
    assert 0 <= count <= numel
    assert abs(count - Fraction(numel) * Fraction(amount)) <= Fraction(1, 2) + Fraction(1, 10**6)
    assert count_to_remove(numel, math.nextafter(amount, 2)) >= count


@given(scores(), st.data())
def test_rows_lose_their_lowest_scores_the_lower_index_first(values: Tensor, data: st.DataObject) -> None:
    remove = data.draw(st.integers(0, values.shape[1]))
    assert keep_rows(values, remove).tolist() == [naive_keep(row, remove) for row in values]


@given(scores(), AMOUNTS)
def test_a_layer_loses_exactly_the_count_and_the_lowest(values: Tensor, amount: float) -> None:
    keep = keep_layer(values, amount)
    remove = count_to_remove(values.numel(), amount)
    assert int((~keep).sum()) == remove
    assert keep.flatten().tolist() == naive_keep(values.flatten(), remove)


@given(scores(), AMOUNTS, AMOUNTS)
def test_masks_of_a_larger_amount_lie_inside_those_of_a_smaller_one(values: Tensor, one: float, two: float) -> None:
    less, more = sorted((one, two))
    assert not (keep_layer(values, more) & ~keep_layer(values, less)).any()


@given(st.lists(scores(), min_size=1, max_size=4), AMOUNTS)
def test_matrices_ranked_together_are_one_long_row(matrices: list[Tensor], amount: float) -> None:
    matrices = [matrix.float() for matrix in matrices]
    keep = keep_global(matrices, amount)
    assert [mask.shape for mask in keep] == [matrix.shape for matrix in matrices]
    together = torch.cat([matrix.flatten() for matrix in matrices])
    found = torch.cat([mask.flatten() for mask in keep]).tolist()
    assert found == naive_keep(together, count_to_remove(len(together), amount))


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 3), st.data())
def test_n_of_every_m_stay_and_they_are_the_highest(one: int, two: int, groups: int, data: st.DataObject) -> None:
    n, m = sorted((one, two))
    values = data.draw(scores(columns=m * groups))
    keep = keep_pattern(values, Pattern(n, m)).reshape(-1, m)
    assert set(keep.sum(1).tolist()) == {n}
    assert keep.tolist() == [naive_keep(group, m - n) for group in values.reshape(-1, m)]


# --- Schedules ---

FRACTIONS = st.floats(0, 1)


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    start = draw(FRACTIONS)
    if draw(st.booleans()):
        return OneShot(start=start)
    if draw(st.booleans()):
        return Iterative(
            start=start, rounds=draw(st.integers(1, 12)), spacing=draw(st.sampled_from(["linear", "geometric"]))
        )
    return Gradual(start=start, end=draw(st.floats(0.01, 1)), interval=draw(st.floats(0.01, 1)))


def events_of(schedule: Schedule, amount: float, steps: int) -> list[Event]:
    """The events, or none where schedule and training do not fit each other."""
    try:
        return schedule.events(amount, steps)
    except Refused:
        return []


@given(schedules(), AMOUNTS, st.integers(0, 500))
def test_events_go_forward_inside_the_training_and_end_at_the_amount(
    schedule: Schedule, amount: float, steps: int
) -> None:
    events = events_of(schedule, amount, steps)
    amounts, at = [event.amount for event in events], [event.step for event in events]
    assert amounts == sorted(amounts)
    assert all(0 <= event.amount <= amount and 0 <= event.step <= steps for event in events)
    assert at == sorted(at)
    if steps:
        assert len(set(at)) == len(at)  # each is followed by some training, or is the last
    if events:
        assert events[-1].amount == amount


@given(FRACTIONS, st.floats(0.01, 1), st.floats(0.01, 1), AMOUNTS, st.integers(1, 500))
def test_gradual_amounts_are_the_cubic_of_the_paper(
    start: float, end: float, interval: float, amount: float, steps: int
) -> None:
    """s_t = s_f + (s_0 - s_f) (1 - (t - t_0) / (n dt))^3 with s_0 = 0 (1710.01878, equation 1)."""
    events = events_of(Gradual(start=start, end=end, interval=interval), amount, steps)
    first = round(start * steps)
    for event in events:
        done = Fraction(event.step - first, events[-1].step - first)
        assert event.amount == pytest.approx(amount - amount * float(1 - done) ** 3, abs=1e-12)


@given(AMOUNTS, st.integers(1, 12))
def test_geometric_rounds_take_an_equal_fraction_of_what_is_left(amount: float, rounds: int) -> None:
    kept = [1.0, *(1 - event.amount for event in Iterative(rounds=rounds, spacing="geometric").events(amount, 0))]
    ratios = [after / before for before, after in pairwise(kept)]
    assert ratios == pytest.approx([(1 - amount) ** (1 / rounds)] * rounds, rel=1e-6)


# --- Fingerprints ---

LEAVES = st.one_of(st.booleans(), st.integers(-9, 9), st.floats(-1, 1), st.text("ab:", max_size=3), st.none())
KEYS = st.text("abcd", min_size=1, max_size=3)
GROUPS = ("model", "dataset", "method", "schedule", "recovery", "post", "measure")
# Where things lie and how they are shown: the hashes beside stand for what they are.
PLACES = [
    ("name",), ("resume",), ("quiet",), ("device",), ("dtype",), ("tracking", "uri"), ("model", "name"),
    ("model", "revision"), ("dataset", "path"), ("dataset", "test_path"), ("dataset", "calibration", "name"),
    ("recovery", "teacher"), ("measure", "task_path"),
]  # fmt: skip


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """A resolved configuration: root keys, and groups of keys that may be groups themselves."""
    group = st.dictionaries(KEYS, st.one_of(LEAVES, st.dictionaries(KEYS, LEAVES, min_size=1, max_size=2)), max_size=4)
    return {"amount": draw(AMOUNTS), "seed": draw(st.integers(0, 9)), **{name: draw(group) for name in GROUPS}}


def of(config: dict[str, Any], protocol: dict[str, Any] | None = None, hashes: dict[str, str] | None = None) -> str:
    """The fingerprint; its arguments must come out unchanged."""
    given_config = copy.deepcopy(config)
    found = fingerprint(config, protocol or {"seq_len": 32, "windows": 4}, hashes or {"weights": "ab", "text": "cd"})
    assert config == given_config
    return found


def leaf_paths(node: dict[str, Any], prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from leaf_paths(value, (*prefix, key))
        else:
            yield *prefix, key


def with_leaf(config: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """A copy with one leaf set."""
    changed = copy.deepcopy(config)
    node = changed
    for key in path[:-1]:
        node = node.setdefault(key, {})
    node[path[-1]] = value
    return changed


def turned_round(node: Any) -> Any:
    """The same mapping with its keys in the opposite order."""
    return {key: turned_round(node[key]) for key in reversed(node)} if isinstance(node, dict) else node


@given(configs())
def test_the_order_of_keys_is_no_part_of_a_fingerprint(config: dict[str, Any]) -> None:
    assert of(turned_round(config)) == of(config)


@given(configs(), st.data())
def test_every_leaf_is_part_of_a_fingerprint(config: dict[str, Any], data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(sorted(leaf_paths(config))))
    assert of(with_leaf(config, path, "another value")) != of(config)
    assert of(with_leaf(config, (path[0], "added") if len(path) > 1 else ("added",), 0)) != of(config)


@given(configs(), st.sampled_from(PLACES), st.text(max_size=5))
def test_names_folders_and_tracking_are_no_part_of_it(
    config: dict[str, Any], place: tuple[str, ...], value: str
) -> None:
    if len(place) == 3:
        config["dataset"]["calibration"] = {"n_samples": 4}
    assert of(with_leaf(config, place, value)) == of(config)


@given(configs(), st.sampled_from(["weights", "text"]), st.text("ef", min_size=1, max_size=4))
def test_what_they_hold_and_the_protocol_are(config: dict[str, Any], which: str, value: str) -> None:
    assert of(config, hashes={"weights": "ab", "text": "cd", which: value}) != of(config)
    assert of(config, protocol={"seq_len": 33, "windows": 4}) != of(config)
