"""Jobs of a machine pause while one of them is timed: real processes on real locks, and a machine that is busy."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import ROOT
from processes import wait_until

from prune_lab.errors import Refused
from prune_lab.results import run_warnings
from prune_lab.system.console import Console
from prune_lab.system.lock import locked
from prune_lab.system.timing_lock import TimingLock, _of_children, common_folder

PATIENCE = 60

# A job that computes: it pauses where a bar would move, and says how far it came.
COMPUTE = """
import sys, time
from pathlib import Path
from prune_lab.system.timing_lock import TimingLock

folder, steps = Path(sys.argv[1]), Path(sys.argv[1]) / sys.argv[2]
timing_lock = TimingLock(folder)
with timing_lock.shared():
    for step in range(1_000_000):
        steps.write_text(str(step))
        time.sleep(0.002)
        if sys.argv[3] == "pauses":
            timing_lock.pause()
"""


def steps(file: Path) -> int:
    """How far a job came."""
    return int((file.read_text() or "0") if file.exists() else "0")


Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a job that computes, and waits until it does."""
    started: list[subprocess.Popen[bytes]] = []

    def begin(name: str, how: str = "pauses", wait: bool = True) -> subprocess.Popen[bytes]:
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        started.append(subprocess.Popen([sys.executable, "-c", COMPUTE, str(tmp_path), name, how], env=env))
        if wait:
            wait_until(lambda: steps(tmp_path / name) > 3)
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.wait()


def test_the_others_pause_while_one_is_timed_and_go_on_afterwards(start: Start, tmp_path: Path) -> None:
    """A job that begins meanwhile waits too."""
    start("a")
    start("b")
    timing_lock, told = TimingLock(tmp_path), []
    with timing_lock.shared():
        with timing_lock.exclusive(told.append):
            at = [steps(tmp_path / name) for name in "ab"]
            start("late", wait=False)
            time.sleep(0.5)
            assert [steps(tmp_path / name) for name in "ab"] == at
            assert not (tmp_path / "late").exists()
        for name, before in (("a", at[0]), ("b", at[1]), ("late", 0)):
            wait_until(lambda name=name, before=before: steps(tmp_path / name) > before + 3)  # type: ignore[misc]
    assert told in ([], ["waiting for the other jobs of this machine to pause, to time this one"])
    assert at[0] > 3


def test_a_killed_job_holds_nobody_up(start: Start, tmp_path: Path) -> None:
    """It never pauses; the lock of a process that is gone is free."""
    job, timing_lock = start("a", "never pauses"), TimingLock(tmp_path, patience=PATIENCE)
    assert not timing_lock._try("work")
    job.kill()
    job.wait()
    with timing_lock.exclusive():
        assert timing_lock.waited < PATIENCE / 2


def test_patience_ends(start: Start, tmp_path: Path) -> None:
    """Beside a job that is stopped in the middle, timing goes ahead in the end; what waited is known."""
    start("a", "never pauses")
    timing_lock, told = TimingLock(tmp_path, patience=0.3), []
    with timing_lock.exclusive(told.append):
        before = steps(tmp_path / "a")
        wait_until(lambda: steps(tmp_path / "a") > before)
    assert told[-1] == "not waiting any longer than 0 s"
    assert timing_lock.waited >= 0.3


