"""Completion of the installed `prune-lab` in a real bash, set up as the README says: keys are typed, Tab is pressed."""

from __future__ import annotations

import itertools
import os
import pty
import re
import select
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import ROOT

PROGRAM, BASH = Path(sys.executable).parent / "prune-lab", shutil.which("bash")
PROMPT, READY = r"\#> ", "{}> "  # with the number of the command: a prompt that is drawn again is no new one
TAB, TO_THE_BEGINNING = "\t", "\x01"

pytestmark = pytest.mark.skipif(BASH is None or not PROGRAM.exists(), reason="no bash, or prune-lab is not installed")

Typed = Callable[[str], str]


@pytest.fixture(scope="module")
def typed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Typed]:
    """Types a beginning and Tab into one interactive bash; what the line is then, without `prune-lab`."""
    place = tmp_path_factory.mktemp("bash")
    (line,) = re.findall(r"Completion of all keys in bash: `(.*?)`", (ROOT / "README.md").read_text(encoding="utf-8"))
    (place / "rc").write_text(f"bind 'set enable-bracketed-paste off'\n{line}\nPS1='{PROMPT}'\n", encoding="utf-8")
    path = f"{PROGRAM.parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "TERM": "dumb", "COLUMNS": "200"}
    ours, theirs = pty.openpty()
    assert BASH is not None
    command = [BASH, "--rcfile", str(place / "rc"), "-i"]
    shell = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=place, env=env, start_new_session=True
    )
    os.close(theirs)

    def until(end: str) -> str:
        """What the shell shows up to an end."""
        shown = ""
        while not shown.endswith(end):
            assert select.select([ours], [], [], 120)[0], f"nothing more comes after {shown!r}"
            shown += os.read(ours, 4096).decode()
        return shown

    number = itertools.count(1)

    def complete(beginning: str) -> str:
        os.write(ours, f"prune-lab {beginning}{TAB}{TO_THE_BEGINNING}echo and then: \n".encode())
        shown = until(READY.format(next(number)))
        (*_, found) = re.findall(r"^and then: prune-lab (.*?)\r?$", shown, flags=re.MULTILINE)
        return str(found).rstrip()

    try:
        until(READY.format(next(number)))
        yield complete
    finally:
        shell.kill()
        shell.wait()
        os.close(ours)


@pytest.mark.parametrize(
    ("beginning", "line"),
    [
        ("metho", "method"),  # method= chooses an option, method. a key of it: what both begin with
        ("method=wan", "method=wanda"),
        ("method=sparsegpt method.allo", "method=sparsegpt method.allocation="),
    ],
)
def test_a_key_and_an_option_are_completed(typed: Typed, beginning: str, line: str) -> None:
    assert typed(beginning) == line
