"""On a terminal a run shows what it does; in a pipe it prints its outcome alone; quiet prints nothing."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from conftest import ROOT, Cli, make_folder
from model_types import tiny_folder


def run_on_a_terminal(folder: Path, *arguments: str) -> str:
    """What a person would have seen: the run's standard output and error are a pseudo-terminal."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm"}
    process = subprocess.Popen(
        [sys.executable, "-m", "prune_lab", *arguments], cwd=folder, env=env, stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    seen = b""
    while True:
        try:
            chunk = os.read(ours, 65536)
        except OSError:  # the other side is closed: the process has ended
            break
        if not chunk:
            break
        seen += chunk
    assert process.wait() == 0, seen.decode()
    os.close(ours)
    return seen.decode()


def test_a_person_sees_header_progress_and_table(small: list[str], tmp_path: Path) -> None:
    seen = run_on_a_terminal(
        tmp_path, *small, "tracking=none", "recovery=finetune", "recovery.steps=12", "recovery.autocast=none"
    )
    for wanted in ("model ", "text ", "device ", "perplexity:", "latency:", "training:", "tok/s", "loss="):
        assert wanted in seen, wanted
    assert "dense -> compressed" in seen
    assert seen.index("training:") < seen.index("dense -> compressed")
    said = re.search(r"time +about \d+ (s|min)", seen)  # before the work begins, and beside each bar
    assert said is not None
    assert said.start() < seen.index("measuring the dense model")
    left = re.findall(r"(\w[\w ]*): +\d+%[^\r\n]*run: \d+ (?:s|min) left", seen)
    assert {"training", "latency"} <= set(left)


@pytest.mark.slow
@pytest.mark.process
def test_an_estimate_does_nothing_that_the_measures_do_not(small: list[str], tmp_path: Path) -> None:
    """A context with no room for more than a window, and a type without a cache to decode with."""
    short = make_folder(tmp_path / "short", "gpt2", n_positions=16)
    for model in (short, tiny_folder(tmp_path / "rwkv", "rwkv")):
        words = [f"model.name={model}" if word.startswith("model.name=") else word for word in small[:5]]
        words[4] = "dataset.seq_len=16"
        words += ["measure=quality_only", "measure.max_windows=4", "method=magnitude", "amount=0.5", "tracking=none"]
        assert "dense -> compressed" in run_on_a_terminal(tmp_path, *words)
    words = [f"model.name={short}" if word.startswith("model.name=") else word for word in small]
    words[4] = "dataset.seq_len=16"
    words += ["measure.prompt_tokens=12", "measure.decode_tokens=4", "method=magnitude", "amount=0.5", "tracking=none"]
    assert "latency" in run_on_a_terminal(tmp_path, *words)


def test_a_pipe_gets_the_outcome_alone(small: list[str], cli: Cli) -> None:
    done = cli(*small, "tracking=none")
    assert done.returncode == 0
    assert done.stderr == ""
    assert done.stdout.startswith("dense -> compressed")
    assert "\x1b" not in done.stdout
    assert "it/s" not in done.stdout
    assert "about" not in done.stdout


def test_quiet_prints_nothing(small: list[str], cli: Cli) -> None:
    done = cli(*small, "tracking=none", "quiet=true", "measure=quality_only", "measure.max_windows=4")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_version_is_the_package_s(cli: Cli) -> None:
    """Hydra's own flag of that name would say Hydra's."""
    from prune_lab import __version__

    assert cli("--version").stdout == f"prune_lab {__version__}\n"
