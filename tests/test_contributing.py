"""The worked example of CONTRIBUTING.md: a new method is one Python file and one YAML, and nothing else."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from conftest import ROOT


def blocks() -> list[tuple[str, str]]:
    """Each file named in CONTRIBUTING.md's section on new methods, with the code block that follows its name."""
    section = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## A new method")[1]
    return re.findall(r"`([\w/]+\.(?:py|yaml))`:\n\n```\w+\n(.*?)```", section, flags=re.DOTALL)


def test_the_example_of_a_new_method_runs(tmp_path: Path, small: list[str]) -> None:
    copy = tmp_path / "copy"
    for part in ("prune_lab", "conf"):
        shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
    assert [name for name, _ in blocks()] == ["prune_lab/methods/deviation.py", "conf/method/deviation.yaml"]
    for name, text in blocks():
        (copy / name).write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "prune_lab", *small, "method=deviation", "method.allocation=owl", "amount=0.5"]
    command += ["tracking=none", "hydra.run.dir=run", "dataset.calibration.n_samples=8", "measure=quality_only"]
    env = {**os.environ, "PYTHONPATH": str(copy)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["choices"]["method"] == "deviation"
    assert abs(summary["metrics"]["amount/realized"] - 0.5) < 0.01
    assert summary["protocol"]["calibration"]["n_samples"] == 8
