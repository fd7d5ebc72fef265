"""Ownership of runs by processes: tells a run that a killed process left RUNNING from a live one."""

from __future__ import annotations

import os
import socket

import psutil

HOST, PID, BORN = "prune_lab.host", "prune_lab.pid", "prune_lab.process_born"


def owner_tags() -> dict[str, str]:
    """Tags that name this process: host, pid and, since pids are used again, when it was born."""
    return {HOST: socket.gethostname(), PID: str(os.getpid()), BORN: f"{psutil.Process().create_time():.0f}"}


def is_alive(tags: dict[str, str]) -> bool:
    """True where the process that `tags` name may still be at work: gone for certain only on this host."""
    if tags.get(HOST) != socket.gethostname():
        return True
    try:
        born = psutil.Process(int(tags[PID])).create_time()
    except (psutil.NoSuchProcess, ValueError, KeyError):
        return False
    return abs(born - float(tags.get(BORN, born))) < 2
