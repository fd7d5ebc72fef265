"""Locks between the processes of a machine: a file that is locked while somebody is inside."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from prune_lab.system.timing_lock import timing_lock

try:
    import fcntl
except ImportError:  # no POSIX, no locks
    fcntl = None  # type: ignore[assignment]

How = Literal["shared", "exclusive", "now"]


@contextmanager
def locked(path: Path, how: How) -> Iterator[bool | None]:
    """Holds the lock of a file, alone or with others; "now" is exclusive and does not wait.

    Yields whether it is held; None: there are no locks here (a read-only folder, or a file system without them). Who
    holds it may remove the file. It is freed when the process ends, however it ends.
    """
    file, held = None, None
    try:
        while fcntl is not None and held is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("a")
            flags = fcntl.LOCK_SH if how == "shared" else fcntl.LOCK_EX
            if how == "now":
                fcntl.flock(file, flags | fcntl.LOCK_NB)
            else:
                with timing_lock.released():  # its holder may pause for a job that is timed, which waits for this one
                    fcntl.flock(file, flags)
            with suppress(FileNotFoundError):  # removed, and perhaps made again, while we waited: not that one
                held = True if path.stat().st_ino == os.fstat(file.fileno()).st_ino else None
            if held is None:
                file.close()
    except BlockingIOError:
        held = False
    except OSError:
        held = None
    try:
        yield held
    finally:
        if file is not None:
            file.close()
