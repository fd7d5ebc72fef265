"""Whatever is wrong with what was typed is said in one short line, with exit code 2 and nothing left behind.

Most cases run in this process, through the function that the command line is; some in a real process.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, Cli, make_folder
from safetensors.torch import load_file, save_file

from prune_lab import __main__ as program
from prune_lab.models.load import TINY

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


def check_nothing_runs(folder: Path) -> None:
    """No run of the store in `folder` is RUNNING; a refusal before the store is opened leaves no store."""
    if (folder / "mlflow.db").exists():
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
        capsys.readouterr()
        code = program._run(arguments)
        message = check_message(code, capsys.readouterr().err, *parts)
        check_nothing_runs(tmp_path)
        return message

    return run


# Overrides after the small model and text, and what the message must hold: key, value, and what is allowed.
WRONG_VALUES: list[tuple[str, tuple[str, ...]]] = [
    ("amount=1.5", ("amount=1.5", "[0, 1)")),
    ("amount=1", ("amount=1", "[0, 1)")),
    ("amount=-0.1", ("amount=-0.1", "[0, 1)")),
    ("amount=nan", ("amount=nan", "[0, 1)")),
    ("amount=abc", ("amount", "abc", "Float")),
    ("method.amount=1.5", ("method.amount=1.5", "[0, 1)")),
    ("method=nope", ("method", "nope", "magnitude", "structured")),
    ("dataset=nope", ("dataset", "nope", "stdlib", "text")),
    ("tracking=nope", ("tracking", "nope", "mlflow", "none")),
    ("nope=1", ("nope", "amount", "seed", "device")),
    ("method.nope=1", ("method.nope", "pattern", "scope")),
    ("+method.nope=1", ("method.nope", "pattern", "scope")),
    ("+nope=1", ("nope", "amount", "seed", "device")),
    ("~method", ("method",)),
    ("amount", ("amount",)),
    ("method=magnitude,structured", ("method", "magnitude,structured", "-m")),
    ("seed=-1", ("seed=-1", "[0, 2^63)")),
    ("seed=1.5", ("seed", "1.5", "Integer")),
    ("export=perhaps", ("export", "perhaps", "bool")),
    ("name=''", ("name=''", "1 to 250")),
    ("dtype=float8", ("dtype='float8'", "float32", "bfloat16", "float16")),
    ("device=tpu", ("device='tpu'", "auto", "cpu", "cuda")),
    ("device=cuda:99", ("device='cuda:99'", "CUDA devices")),
    ("method.pattern=124", ("method.pattern='124'", "quote")),
    ("method.pattern=5:4", ("method.pattern='5:4'", "from 1 to M")),
    ("method.pattern=2-4", ("method.pattern='2-4'", "N:M")),
    ("method.scope=nope", ("method.scope='nope'", "layer", "global")),
    ("method=structured method.units=[nope]", ("method.units=['nope']", "mlp", "heads")),
    ("method=structured method.units=[]", ("method.units=[]", "mlp", "heads")),
    ("method=structured method.score=nope", ("method.score='nope'", "l2", "l1", "random")),
    ("method=structured method.round_to=0", ("method.round_to=0", "at least 1")),
    ("model.weights=nope", ("model.weights='nope'", "pretrained", "random")),
    ("recovery=finetune recovery.steps=0", ("recovery.steps=0", "at least 1")),
    ("recovery=finetune recovery.lr=-1", ("recovery.lr=-1", "(0, 1)")),
    ("recovery=finetune recovery.batch_size=0", ("recovery.batch_size=0", "at least 1")),
    ("recovery=finetune recovery.autocast=fp4", ("recovery.autocast='fp4'", "auto", "bfloat16", "none")),
    ("measure.pairs=3", ("measure.pairs=3", "at least 10")),
    ("measure.max_windows=0", ("measure.max_windows=0", "at least 1")),
    ("dataset.seq_len=1", ("dataset.seq_len=1", "at least 2")),
    ("dataset.calibration.n_samples=0", ("dataset.calibration.n_samples=0", "at least 1")),
]


@pytest.mark.parametrize(("overrides", "parts"), WRONG_VALUES, ids=[overrides for overrides, _ in WRONG_VALUES])
def test_a_wrong_value_is_refused(overrides: str, parts: tuple[str, ...], refuse: Refuse, small: list[str]) -> None:
    refuse([*small, *overrides.split()], *parts)


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


# Broken models: each changes a copy of the small model's folder, and the message must hold the parts.


def of_unknown_family(model: Path) -> tuple[str, ...]:
    change_config(model, model_type="bert")
    return "bert", "llama", "qwen3", "FAMILIES in prune_lab/models/anatomy.py"


def without_config(model: Path) -> tuple[str, ...]:
    (model / "config.json").unlink()
    return "model.name=", str(model), "config.json"


def with_broken_config(model: Path) -> tuple[str, ...]:
    (model / "config.json").write_text("{nope")
    return "model.name=", str(model), "config.json", "JSON"


def without_weights(model: Path) -> tuple[str, ...]:
    (model / "model.safetensors").unlink()
    return "model.name=", "no weights", "model.weights=random"


def with_a_pickle_only(model: Path) -> tuple[str, ...]:
    """A checkpoint of the old kind, which would load if anyone asked for it."""
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    return "model.name=", "pytorch_model.bin", "safetensors"


def with_nan_weights(model: Path) -> tuple[str, ...]:
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return "model.name=", "model.layers.1.mlp.up_proj.weight", "NaN"


def with_a_weight_missing(model: Path) -> tuple[str, ...]:
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return "model.name=", "model.layers.1.mlp.up_proj.weight"


def with_a_weight_of_another_shape(model: Path) -> tuple[str, ...]:
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.ones(7, 32)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return "model.name=", "cannot be loaded"


def cut_short(model: Path) -> tuple[str, ...]:
    weights = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    return "model.name=", "cannot be loaded"


def without_tokenizer(model: Path) -> tuple[str, ...]:
    for file in model.glob("tokenizer*"):
        file.unlink()
    return "model.name=", "tokenizer.json"


def with_a_tokenizer_of_another_model(model: Path) -> tuple[str, ...]:
    for file in Path(TINY).glob("tokenizer*"):
        shutil.copy(file, model)
    return "tokenizer", "vocabulary has 300", "do not belong together"


def change_config(model: Path, **changes: Any) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | changes))


BROKEN_MODELS = [
    of_unknown_family, without_config, with_broken_config, without_weights, with_a_pickle_only, with_nan_weights,
    with_a_weight_missing, with_a_weight_of_another_shape, cut_short, without_tokenizer,
    with_a_tokenizer_of_another_model,
]  # fmt: skip


@pytest.mark.parametrize("damage", BROKEN_MODELS, ids=[damage.__name__ for damage in BROKEN_MODELS])
def test_a_broken_model_is_refused(
    damage: Callable[[Path], tuple[str, ...]], refuse: Refuse, small: list[str], folder: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(folder, model)
    refuse([*small, f"model.name={model}"], *damage(model))


@pytest.mark.parametrize("name", ["/nowhere/llama", "./llama", "a/b/c"])
def test_a_missing_folder_is_refused(name: str, refuse: Refuse, small: list[str]) -> None:
    refuse([*small, f"model.name={name}"], f"model.name={name!r}", "neither a folder here nor a Hub id")


def test_a_hub_model_that_cannot_be_had_is_refused(cli: Cli, small: list[str]) -> None:
    """The test suite works offline (HF_HUB_OFFLINE), as many clusters do."""
    done = cli(*small, "model.name=nobody/nothing")
    check_message(done.returncode, done.stderr, "model.name='nobody/nothing'", "folder", "HF_HUB_OFFLINE")


# Texts that cannot be used: each is a file's name and bytes, and what the message must hold.
BROKEN_TEXTS: dict[str, tuple[str, bytes, tuple[str, ...]]] = {
    "empty": ("a.txt", b"", ("there is no text",)),
    "blank": ("a.txt", b" \n\t\n", ("there is no text",)),
    "too short": ("a.txt", b"The cat sees a dog.\n", ("dataset.seq_len=32", "test split", "tokens")),
    "not UTF-8": ("a.txt", b"\xff\xfe\xfa caf\xe9 " * 500, ("cannot be read as text", "utf-8")),
    "broken jsonl": ("a.jsonl", b'{"text": "one"}\n{"text": "tw\n', ("cannot be read as json",)),
    "jsonl without the column": ("a.jsonl", b'{"body": "one", "id": 3}\n', ("dataset.column='text'", "body, id")),
    "a column of numbers": ("a.jsonl", b'{"text": 1}\n{"text": 2}\n', ("dataset.column='text'",)),
    "no parquet": ("a.parquet", b"this is not parquet", ("cannot be read as parquet",)),
    "of no known kind": ("a.csv", b"text\none\n", ("a.csv", ".txt, .jsonl, .parquet")),
}


@pytest.mark.parametrize("name", BROKEN_TEXTS)
def test_unusable_text_is_refused(name: str, refuse: Refuse, small: list[str], tmp_path: Path) -> None:
    file, content, parts = BROKEN_TEXTS[name]
    (tmp_path / file).write_bytes(content)
    refuse([*small, f"dataset.path={tmp_path / file}"], f"{tmp_path / file}", *parts)


@pytest.mark.parametrize("key", ["path", "test_path"])
@pytest.mark.parametrize("place", ["absent.txt", "absent", "*.txt"])
def test_a_path_that_names_nothing_is_refused(
    key: str, place: str, refuse: Refuse, small: list[str], tmp_path: Path
) -> None:
    refuse([*small, f"dataset.{key}={tmp_path / place}"], f"dataset.{key}=", str(tmp_path / place), "names no file")


def test_an_empty_test_text_is_refused(refuse: Refuse, small: list[str], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n")
    refuse([*small, f"dataset.test_path={tmp_path / 'a.txt'}"], f"dataset.test_path={tmp_path / 'a.txt'}", "no text")


def test_windows_longer_than_the_context_are_refused(refuse: Refuse, small: list[str]) -> None:
    refuse([*small, "dataset.seq_len=129"], "dataset.seq_len=129", "context of 128")


def test_inputs_that_the_pattern_does_not_divide_are_refused(refuse: Refuse, small: list[str]) -> None:
    """The small model's Linears have 32 inputs."""
    overrides = ["measure=quality_only", "method.pattern=2:7", "tracking=none"]
    refuse([*small, *overrides], "method.pattern=2:7", "32 inputs", "multiple of 7")


