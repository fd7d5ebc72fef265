"""Timing lock: jobs of one machine run side by side, and while one of them is timed the others pause.

Two locked files stand for it, and the kernel frees them when a process ends, however it ends. Whoever computes shares
`work`; whoever times holds it alone. Everybody comes in through `door`, which the one that waits to time keeps shut:
otherwise those that come and go could leave it waiting for ever. Jobs that know nothing of this are seen as load.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from prune_lab.errors import Refused

try:
    import fcntl
except ImportError:  # not a Unix: nobody waits for anybody, and load is seen all the same
    fcntl = None  # type: ignore[assignment]

PATIENCE = 3600.0  # seconds after which a job goes on beside one that never ends: stopped with Ctrl-Z, for example
_GLANCE = 0.02


@dataclass
class Load:
    """Load of other processes, in cores: known when the timed section is over."""

    cores: float = 0.0


class TimingLock:
    """Lock among the processes that use the same `folder`; None: that of the machine, found when it is needed."""

    def __init__(self, folder: Path | None = None, patience: float = PATIENCE) -> None:
        self._folder = folder
        self._patience = patience
        self._open: dict[str, int] = {}
        self._shares = False
        self.waited = 0.0  # seconds, in all

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Computes beside others that do so too."""
        if self._shares:
            yield
            return
        self._enter()
        try:
            yield
        finally:
            self._shares = False
            for name in list(self._open):
                os.close(self._open.pop(name))  # which unlocks it

    def pause(self) -> None:
        """Waits while another job is timed, if one is or wants to be: to be called often by what takes long."""
        if not self._shares:
            return
        if self._try("door", alone=False):
            self._unlock("door")
            return
        self._unlock("work")
        self._enter()

    @contextmanager
    def exclusive(self, note: Callable[[str], None] = lambda text: None) -> Iterator[Load]:
        """Times something while the others pause; `note` is told when that takes waiting. Yields the load."""
        shared, self._shares, load = self._shares, False, Load()
        self._unlock("work")
        if not (self._try("door") and self._try("work")):
            note("waiting for the other jobs of this machine to pause, to time this one")
            if not (self._wait("door", alone=True) and self._wait("work", alone=True)):
                note(f"not waiting any longer than {self._patience:.0f} s")
        began, busy = time.perf_counter(), _busy()
        try:
            yield load
        finally:
            load.cores = max(0.0, (_busy() - busy) / (time.perf_counter() - began))
            self._unlock("work")
            self._unlock("door")
        if shared:
            self._enter()

    @contextmanager
    def released(self) -> Iterator[None]:
        """Waits for something else: who times need not wait for this job, or for whom it waits, meanwhile."""
        shared, self._shares = self._shares, False
        if shared:
            self._unlock("work")
        try:
            yield
        except OSError:
            if shared:
                self._enter()
            raise
        if shared:
            self._enter()

    def _enter(self) -> None:
        self._wait("door", alone=False)
        self._wait("work", alone=False)
        self._unlock("door")
        self._shares = True

    def _wait(self, name: str, alone: bool) -> bool:
        """True where the lock was acquired before patience ended."""
        began = time.monotonic()
        while not (got := self._try(name, alone)) and time.monotonic() - began < self._patience:
            time.sleep(_GLANCE)
        self.waited += time.monotonic() - began
        return got

    def _try(self, name: str, alone: bool = True) -> bool:
        if fcntl is None:
            return True
        if name not in self._open:
            self._folder = self._folder or common_folder()
            if (file := _open(self._folder / f"prune_lab-{name}.lock")) is not None:
                self._open[name] = file
        if name not in self._open:  # a file that this user may not read: as if there were nobody else
            return True
        try:
            fcntl.flock(self._open[name], (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def _unlock(self, name: str) -> None:
        if name in self._open:
            fcntl.flock(self._open[name], fcntl.LOCK_UN)


def _open(path: Path) -> int | None:
    """The file, to read only, which is enough to lock it; made, for all users to read, where there is none."""
    for flags in (0, os.O_CREAT | os.O_EXCL, 0):  # the last: another process made it in between
        try:
            file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | flags, 0o644)
            if flags:
                os.fchmod(file, 0o644)  # whatever the umask
        except OSError:
            continue
        return file
    return None


def _busy() -> float:
    """Seconds that the machine's cores were busy with anything but this process and those that it started."""
    times = psutil.cpu_times()
    whole = sum(getattr(times, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq", "steal"))
    return whole - time.process_time() - _of_children()


def _of_children() -> float:
    """Processor seconds of the processes that this one started, and of those that they started; ended ones too."""
    ended = os.times()
    seconds = ended.children_user + ended.children_system
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has just ended
            times = child.cpu_times()
            seconds += times.user + times.system + getattr(times, "children_user", 0.0)
            seconds += getattr(times, "children_system", 0.0)
    return seconds


def common_folder() -> Path:
    """Folder that is the same for every job of the machine, though each may have a TMPDIR of its own.

    PRUNE_LAB_TURNS names another: one that containers share, or one of their own for jobs that need not wait. Raises
    Refused where it cannot be made.
    """
    if named := os.environ.get("PRUNE_LAB_TURNS"):
        try:
            Path(named).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Refused(
                f"PRUNE_LAB_TURNS={named!r} cannot be made ({error.strerror}): give a folder for the locks by which "
                "the jobs of a machine take turns, or unset it"
            ) from error
        return Path(named)
    return Path("/tmp") if Path("/tmp").is_dir() else Path(tempfile.gettempdir())


timing_lock = TimingLock()
