"""The time that a run will still take, as its stages correct it; what a person sees of it: test_terminal.py."""

from __future__ import annotations

import pytest

from prune_lab.system.run_clock import RunClock, in_words


class Watch:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def test_what_is_left_is_what_was_expected_less_what_passed() -> None:
    watch = Watch()
    clock = RunClock({"read": 10, "prune": 30, "measure": 20}, watch)
    assert clock.left() == 60
    clock.enter("read")
    watch.seconds += 4
    assert clock.left() == 6 + 30 + 20
    watch.seconds += 9  # longer than was expected: the stage is as good as done
    assert clock.left() == 50
    clock.enter("prune")  # 13 s for 10
    assert clock.left() == pytest.approx(1.3 * 50)
    watch.seconds += 13
    assert clock.left() == pytest.approx(1.3 * 50 - 13)


def test_a_stage_that_was_left_out_or_is_unknown_counts_for_nothing() -> None:
    watch = Watch()
    clock = RunClock({"read": 100, "measure": 20}, watch)
    clock.enter("read")
    watch.seconds += 1  # from a cache: no more than a fifth of what was expected is taken off the rest
    clock.enter("elsewhere")
    watch.seconds += 500
    clock.enter("measure")
    assert clock.left() == pytest.approx(0.2 * 20)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.3, "5 s"), (22, "20 s"), (53, "55 s"), (56, "1 min"), (89, "1 min"), (3599, "1 h 0 min"), (8000, "2 h 13 min")],
)
def test_times_in_words(seconds: float, words: str) -> None:
    assert in_words(seconds) == words