def test_kv_groups_that_no_config_can_hold_are_refused(refuse: Refuse, small: list[str], tmp_path: Path) -> None:
    """Llama's config wants the query heads to divide the hidden size, and 3 do not divide 40."""
    model = make_folder(
        tmp_path / "model", hidden_size=40, num_attention_heads=4, num_key_value_heads=4, num_hidden_layers=1
    )  # fmt: skip
    overrides = [f"model.name={model}", "method=structured", "method.units=[heads]", "amount=0.25"]
    refuse([*small, *overrides, "tracking=none"], "method.amount=0.25", "3 of 4 KV groups", "amount=0.5")


# What a shared recipe must not reach for.


@pytest.mark.parametrize(
    "target",
    [
        "os.system", "prune_lab.runner.shutil.rmtree", "prune_lab.runner.shutil", "prune_lab.runner.save_model",
        "prune_lab.sweep.SweepCallback", "prune_lab.methods.nope.Nope", "Magnitude", "", "null",
    ],
)  # fmt: skip
def test_only_our_own_parts_can_be_named(target: str, refuse: Refuse, small: list[str]) -> None:
    refuse([*small, f"method._target_={target}"], "method._target_=", target.replace("null", "None"), "allowed")


def recipe(place: Path, text: str, **groups: str) -> list[str]:
    """A recipe x, beside it options of groups (method="...": method/mine.yaml), and the command line's part."""
    (place / "recipes").mkdir()
    (place / "recipes" / "x.yaml").write_text(f"defaults: [config, _self_]\n{text}\n")
    for group, content in groups.items():
        (place / "recipes" / group).mkdir()
        (place / "recipes" / group / "mine.yaml").write_text(content)
    return ["-cd", str(place / "recipes"), "-cn", "x"]


