"""Whatever is wrong with an input is said in one short line, with exit code 2 and nothing left behind but the log.

The table is in bad_inputs.py. Its cases run in this process, through the function that the command line is; some run
in a real process.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch
from bad_inputs import TABLE, Bad
from conftest import ROOT, Cli

from prune_lab import __main__ as program

# MLflow 3's own models use a deprecated part of SQLAlchemy, which says so when a store is first opened.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")

LONGEST_MESSAGE = 400  # characters

Refuse = Callable[..., str]


def check_message(code: int, stderr: str, *parts: str) -> str:
    """A refusal as it should be: exit code 2 and one short line that holds all `parts`; returns the line."""
    assert code == 2, stderr
    assert len(stderr.splitlines()) == 1, stderr
    assert len(stderr) <= LONGEST_MESSAGE, stderr
    assert "Traceback" not in stderr
    assert stderr.startswith("prune_lab: ")
    for part in parts:
        assert part in stderr
    return stderr


# What a refusal may leave: the run's log, with Hydra's record of what was asked and summary.json's of why not; and text
# that was tokenised, config and tokenizer of a GGUF file, and figures of the dense model that were found on the way,
# whole, in the cache.
_LOG = (
    r"(outputs/[\d-]+/[\d-]+|here|inside)(/(prune_lab\.log|summary\.json|\.hydra(/(config|hydra|overrides)\.yaml)?))?"
)
_LEFT = re.compile(
    rf"{_LOG}|outputs(/[\d-]+)?|cache(/locks(/[\w.-]+)?)?"
    r"|cache/(tokens|baseline|token_losses|dense_states)(/[0-9a-f]+(/(tokens\.i32|starts\.i64|\d+\.safetensors|facts\.json))?)?"
    r"|cache/gguf(/[0-9a-f]+(/[a-z_]+\.(json|jinja))?)?|cache/layout(/[0-9a-f]+(/facts\.json)?)?"
)


def files_below(folder: Path) -> dict[str, tuple[int, int]]:
    """Everything in a folder, with size and time of change; links are not followed."""
    found = {}
    for place, folders, files in os.walk(folder):
        for path in (Path(place) / name for name in (*folders, *files)):
            facts = path.lstat()
            is_folder = path.is_dir() and not path.is_symlink()
            found[path.relative_to(folder).as_posix()] = (0, 0) if is_folder else (facts.st_size, facts.st_mtime_ns)
    return found


def check_nothing_is_left(before: dict[str, tuple[int, int]], folder: Path) -> None:
    """What was there is as it was, and what is new is the log, or a store of MLflow in which no run is RUNNING."""
    after = files_below(folder)
    assert {name: after.get(name) for name in before} == before
    more = sorted(name for name in after.keys() - before if not _LEFT.fullmatch(name))
    assert [name for name in more if not re.fullmatch(r"mlflow\.db|mlruns", name)] == []
    if "mlflow.db" in more:
        with sqlite3.connect(folder / "mlflow.db") as store:
            statuses = [status for (status,) in store.execute("select status from runs")]
        store.close()
        assert "RUNNING" not in statuses


@pytest.fixture
def own_signals() -> Iterator[None]:
    """A job takes SIGTERM and SIGHUP for itself: gives them back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def refuse(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, own_signals: None
) -> Refuse:
    """Runs a command line in this process, checks that it is refused as it should be, returns the message."""

    def run(arguments: list[str], *parts: str) -> str:
        monkeypatch.setattr(sys, "argv", ["prune_lab", *arguments])
        before = files_below(tmp_path)
        capsys.readouterr()
        code = program._run(arguments)
        message = check_message(code, capsys.readouterr().err, *parts)
        check_nothing_is_left(before, tmp_path)
        return message

    return run


@pytest.mark.parametrize("bad", TABLE, ids=[bad.id for bad in TABLE])
def test_a_bad_input_is_refused(bad: Bad, refuse: Refuse, small: list[str], folder: Path, tmp_path: Path) -> None:
    def placed(words: Iterable[str]) -> list[str]:
        return [word.replace("PLACE", str(tmp_path)) for word in words]

    shutil.copytree(folder, tmp_path / "model")
    bad.prepare(tmp_path)
    refuse(placed([*bad.flags, *(small if bad.small else []), *bad.overrides]), *placed(bad.says))
    assert "PRUNE_LAB_ALLOW" not in os.environ


def test_the_table_has_every_group() -> None:
    counts = Counter(bad.group for bad in TABLE)
    assert set(counts) == {"config", "recipe", "data", "checkpoint"}
    assert min(counts.values()) >= 30
    assert len({bad.id for bad in TABLE}) == len(TABLE)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_refused(refuse: Refuse, small: list[str]) -> None:
    refuse([*small, "device=cuda"], "device='cuda'", "0 CUDA devices", "device=auto")


