"""The two calls from Python: the weights of the command line, its words, and a process that is left as it was."""

from __future__ import annotations

import json
import logging
import os
import random
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import pytest
import torch
from conftest import ROOT, Cli, story
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from omegaconf.basecontainer import BaseContainer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import prune_lab
from prune_lab.errors import Refused

PAGE = ROOT / "docs" / "python.md"
SMALL = {"n_samples": 8, "seq_len": 32}
QUIET = ["tracking=none", "measure=quality_only", "measure.max_windows=4", "quiet=true"]


def loaded(folder: Path) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def same(model: Any, tensors: dict[str, torch.Tensor]) -> bool:
    own = {name: tensor for name, tensor in model.state_dict().items() if name in tensors}
    return own.keys() == tensors.keys() and all(torch.equal(own[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    ("method", "keys"),
    [
        ("structured", {"units": ["mlp", "heads"], "score": "wanda", "refit": "inputs"}),
        pytest.param("wanda", {"pattern": "2:4"}, marks=pytest.mark.slow),
        pytest.param("taylor", {}, marks=pytest.mark.slow),
        pytest.param("sparsegpt", {}, marks=pytest.mark.slow),
        pytest.param("random", {}, marks=pytest.mark.slow),
        pytest.param("depth", {}, marks=pytest.mark.slow),
        pytest.param("structured", {}, marks=pytest.mark.slow),
    ],
)
def test_the_weights_are_those_of_the_command_line(
    cli: Cli, small: list[str], folder: Path, tmp_path: Path, method: str, keys: dict[str, Any]
) -> None:
    documents = [story(seed) for seed in range(300, 312)]
    rows = "".join(json.dumps({"text": text}) + "\n" for text in documents)
    (tmp_path / "calibration.jsonl").write_text(rows)
    model, tokenizer = loaded(folder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pruned, report = prune_lab.compress(model, tokenizer, method, 0.5, documents, seed=3, calibration=SMALL, **keys)
    text = ["dataset.calibration.source=text", "dataset.calibration.name=calibration.jsonl"]
    done = cli(*small, *QUIET, *report.overrides, *text, "export=hf", "hydra.run.dir=run")
    assert done.returncode == 0, done.stderr
    assert same(pruned, load_file(tmp_path / "run" / "export" / "model.safetensors"))
    assert same(model, before)
    metrics = json.loads((tmp_path / "run" / "summary.json").read_text())["metrics"]
    assert (report.removed, report.parameters) == (metrics["amount/realized"], metrics["params/total"])
    again, _ = prune_lab.compress(
        model, tokenizer, {"name": method, **keys}, 0.5, Path("calibration.jsonl"), seed=3, calibration=SMALL
    )
    assert same(again, pruned.state_dict())


@pytest.mark.slow
def test_without_a_text_the_included_one_is_seen(cli: Cli, folder: Path, tmp_path: Path) -> None:
    model, tokenizer = loaded(folder)
    pruned, report = prune_lab.compress(model, tokenizer, "wanda", calibration=SMALL)
    run = ["model=hf", f"model.name={folder}", "dataset.seq_len=64", *QUIET, *report.overrides]
    done = cli(*run, "export=hf", "hydra.run.dir=run")
    assert done.returncode == 0, done.stderr
    assert same(pruned, load_file(tmp_path / "run" / "export" / "model.safetensors"))


def test_in_place_is_the_model_itself(folder: Path) -> None:
    model, tokenizer = loaded(folder)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("q_proj" in name)
    model.train()
    pruned, report = prune_lab.compress(model, tokenizer, "magnitude", 0.5, in_place=True)
    assert pruned is model
    assert model.training
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"model.layers.{n}.self_attn.q_proj.weight" for n in range(2)
    }
    assert report.nonzero < report.parameters == report.parameters_before
    assert "removed 0.5000 of the pruned scope (0.5 requested)" in str(report)


def test_parts_of_a_model_stay_in_the_mode_that_they_had(folder: Path) -> None:
    model, tokenizer = loaded(folder)
    model.train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    for in_place in (False, True):
        pruned, _ = prune_lab.compress(model, tokenizer, "magnitude", 0.5, in_place=in_place)
        assert [module.training for module in pruned.modules()] == before


def test_gradients_of_the_caller_change_nothing(folder: Path) -> None:
    """Those that a model has from its training are neither added to those of the method, nor left in other shapes."""
    documents = [story(seed) for seed in range(300, 303)]
    model, tokenizer = loaded(folder)
    expected, _ = prune_lab.compress(model, tokenizer, "taylor", 0.5, documents, calibration=SMALL)
    ids = torch.randint(300, (2, 20))
    model(input_ids=ids, labels=ids).loss.backward()
    for parameter in model.parameters():
        parameter.grad.mul_(1000)
    pruned, _ = prune_lab.compress(model, tokenizer, "taylor", 0.5, documents, calibration=SMALL, in_place=True)
    assert same(pruned, dict(expected.state_dict()))
    assert all(parameter.grad is None for parameter in pruned.parameters())


def switches() -> list[Any]:
    """State of this thread that contexts of PyTorch change."""
    nesting = torch.autocast_increment_nesting()
    torch.autocast_decrement_nesting()
    return [torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"), nesting]


@pytest.mark.parametrize(
    "around",
    [
        torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    ],
    ids=["no_grad", "inference_mode", "autocast"],
)  # fmt: skip
def test_contexts_of_the_caller_change_nothing(around: Any, folder: Path, corpus: Path, tmp_path: Path) -> None:
    """PyTorch's switches of this thread that the call is made within: they are for the caller's own code."""
    documents = [story(seed) for seed in range(300, 303)]
    model, tokenizer = loaded(folder)
    for method in ("taylor", "structured", "sparsegpt"):
        expected, _ = prune_lab.compress(model, tokenizer, method, 0.5, documents, calibration=SMALL)
        with around():
            found, _ = prune_lab.compress(model, tokenizer, method, 0.5, documents, calibration=SMALL)
        assert same(found, dict(expected.state_dict()))
    words = ["model=hf", f"model.name={folder}", "dataset=text", f"dataset.path={corpus}", "dataset.seq_len=32", *QUIET]
    words += ["method=magnitude", "amount=0.5", "recovery=finetune", "recovery.steps=2", "resume=false"]
    words += ["recovery.batch_size=2"]
    expected = prune_lab.run([*words, f"hydra.run.dir={tmp_path}/alone"]).metrics["quality/perplexity"]
    with around():
        before = switches()
        assert prune_lab.run([*words, f"hydra.run.dir={tmp_path}/within"]).metrics["quality/perplexity"] == expected
        assert switches() == before


def test_numbers_of_numpy_and_pytorch_and_files_of_a_method(folder: Path) -> None:
    model, tokenizer = loaded(folder)
    amounts = (0.5, np.float64(0.5), torch.tensor(0.5), "0.5")
    reports = [prune_lab.compress(model, tokenizer, "magnitude", amount)[1] for amount in amounts]
    assert {report.nonzero for report in reports} == {reports[0].nonzero}
    documents = [story(seed) for seed in range(300, 303)]
    _, report = prune_lab.compress(model, tokenizer, "sensitivity", 0.5, documents, calibration=SMALL, parts=["block"])
    assert b"|" in report.files["sensitivity.md"]


def test_a_pruned_model_goes_on_in_transformers(folder: Path, tmp_path: Path) -> None:
    model, tokenizer = loaded(folder)
    keys = {"score": "l2", "refit": "none", "units": ["mlp", "heads"]}
    pruned, _ = prune_lab.compress(model, tokenizer, "structured", 0.25, **keys)
    pruned.save_pretrained(tmp_path / "smaller")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "smaller")
    ids = tokenizer("the cat sees thing A1.", return_tensors="pt")["input_ids"]
    assert torch.equal(again(ids).logits, pruned(ids).logits)
    assert pruned.generate(ids, max_new_tokens=3, do_sample=False).shape[1] > ids.shape[1]


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"amount": 1.5}, "amount=1.5 is outside [0, 1)"),
    ({"method": "nope"}, "Could not find 'method/nope'"),
    ({"round_to": 0}, "method.round_to=0 must be at least 1"),
    ({"nothing": 1}, "method.nothing: no such key; allowed are amount, units,"),
    ({"method": {"name": "structured", "score": "x"}}, "method.score='x' is not one of"),
    ({"method": {"score": "l2"}}, "has no name"),
    ({"method": {"name": "structured", "score": "l2"}, "score": "l1"}, "score: given twice"),
    ({"seed": -1}, "seed=-1 is outside"),
    ({"calibration": {"n_samples": 0}}, "dataset.calibration.n_samples=0 must be at least 1"),
    ({"calibration": {"nothing": 0}}, "dataset.calibration.nothing: no such key"),
    ({"calibration": {"source": "c4"}}, "give the text itself"),
    ({"calibration": {"seq_len": 1000}}, "dataset.calibration.seq_len=1000 is above the model's context of 128 tokens"),
    ({"text": 5}, "text is a int"),
    ({"text": " "}, "text is without any text"),
    ({"text": []}, "text is without any text"),
    ({"text": Path("nowhere")}, "nowhere"),
    ({"text": ["too short"]}, "0 windows of 32 tokens"),
    ({"score": object()}, "no override can say this value"),
    ({"method": None}, "method is a NoneType: give the name of a method"),
    ({"method": 3}, "method is a int: give the name of a method"),
    ({"method": {"name": None}}, "method is a NoneType: give the name of a method"),
    ({"method": {1: 2, "name": "structured"}}, "1: keys are names"),
    ({"calibration": [1]}, "calibration is a list: give a dictionary"),
]  # fmt: skip


