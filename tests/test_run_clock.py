"""The time that a run will still take: said at its beginning, corrected by its stages, shown beside each bar."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

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


def on_terminal(words: list[str], place: Path) -> Iterator[str]:
    """What a run writes to its terminal."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (40, 160))
    process = subprocess.Popen([sys.executable, "-m", "prune_lab", *words], cwd=place, stdout=theirs, stderr=theirs)
    os.close(theirs)
    try:
        while chunk := os.read(ours, 4096):
            yield chunk.decode(errors="replace")
    except OSError:  # the terminal's other end is closed
        pass
    finally:
        os.close(ours)
        assert process.wait() == 0


def test_a_run_on_a_terminal_says_how_long_it_will_take(small: list[str], tmp_path: Path) -> None:
    """Before its work begins, and beside each bar; in a pipe the same run says nothing of the kind."""
    words = [*small, "method=wanda", "measure.max_windows=16", "tracking=none", "resume=false"]
    shown = "".join(on_terminal([*words, "measure=quick"], tmp_path))
    said = re.search(r"time +about \d+ (s|min)", shown)
    assert said is not None, shown
    assert said.start() < shown.index("measuring the dense model")
    left = re.findall(r"\w[\w ]*: +\d+%[^\r\n]*run: \d+ (?:s|min) left", shown)
    assert any("calibrating" in bar for bar in left), shown
    assert any("latency" in bar for bar in left), shown
    command = [sys.executable, "-m", "prune_lab", *words, "measure=quality_only"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "about" not in done.stdout + done.stderr