def test_two_that_time_take_turns(tmp_path: Path) -> None:
    """Four processes write into one file while they are alone; nobody finds another one's line unfinished."""
    script = """
import sys, time
from pathlib import Path
from prune_lab.system.timing_lock import TimingLock

timing_lock, book = TimingLock(Path(sys.argv[1])), Path(sys.argv[1]) / "book"
for _ in range(5):
    with timing_lock.shared(), timing_lock.exclusive(), book.open("a") as file:
        file.write("in ")
        file.flush()
        time.sleep(0.005)
        file.write("out\\n")
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script, str(tmp_path)]
    processes = [subprocess.Popen(command, env=env) for _ in range(4)]
    assert [process.wait(PATIENCE) for process in processes] == [0] * 4
    assert (tmp_path / "book").read_text() == "in out\n" * 20


def test_a_bar_that_moves_is_where_a_job_pauses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paused = []
    monkeypatch.setattr("prune_lab.system.console.timing_lock.pause", lambda: paused.append(1))
    with Console(quiet=True).progress(3, "work") as bar:
        bar.update()
        bar.update(2)
    assert len(paused) == 2


def test_files_that_cannot_be_locked_stop_nobody(tmp_path: Path) -> None:
    """A link, which another user could have laid there, is not followed."""
    for name in ("door", "work"):
        (tmp_path / f"prune_lab-{name}.lock").symlink_to(tmp_path / "elsewhere")
    timing_lock = TimingLock(tmp_path)
    with timing_lock.shared(), timing_lock.exclusive():
        assert timing_lock.waited < PATIENCE / 2
    assert not (tmp_path / "elsewhere").exists()


def test_whatever_the_umask_other_users_may_lock_too(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        with TimingLock(tmp_path).shared():
            pass
    finally:
        os.umask(before)
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {
        "prune_lab-door.lock": 0o644,
        "prune_lab-work.lock": 0o644,
    }


BUSY = "while True: pass"


def test_what_others_compute_is_seen_and_what_we_compute_is_not(tmp_path: Path) -> None:
    """A process that computes all the time takes a good part of a core; this one computes too, which is no load."""
    busy = f"subprocess.Popen([sys.executable, '-c', '{BUSY}'], stdout=subprocess.DEVNULL)"
    start = [sys.executable, "-c", f"import subprocess, sys; print({busy}.pid)"]
    of_another = subprocess.run(start, stdout=subprocess.PIPE, text=True, check=True)
    try:
        with TimingLock(tmp_path).exclusive() as load:
            began = time.process_time()
            while time.process_time() - began < 1:
                pass
    finally:
        os.kill(int(of_another.stdout), signal.SIGKILL)
    assert load.cores > 0.2
    assert load.cores < (os.cpu_count() or 1) + 0.2
    (note,) = run_warnings.of_load({"cores_used_by_others": load.cores + 0.1})
    assert f"{load.cores + 0.1:.2f} cores" in note
    assert run_warnings.of_load({"cores_used_by_others": 0.04}) == run_warnings.of_load({}) == []


def test_what_a_process_of_ours_computes_is_counted_as_ours() -> None:
    """While it runs, and when it has ended: what is timed there is no load by others."""
    busy, before = subprocess.Popen([sys.executable, "-c", BUSY]), _of_children()
    try:
        while (running := _of_children()) - before < 0.3:
            time.sleep(0.05)
    finally:
        busy.kill()
        busy.wait()
    assert _of_children() >= running


def test_a_job_that_waits_for_another_one_s_lock_holds_no_timing_up(start: Start, tmp_path: Path) -> None:
    """Otherwise: the holder pauses for the one that times, which waits for the one that waits for the holder."""
    script = """
import sys
from pathlib import Path
from prune_lab.system import lock
from prune_lab.system.timing_lock import TimingLock

folder = Path(sys.argv[1])
lock.timing_lock = TimingLock(folder)
with lock.timing_lock.shared():
    (folder / "waits").touch()
    with lock.locked(folder / "cache.lock", "exclusive"):
        (folder / "got").touch()
        lock.timing_lock.pause()
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with locked(tmp_path / "cache.lock", "exclusive"):
        waiting = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], env=env)
        wait_until((tmp_path / "waits").exists)
        time.sleep(0.3)
        timing_lock = TimingLock(tmp_path, patience=PATIENCE)
        with timing_lock.exclusive():
            assert timing_lock.waited < PATIENCE / 2
            assert not (tmp_path / "got").exists()
    assert waiting.wait(PATIENCE) == 0
    assert (tmp_path / "got").exists()


def test_a_folder_that_is_named_is_the_common_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Containers that share no /tmp take turns by it; without it the place does not depend on TMPDIR."""
    named = tmp_path / "not" / "there yet"
    monkeypatch.setenv("PRUNE_LAB_TURNS", str(named))
    ours, theirs = TimingLock(common_folder()), TimingLock(common_folder(), patience=0.1)
    with ours.shared():
        assert sorted(path.name for path in named.iterdir()) == ["prune_lab-door.lock", "prune_lab-work.lock"]
        assert not theirs._try("work")
    monkeypatch.setenv("PRUNE_LAB_TURNS", str(named / "prune_lab-door.lock" / "inside"))
    with pytest.raises(Refused, match=r"^PRUNE_LAB_TURNS='.*inside' cannot be made \(Not a directory\): give a folder"):
        common_folder()
    monkeypatch.delenv("PRUNE_LAB_TURNS")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert common_folder() == Path("/tmp")