@pytest.mark.parametrize("every", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_refusals_are_those_of_the_command_line(every: int, folder: Path) -> None:
    """Every second one in the daily loop, and the others."""
    model, tokenizer = loaded(folder)
    documents = [story(seed) for seed in range(300, 303)]
    for wrong, says in WRONG[every::2]:
        call: dict[str, Any] = {"method": "structured", "score": "wanda", "text": documents, "calibration": SMALL}
        if "method" in wrong or "score" in wrong:
            del call["score"]
        if isinstance(wrong.get("calibration"), dict):
            wrong = wrong | {"calibration": SMALL | wrong["calibration"]}
        with pytest.raises(Refused, match=re.escape(says)):
            prune_lab.compress(model, tokenizer, **(call | wrong))
    with pytest.raises(Refused, match="tokenizer is a NoneType"):
        prune_lab.compress(model, None, "wanda", 0.5, documents, calibration=SMALL)
    for other, says in (
        (torch.nn.Linear(2, 2), "model is a Linear"),
        (None, "model is a NoneType"),
        (model.model, "model is a LlamaModel, which has no output layer"),
    ):
        with pytest.raises(Refused, match=says):
            prune_lab.compress(other, tokenizer)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(Refused, match="NaN or infinite"):
        prune_lab.compress(model, tokenizer)


@pytest.mark.parametrize(
    "words",
    [
        ["amount=2"], ["amount=0.1,0.2"], ["method.nothing=1"], ["post=fp8"],
        *(pytest.param(words, marks=pytest.mark.slow) for words in (
            ["amount"], ["nothing=1"], ["method=nope"], ["model=hf"], ["model=hf", "model.name=nowhere"], ["device=tpu"]
        )),
    ],
)  # fmt: skip
def test_a_run_is_refused_in_the_words_of_the_command_line(
    words: list[str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from prune_lab import __main__

    with pytest.raises(Refused) as refusal:
        prune_lab.run([*words, "tracking=none"])
    monkeypatch.setattr(sys, "argv", ["prune_lab", *words, "tracking=none"])
    with own_process_state():
        assert __main__._run(sys.argv[1:]) == 2
    said = capfd.readouterr().err.strip().splitlines()[-1].removeprefix("prune_lab: ")
    assert said[:400] == " ".join(str(refusal.value).split())[:400]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["-m", "amount=0.1"], "flags are for the command line"),
        (["--cfg", "job"], "flags are for the command line"),
        (["hydra.mode=MULTIRUN"], "makes a sweep"),
        ("amount=0.1", "give a list"),
        (None, "overrides=None: give a list"),
    ],
)
def test_what_is_for_the_command_line_alone(words: Any, says: str) -> None:
    with pytest.raises(Refused, match=says):
        prune_lab.run(words)


