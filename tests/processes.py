"""Processes beside a test: a free port, waiting for what they do, and several that train together."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from warm import ROOT, start_module

PATIENCE = 300  # seconds to wait for another process, many times what it takes
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node=2")
ACCELERATE_FSDP = ("accelerate.commands.launch", "--use_fsdp", "--fsdp_version=2", "--num_processes=2")


class Process(Protocol):
    """One that may have ended."""

    def poll(self) -> int | None:
        """Its exit code; None while it runs."""


def free_port() -> int:
    """One that nobody listens at just now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def answers(port: int) -> bool:
    """Whether a server listens."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_until(there: Callable[[], Any], process: Process | None = None, log: Path | None = None) -> None:
    """Waits until something is there, as long as a process lives; `log` is what the process writes to."""
    for _ in range(PATIENCE * 20):
        if there():
            return
        assert process is None or process.poll() is None, log.read_text() if log else "the process has ended"
        time.sleep(0.05)
    raise AssertionError(f"it never came: {log.read_text() if log else there}")


def launched(
    launcher: tuple[str, ...], folder: Path, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Two processes that torchrun or accelerate starts, of a module (`-m NAME ...`) or a file."""
    command = [sys.executable, "-m", *launcher]
    if launcher != TORCHRUN:
        command.append(f"--main_process_port={free_port()}")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    return subprocess.run(
        [*command, *arguments], cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=PATIENCE
    )


def together(
    folder: Path, *arguments: str, module: str = "prune_lab", size: int = 2
) -> subprocess.CompletedProcess[str]:
    """`python -m prune_lab` in forked processes, with the variables of a launcher; if one fails, all end."""
    common = {"WORLD_SIZE": f"{size}", "LOCAL_WORLD_SIZE": f"{size}", "MASTER_ADDR": "127.0.0.1"}
    common["MASTER_PORT"] = str(free_port())
    with tempfile.TemporaryDirectory() as name:
        files = [[Path(name) / f"{kind}{rank}" for kind in ("stdout", "stderr")] for rank in range(size)]
        started = [
            start_module(module, [*arguments], folder, files[rank], RANK=str(rank), LOCAL_RANK=str(rank), **common)
            for rank in range(size)
        ]
        try:
            wait_until(lambda: all(p.poll() == 0 for p in started) or any(p.poll() for p in started))
        finally:
            for process in started:
                process.wait(10)
                process.kill()
        stdout, stderr = ("".join(of[kind].read_text() for of in files) for kind in (0, 1))
        return subprocess.CompletedProcess(arguments, max(abs(p.poll() or 0) for p in started), stdout, stderr)