# A recipe's text and what the message must hold. MADE is a folder that must not be there afterwards.
EVIL_RECIPES: dict[str, tuple[str, tuple[str, ...]]] = {
    "a callback": (
        "hydra: {callbacks: {evil: {_target_: os.mkdir, path: MADE}}}",
        ("hydra.callbacks.evil._target_='os.mkdir'", "not allowed"),
    ),
    "a callback in the place of ours": (
        "hydra: {callbacks: {sweep: {_target_: os.mkdir, path: MADE}}}", ("hydra.callbacks.sweep", "not allowed"),
    ),
    "the environment": (
        "hydra: {job: {env_set: {PRUNE_LAB_ALLOW: os}}}\nmethod: {_target_: os.mkdir}",
        ("hydra.job.env_set.PRUNE_LAB_ALLOW='os'", "not allowed"),
    ),
    "a copied environment": ("hydra: {job: {env_copy: [HOME]}}", ("hydra.job.env_copy", "not allowed")),
    "a launcher": ("hydra: {launcher: {_target_: os.mkdir}}", ("hydra.launcher", "not allowed")),
    "a sweeper": ("hydra: {sweeper: {_target_: os.mkdir}}", ("hydra.sweeper", "not allowed")),
    "a log handler": (
        "hydra: {job_logging: {handlers: {file: {filename: MADE}}}}", ("hydra.job_logging", "not allowed"),
    ),
    "a run folder elsewhere": ("hydra: {run: {dir: MADE}}", ("hydra.run.dir", "not allowed")),
    "a sweep folder above": ("hydra: {sweep: {dir: ../made}}", ("hydra.sweep.dir='../made'", "not allowed")),
    "changing the folder": ("hydra: {job: {chdir: true}}", ("hydra.job.chdir=True", "not allowed")),
    "a search path": ("hydra: {searchpath: [file:///]}", ("hydra.searchpath", "not allowed")),
    "reading the environment": ("name: ${oc.env:HOME}", ("name='${oc.env:HOME}'", "may not read the machine")),
    "reading it inside a part": ("dataset: {path: 'x${oc.env:HOME}'}", ("${oc.env:HOME}", "may not read the machine")),
    "a foreign part": ("method: {_target_: os.mkdir}", ("method._target_='os.mkdir'", "not allowed")),
}  # fmt: skip