def test_a_model_without_a_name_is_refused(refuse: Refuse) -> None:
    refuse(["model=hf"], "model.name is required", "model.name=...")


def test_text_without_a_path_is_refused(refuse: Refuse, folder: Path) -> None:
    refuse(["model=hf", f"model.name={folder}", "dataset=text"], "dataset.path is required")


def test_an_unknown_flag_is_refused(cli: Cli) -> None:
    """argparse says it in its own way, in two lines."""
    done = cli("--nope")
    assert done.returncode == 2
    assert "--nope" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_hub_model_that_cannot_be_had_is_refused(cli: Cli, small: list[str]) -> None:
    """The test suite works offline (HF_HUB_OFFLINE), as many clusters do."""
    done = cli(*small, "model.name=nobody/nothing")
    check_message(done.returncode, done.stderr, "model.name='nobody/nothing'", "folder", "HF_HUB_OFFLINE")


def recipe(place: Path, text: str) -> list[str]:
    """A recipe x, and the command line's part that names it."""
    (place / "recipes").mkdir()
    (place / "recipes" / "x.yaml").write_text(f"defaults: [config, _self_]\n{text}\n")
    return ["-cd", str(place / "recipes"), "-cn", "x"]


def test_a_harmless_recipe_is_let_through(refuse: Refuse, small: list[str], tmp_path: Path) -> None:
    """The same way in, and it comes as far as its own wrong value."""
    text = "hydra: {run: {dir: inside}, sweeper: {params: {seed: '0,1'}}}\namount: 7"
    refuse([*recipe(tmp_path, text), *small], "amount=7.0")
    assert (tmp_path / "inside").is_dir()


# The same through real processes.


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["amount=1.5"], ("amount=1.5", "[0, 1)")),
        (["nope=1"], ("nope", "amount")),
        (["method._target_=os.system"], ("method._target_='os.system'", "not allowed")),
        (["dataset.path=nowhere.txt"], ("dataset.path='nowhere.txt'", "names no file")),
        (["method=nope", "-m"], ("method/nope", "structured")),
    ],
)
def test_the_program_itself_refuses(
    overrides: list[str], parts: tuple[str, ...], cli: Cli, small: list[str], tmp_path: Path
) -> None:
    before = files_below(tmp_path)
    done = cli(*small, *overrides)
    check_message(done.returncode, done.stderr, *parts)
    assert done.stdout == ""
    check_nothing_is_left(before, tmp_path)


def test_the_program_itself_refuses_a_recipe(cli: Cli, small: list[str], tmp_path: Path) -> None:
    """Where Hydra would have acted on it: a process of its own, as a sweep."""
    made = tmp_path / "made"
    evil = f"hydra: {{mode: MULTIRUN, callbacks: {{evil: {{_target_: os.mkdir, path: {made}}}}}}}"
    done = cli(*recipe(tmp_path, evil), *small)
    check_message(done.returncode, done.stderr, "hydra.callbacks.evil", "not allowed")
    assert not made.exists()


def test_the_traceback_of_a_refusal_is_nowhere_and_its_reason_is_in_the_log(
    refuse: Refuse, small: list[str], tmp_path: Path
) -> None:
    refuse([*small, "amount=1.5", "hydra.run.dir=here"], "amount=1.5")
    summary = json.loads((tmp_path / "here" / "summary.json").read_text())
    assert summary["status"] == "FAILED"
    assert "amount=1.5" in summary["reason"]
    log = (tmp_path / "here" / "prune_lab.log").read_text()
    assert "amount=1.5" in log
    assert "Traceback" not in log


@pytest.mark.parametrize(
    ("arguments", "light"),
    [
        (["--help"], True), (["--cfg", "job"], True), (["nope=1"], True), (["measure.pairs=3"], False),
        (["schedule=iterative", "method.pattern='2:4'"], False),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_nothing_heavy_is_imported_before_there_is_a_job(arguments: list[str], light: bool, tmp_path: Path) -> None:
    """Nor for what a part of a job refuses by itself, or beside another one, but for a console: a typo fails fast."""
    command = [sys.executable, "-X", "importtime", "-m", "prune_lab", *arguments]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    imported = set(re.findall(r"^import time:.*\|\s+([\w.]+)$", done.stderr, re.MULTILINE))
    assert {"hydra", "prune_lab.config.recipes"} <= imported  # the list is what it seems to be
    heavy = {"torch", "transformers", "mlflow", "datasets", "numpy", "pandas", "matplotlib"}
    assert not imported & (heavy | {"rich"} if light else heavy)
    assert not list(tmp_path.rglob("mlflow.db"))