class own_process_state:  # noqa: N801
    """Context that puts back what a command line changes in a test's process."""

    def __enter__(self) -> None:
        from hydra._internal import hydra as internal

        self.loader, self.signals = internal.ConfigLoaderImpl, _signals()
        self.full = os.environ.get("HYDRA_FULL_ERROR")

    def __exit__(self, *error: object) -> None:
        import signal

        from hydra._internal import hydra as internal

        internal.ConfigLoaderImpl = self.loader  # type: ignore[misc]
        for number, handler in self.signals.items():
            signal.signal(number, handler)
        GlobalHydra.instance().clear()
        if self.full is None:
            os.environ.pop("HYDRA_FULL_ERROR", None)


def _signals() -> dict[Any, Any]:
    import signal

    return {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}


def state() -> dict[str, Any]:
    """What a call must not change."""
    from hydra._internal import hydra as internal
    from transformers.utils import logging as of_transformers

    names = ("", "prune_lab", "transformers", "datasets", "mlflow", "hydra", "matplotlib")
    return {
        "hydra": GlobalHydra.instance().hydra,
        "store": {name: sorted(map(str, node)) if isinstance(node, dict) else node.name
                  for name, node in ConfigStore.instance().repo.items()},
        "configured": HydraConfig.instance().cfg,
        "resolvers": dict(BaseContainer._resolvers),
        "loader": internal.ConfigLoaderImpl,
        "random": random.getstate(),
        "torch": torch.get_rng_state().tolist(),
        "numpy": str(np.random.get_state()),
        "threads": torch.get_num_threads(),
        "grad": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
        "folder": Path.cwd(),
        "environment": dict(os.environ),
        "warnings": list(warnings.filters),
        "signals": _signals(),
        "arguments": list(sys.argv),
        "levels": {name: logging.getLogger(name).level for name in names},
        "handlers": {name: list(logging.getLogger(name).handlers) for name in names},
        "bars": of_transformers.is_progress_bar_enabled(),
    }  # fmt: skip