@pytest.mark.parametrize("name", EVIL_RECIPES)
def test_a_recipe_that_reaches_for_the_machine_is_refused(
    name: str, refuse: Refuse, small: list[str], tmp_path: Path
) -> None:
    text, parts = EVIL_RECIPES[name]
    made = tmp_path / "made"
    refuse([*recipe(tmp_path, text.replace("MADE", str(made))), *small], *parts)
    assert not made.exists()
    assert "PRUNE_LAB_ALLOW" not in os.environ


@pytest.mark.parametrize(
    ("option", "parts"),
    [
        ("_target_: prune_lab.methods.magnitude.Magnitude\nscope: ${oc.env:HOME}\n", ("may not read the machine",)),
        ("# @package _global_\nhydra: {job: {env_set: {A: b}}}\n", ("mine.yaml", "options of Hydra")),
        ("# @package hydra\njob: {env_set: {A: b}}\n", ("mine.yaml", "options of Hydra")),
        ("_target_: os.system\n", ("method._target_='os.system'", "not allowed")),
    ],
    ids=["reads the environment", "global package", "hydra package", "foreign class"],
)
def test_an_option_beside_a_recipe_is_guarded_too(
    option: str, parts: tuple[str, ...], refuse: Refuse, small: list[str], tmp_path: Path
) -> None:
    """The option is chosen on the command line, after the recipe itself was read."""
    refuse([*recipe(tmp_path, "", method=option), *small, "method=mine"], *parts)


def test_a_harmless_recipe_is_let_through(refuse: Refuse, small: list[str], tmp_path: Path) -> None:
    """The same way in, and it comes as far as its own wrong value."""
    text = "hydra: {run: {dir: inside}, sweeper: {params: {seed: '0,1'}}}\namount: 7"
    refuse([*recipe(tmp_path, text), *small], "amount=7.0")
    assert (tmp_path / "inside").is_dir()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["-cd", "nowhere"], ("-cd nowhere", "no such folder")),
        (["-cp", "nowhere"], ("-cp", "-cd")),
        (["-cn", "nowhere"], ("nowhere",)),
        (["-cd", ".", "-cn", "nowhere"], ("nowhere",)),
    ],
)
def test_a_missing_recipe_is_refused(arguments: list[str], parts: tuple[str, ...], refuse: Refuse) -> None:
    refuse(arguments, *parts)


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
    done = cli(*small, *overrides)
    check_message(done.returncode, done.stderr, *parts)
    assert done.stdout == ""
    check_nothing_runs(tmp_path)


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


def cpu_seconds(command: list[str], folder: Path) -> float:
    """Processor time of a command, the better of two goes."""
    taken = []
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            command, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, check=False
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        taken.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(taken)


def test_a_typo_fails_fast(small: list[str], tmp_path: Path) -> None:
    """Beside the imports that no run can do without, measured here and now: a clock alone would measure the machine."""
    imports = cpu_seconds([sys.executable, "-c", "import torch, hydra"], tmp_path)
    assert cpu_seconds([sys.executable, "-m", "prune_lab", *small, "measure.pairs=3"], tmp_path) < 2 * imports


@pytest.mark.parametrize("arguments", [["--help"], ["--cfg", "job"], ["nope=1"]])
def test_nothing_heavy_is_imported_before_there_is_a_job(arguments: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "prune_lab", *arguments]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    imported = set(re.findall(r"^import time:.*\|\s+([\w.]+)$", done.stderr, re.MULTILINE))
    assert {"hydra", "prune_lab.recipes"} <= imported  # the list is what it seems to be
    assert not imported & {"torch", "transformers", "mlflow", "datasets", "numpy", "pandas", "matplotlib", "rich"}
    assert not list(tmp_path.rglob("mlflow.db"))
