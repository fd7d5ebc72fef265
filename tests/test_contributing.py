"""The worked examples of CONTRIBUTING.md: a method and an exporter of one Python file and one YAML each, a metric."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CPU, ROOT
from torch.nn.functional import cross_entropy

from prune_lab.models.load import HubModel
from prune_lab.text.text_files import TextFiles
from prune_lab.text.tokens import Tokens

CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def blocks(section: str) -> list[tuple[str, str]]:
    """Each file named in a section, with the code block that follows its name."""
    text = CONTRIBUTING.split(f"\n## {section}\n")[1].split("\n## ")[0]
    return re.findall(r"`([\w/]+\.(?:py|yaml|md))`:\n\n```\w+\n(.*?)```", text, flags=re.DOTALL)


def edited(text: str, diff: str) -> str:
    """The text with a change of adjacent lines made, where its old lines stand once."""
    lines = diff.splitlines(keepends=True)
    old = "".join(line[1:] for line in lines if line[0] in " -")
    new = "".join(line[1:] for line in lines if line[0] in " +")
    assert text.count(old) == 1, f"not there once:\n{old}"
    return text.replace(old, new)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package with the three examples."""
    place = tmp_path_factory.mktemp("copy")
    for part in ("prune_lab", "conf", "docs"):
        shutil.copytree(ROOT / part, place / part, ignore=shutil.ignore_patterns("__pycache__"))
    for name, text in blocks("A new method") + blocks("A new exporter"):
        assert not (place / name).exists()
        (place / name).write_text(text, encoding="utf-8")
    for name, diff in blocks("A new metric"):
        path = place / name
        path.write_text(edited(path.read_text(encoding="utf-8"), diff), encoding="utf-8")
    return place


def python(copy: Path, *arguments: str) -> str:
    """What a program of the copy prints."""
    env = {**os.environ, "PYTHONPATH": str(copy)}
    done = subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_names_in_backticks_exist() -> None:
    """What CONTRIBUTING names in its sentences is in the source: it is read by those who look for it there."""
    source = "".join(
        path.read_text(encoding="utf-8")
        for folder in ("prune_lab", "tests", "conf", "hydra_plugins", ".ci")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".yaml", ".md", "") and path.is_file() and "__pycache__" not in path.parts
    ) + (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    sentences = re.sub(r"^```.*?^```", "", CONTRIBUTING, flags=re.DOTALL | re.MULTILINE)
    examples = "".join(re.findall(r"^```.*?^```", CONTRIBUTING, flags=re.DOTALL | re.MULTILINE))
    names = {name for name in re.findall(r"`([A-Za-z_][\w.]*)`", sentences) if not (ROOT / name).exists()}
    last = {name: name.removesuffix(".py").rpartition(".")[2] for name in names}
    assert [name for name in sorted(names) if last[name] not in source and last[name] not in examples] == []


def test_the_examples_are_of_these_files() -> None:
    assert [name for name, _ in blocks("A new method")] == [
        "prune_lab/methods/deviation.py",
        "conf/method/deviation.yaml",
    ]
    assert [name for name, _ in blocks("A new exporter")] == ["prune_lab/export/gz.py", "conf/export/gz.yaml"]
    edits = ["measure/perplexity.py", "measure/perplexity.py", "results/metrics.py"]
    assert [name for name, _ in blocks("A new metric")] == [f"prune_lab/{name}" for name in edits]


def test_a_run_with_the_new_method_and_the_new_metric(copy: Path, small: list[str], folder: Path, corpus: Path) -> None:
    keys = ["method=deviation", "method.allocation=owl", "amount=0.5", "dataset.calibration.n_samples=8"]
    keys += ["tracking=none", "hydra.run.dir=run", "measure=quality_only", "device=cpu"]
    shown = python(copy, "-m", "prune_lab", *small, *keys)
    summary = json.loads(Path("run", "summary.json").read_text(encoding="utf-8"))
    assert summary["choices"]["method"] == "deviation"
    assert abs(summary["metrics"]["amount/realized"] - 0.5) < 0.01
    assert summary["protocol"]["calibration"]["n_samples"] == 8

    dense, compressed = (summary["metrics"][f"quality/{prefix}p95_perplexity"] for prefix in ("dense_", ""))
    assert dense == pytest.approx(p95_by_hand(folder, corpus), rel=1e-5)
    assert dense != pytest.approx(compressed, rel=1e-3)
    row = next(line.split() for line in shown.splitlines() if "perplexity of the 95th percentile" in line)
    assert row[-3:-1] == [f"{dense:.3f}", f"{compressed:.3f}"]


def test_a_run_with_the_new_exporter(copy: Path, small: list[str]) -> None:
    """Its file is the size on disk; a run that read something else back would not finish."""
    keys = ["method=magnitude", "amount=0.9", "export=gz", "export.level=9", "tracking=none", "hydra.run.dir=run"]
    python(copy, "-m", "prune_lab", *small, *keys, "measure=quality_only", "device=cpu")
    figures = json.loads(Path("run", "summary.json").read_text(encoding="utf-8"))["metrics"]
    assert not list(Path("run", "export").glob("*.safetensors"))
    assert figures["size/disk_mb"] * 1e6 == Path("run", "export", "model.safetensors.gz").stat().st_size
    assert figures["size/disk_mb"] < 0.9 * figures["size/dense_disk_mb"]
    assert "- Loads with: `gunzip *.gz`, then" in Path("run", "export", "README.md").read_text(encoding="utf-8")


def p95_by_hand(folder: Path, corpus: Path) -> float:
    """Of the dense model on the 8 windows of `small`, one at a time; between the two windows nearest to the place."""
    loaded = HubModel(name=str(folder)).load(CPU, seed=0)
    windows = Tokens(TextFiles(path=str(corpus)).corpus(), loaded.tokenizer).windows("test", 32)[:8].long()
    with torch.no_grad():
        logits = [loaded.model(input_ids=window[None]).logits[0, :-1] for window in windows]
    losses = sorted(float(cross_entropy(z, window[1:])) for z, window in zip(logits, windows, strict=True))
    place = 0.95 * (len(losses) - 1)  # 6.65: 65 % of the way from the last but one to the last
    mean_of_two = losses[6] + (place - 6) * (losses[7] - losses[6])
    return float(torch.tensor(mean_of_two, dtype=torch.float64).exp())


def test_docs_of_every_metric_are_written_with_the_new_one(copy: Path) -> None:
    page = copy / "docs" / "metrics.md"
    before = page.read_text(encoding="utf-8").splitlines()
    assert python(copy, "-m", "prune_lab.commands.reference", str(page)) == ""
    after = page.read_text(encoding="utf-8").splitlines()
    (row,) = [line for line in after if line not in before]
    exp = "exp of the 95th percentile of the windows' mean cross-entropies"
    assert row == f"| `quality/p95_perplexity` | | lower | yes | {exp} |"
    after.remove(row)
    assert after == before


def test_docs_of_every_key_are_written_with_the_new_method(copy: Path) -> None:
    page = python(copy, "-m", "prune_lab.commands.reference")
    assert "| `deviation` | Weights x standard deviation of their input (an example: no paper)." in page
    method = page.split("\n## method\n")[1].split("\n## ")[0]
    scope = next(line for line in method.splitlines() if line.startswith("| `method.scope` "))
    assert "deviation, unstructured, wanda: `row`" in scope