@pytest.mark.parametrize(
    "own", [pytest.param(False, marks=pytest.mark.slow), True], ids=["without Hydra", "within the caller's Hydra"]
)
def test_the_process_is_as_it_was(own: bool, folder: Path, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "mine.yaml").write_text("a: ${mine:7}\n")
    model, tokenizer = loaded(folder)
    GlobalHydra.instance().clear()
    if own:
        hydra.initialize_config_dir(str(tmp_path / "conf"), version_base="1.3")
        OmegaConf.register_new_resolver("mine", lambda x: x, replace=True)
    documents = [story(seed) for seed in range(300, 303)]
    run = ["model=hf", f"model.name={folder}", "dataset=text", f"dataset.path={corpus}", "dataset.seq_len=32", *QUIET]
    logging.getLogger("mlflow")
    with prune_lab_in_the_way():
        before = state()
        try:
            with torch.no_grad():
                prune_lab.compress(model, tokenizer, "taylor", 0.5, documents, calibration=SMALL)
            assert state() == before
            summary = prune_lab.run([*run, "method=random", "export=hf"])
            assert state() == before
            for wrong in (["amount=2"], ["nothing=1"], ["dataset.path=nowhere"]):
                with pytest.raises(Refused):
                    prune_lab.run([*run, *wrong])
            assert state() == before
            if own:
                assert hydra.compose("mine").a == 7
        finally:
            GlobalHydra.instance().clear()
            OmegaConf.clear_resolver("mine")
    assert summary.status == "FINISHED"
    assert Path(summary.folder).parent.parent.parent == tmp_path
    again = prune_lab.run([*run, "method=random", "export=hf"])  # found again as a command line finds it
    assert again.folder == summary.folder
    assert again.reused_from


class prune_lab_in_the_way:  # noqa: N801
    """Context with settings of the caller's own: a filter for warnings, a level of a logger."""

    def __enter__(self) -> None:
        self.level = logging.getLogger("transformers").level
        logging.getLogger("transformers").setLevel(logging.ERROR + 1)

    def __exit__(self, *error: object) -> None:
        logging.getLogger("transformers").setLevel(self.level)


def test_a_run_that_fails_raises_what_it_failed_for(
    folder: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full, say: the summary says so."""
    from prune_lab import runner

    def full(*arguments: Any, **named: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runner, "_write_files", full)
    run = ["model=hf", f"model.name={folder}", "dataset=text", f"dataset.path={corpus}", "dataset.seq_len=32", *QUIET]
    with pytest.raises(OSError, match="No space left"):
        prune_lab.run([*run, "hydra.run.dir=run"])
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["status"] == "FAILED"
    assert "No space left" in summary["reason"]
    assert "Traceback" in Path("run/prune_lab.log").read_text()


def test_a_recipe(folder: Path, corpus: Path, tmp_path: Path) -> None:
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    keys = "amount: 0.25\nquiet: true\nmeasure: {max_windows: 4}\n"
    choices = ["config", {"override model": "hf"}, {"override dataset": "text"}, {"override measure": "quality_only"},
               {"override tracking": "none"}, "_self_"]  # fmt: skip
    (recipes / "mine.yaml").write_text(f"defaults: {json.dumps(choices)}\n{keys}")
    words = [f"model.name={folder}", f"dataset.path={corpus}", "dataset.seq_len=32"]
    summary = prune_lab.run(words, recipe="mine", recipes=recipes)
    assert summary.metrics["amount/requested"] == 0.25
    with pytest.raises(Refused, match="no such folder"):
        prune_lab.run(words, recipe="mine", recipes=tmp_path / "nowhere")
    (recipes / "mine.yaml").write_text("defaults: [config]\nhydra: {callbacks: {x: {_target_: os.system}}}\n")
    with pytest.raises(Refused, match="not allowed"):
        prune_lab.run(words, recipe="mine", recipes=recipes)


def test_the_import_is_cheap() -> None:
    code = "import sys, prune_lab; print(sorted({'torch', 'transformers', 'hydra', 'mlflow'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_page_runs_as_it_stands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 3
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    said = capsys.readouterr().out
    assert "removed 0.2000 of the pruned scope (0.2 requested)" in said
    assert "amount=1.5 is outside [0, 1)" in said
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "smaller").config.intermediate_size == 384
    assert names["model"].config.intermediate_size == 480
