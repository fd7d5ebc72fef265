"""Small real parts: a Llama of random weights in the Hub's layout, its tokenizer, text, and the command line."""

from __future__ import annotations

import copy
import functools
import inspect
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a process of tests for each core: threads would only be in their way
os.environ["PRUNE_LAB_TURNS"] = tempfile.mkdtemp()  # what one of them times is no reason for the others to wait

import pytest
import torch
from warm import note_what_imports_left, run_module

from prune_lab.models.anatomy import Anatomy
from prune_lab.models.load import HubModel, Loaded
from prune_lab.pruning.calibration import Calibrator, block_statistics
from prune_lab.pruning.statistics import LinearStatistics
from prune_lab.system.device import Device
from prune_lab.text.train_tokenizer import train_tokenizer

ROOT = Path(__file__).parent.parent
CPU = Device(torch.device("cpu"), torch.float32)

# What a config of each family needs beside the common fields. These name their parts as Llama does ...
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},  # has biases in q, k and v
    "qwen3": {"head_dim": 8},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0},  # low enough to matter
    "gemma3_text": {"head_dim": 8, "query_pre_attn_scalar": 8},
}
# ... and these do not: fused or transposed matrices, other names, no grouped queries.
OTHER_FAMILIES: dict[str, dict[str, Any]] = {
    "phi3": {},
    "gpt2": {"n_embd": 32, "n_inner": 48, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt_neox": {},
}
ALL_FAMILIES = FAMILIES | OTHER_FAMILIES


# What a function names that starts processes or a whole run: modules of Python, a browser, functions of warm.py and
# processes.py; the command line itself, within the test's process; and what measures in a fresh one.
STARTERS = {
    "subprocess", "multiprocessing", "venv", "sync_playwright", "run_module", "start_module", "together", "launched",
    "give_store", "program", "measure_memory", "llama_cpp",
}  # fmt: skip


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks as `process` what starts one of these: a test, one of its fixtures, or what they call in test files."""
    for item in items:
        fixtures = [found.func for of in item._fixtureinfo.name2fixturedefs.values() for found in of]
        here = (item.module.__name__, __name__)
        own = [one for one in [item.function, *fixtures] if getattr(one, "__module__", None) in here]
        if any(map(starts_processes, own)):
            item.add_marker("process")


@functools.cache
def starts_processes(function: Any) -> bool:
    """Whether one of STARTERS is named by a function, or by a function or class of a test file that it leads to."""
    waiting, known = [inspect.unwrap(function)], set[Any]()
    for found in waiting:
        names, codes = set[str](), [found.__code__]
        for code in codes:
            names |= {*code.co_names}
            codes += [part for part in code.co_consts if inspect.iscode(part)]
        if names & STARTERS:
            return True
        beside = [found.__globals__.get(name) for name in names]
        beside += [member for one in beside if inspect.isclass(one) for member in vars(one).values()]
        for one in [inspect.unwrap(one) for one in beside if inspect.isfunction(one)]:
            if inspect.isfunction(one) and is_of_tests(one, function.__module__) and one not in known:
                known.add(one)
                waiting.append(one)
    return False


def is_of_tests(function: Any, here: str) -> bool:
    """Whether a function is of the module `here` or of any file of tests."""
    return function.__module__ == here or str(function.__module__).startswith("test_")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Before a test's fixtures change the environment."""
    note_what_imports_left()


def pytest_unconfigure() -> None:
    """Removes the locks of this process."""
    shutil.rmtree(os.environ["PRUNE_LAB_TURNS"], ignore_errors=True)


def make_folder(folder: Path, family: str = "llama", seed: int = 0, **changes: Any) -> Path:
    """A random-weight model in the Hub's layout: hidden 32, 2 blocks, 4 heads in 2 KV groups, 48 MLP channels."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {
        "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
        "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0,
    }  # fmt: skip
    if family == "gpt2":
        shape = {key: value for key, value in shape.items() if key.endswith(("id", "size", "embeddings"))}
        for renamed in ("hidden_size", "intermediate_size", "max_position_embeddings"):
            del shape[renamed]
    config = AutoConfig.for_model(family, **{**shape, **ALL_FAMILIES[family], **changes})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # far enough from zero that biases and norms matter in every comparison
        for name, weight in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                weight.add_(torch.randn_like(weight) * 0.2)
            else:
                weight.mul_(4)
    model.save_pretrained(folder)
    train_tokenizer(tuple(story(seed) for seed in range(20)), 300, folder, context=128)
    return folder


def copied(loaded: Loaded) -> Loaded:
    """A copy to be changed."""
    return Loaded(copy.deepcopy(loaded.model), loaded.tokenizer, loaded.name, loaded.family)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """Of three windows of random tokens, the same each time."""
    tokens = torch.randint(300, (3, 24), generator=torch.Generator().manual_seed(5))
    found: torch.Tensor = model(input_ids=tokens, use_cache=False).logits
    return found


def observed(
    calibrator: Calibrator, anatomy: Anatomy, needs: frozenset[str], behind_dense: bool = False
) -> Iterator[dict[str, LinearStatistics]]:
    """Statistics of all Linears, block by block: the same fields of each."""
    of_all = {name: needs for name, _ in anatomy.linears()}
    return block_statistics(anatomy, of_all, 0, calibrator, behind_dense)


def story(seed: int, sentences: int = 60) -> str:
    """A document of simple sentences, different for every seed."""
    generator = torch.Generator().manual_seed(seed)
    subjects, verbs, things = ["the cat", "a dog", "our bird", "one fish"], ["sees", "likes", "finds"], "ABCDEFGH"
    lines = []
    for _ in range(sentences):
        i, j, k = (int(torch.randint(n, (1,), generator=generator)) for n in (4, 3, 8))
        lines.append(f"{subjects[i]} {verbs[j]} thing {things[k]}{seed}.")
    return "\n".join(lines)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama in the Hub's layout."""
    return make_folder(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture
def loaded(folder: Path) -> Loaded:
    """The small Llama, loaded in float32."""
    return HubModel(name=str(folder)).load(CPU, seed=0)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 120 txt documents, enough for every split."""
    place = tmp_path_factory.mktemp("corpus")
    for seed in range(120):
        (place / f"{seed}.txt").write_text(story(seed), encoding="utf-8")
    return place


@pytest.fixture(autouse=True)
def own_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test works in a folder of its own, with a cache of its own and no store but its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PRUNE_LAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def small(folder: Path, corpus: Path) -> list[str]:
    """Overrides that run on the small model and text, fast: measure=quick with few windows."""
    return [
        "model=hf", f"model.name={folder}", "dataset=text", f"dataset.path={corpus}", "dataset.seq_len=32",
        "measure=quick", "measure.max_windows=8", "measure.prompt_tokens=16", "measure.decode_tokens=2",
    ]  # fmt: skip


@pytest.fixture(scope="session")
def older(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which transformers is 4.57, with the packages that are of its time; the others are ours."""
    place = tmp_path_factory.mktemp("older")
    packages = ("transformers==4.57.*", "huggingface-hub>=0.34,<1", "tokenizers>=0.22,<=0.23.0")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(place), *packages]
    subprocess.run(command, check=True)
    paths = [str(place), str(ROOT), str(ROOT / "tests")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}


def in_older(environment: dict[str, str], code: str, *arguments: str) -> str:
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    """Runs `python -m prune_lab ...` as a user would, in the test's folder."""

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return run_module("prune_lab", list(arguments), tmp_path, **environment)

    return run
