"""dataset.add_bos: the BOS token before each window, wherever windows pass through a model, and no other target."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CPU, Cli, make_folder, observed, story
from test_tasks import arc_rows, settings, write
from torch.nn.functional import cross_entropy
from trainings import training_of

from prune_lab.errors import Refused
from prune_lab.evaluator import Evaluator
from prune_lab.export.none import NoExport
from prune_lab.measure.settings import Measure
from prune_lab.measure.task_setup import prepare_tasks
from prune_lab.measure.tasks import measure_tasks
from prune_lab.models.anatomy import Anatomy
from prune_lab.models.load import HubModel
from prune_lab.recovery.finetune import Finetune
from prune_lab.report.comparability import warnings
from prune_lab.results.summary import Summary
from prune_lab.system.console import Console
from prune_lab.text.bos import Bos, begin_with_bos, resolve_bos
from prune_lab.text.source import Calibration
from prune_lab.text.text_files import TextFiles

SEQ_LEN = 24
QUIET = Console(quiet=True)


def with_bos(folder: Path) -> Path:
    """The model with a tokenizer that has a BOS token, and does not put it before a text by itself."""
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "bos_token": "<|endoftext|>"}))
    return folder


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_bos(make_folder(tmp_path_factory.mktemp("gemma") / "m", "gemma3_text"))


def bench_of(model: Path, corpus: Path, add_bos: str = "auto", **changes: Any) -> Evaluator:
    text = TextFiles(
        path=str(corpus), seq_len=SEQ_LEN, add_bos=add_bos, calibration=Calibration(n_samples=8, seq_len=20)
    )
    measure = Measure(
        latency=False, memory=False, max_windows=6, prompt_tokens=9, **{"generation_prompts": 0, **changes}
    )
    return Evaluator(HubModel(name=str(model)), text, measure, CPU, 0, QUIET)


@torch.no_grad()
def naive_loss(model: Any, windows: torch.Tensor, bos: int | None) -> float:
    """Mean over windows and over their tokens but the first, one window at a time, as stock transformers has it."""
    losses = []
    for window in windows.long():
        tokens = window if bos is None else torch.cat([torch.tensor([bos]), window])
        logits = model(input_ids=tokens[None]).logits[0]
        before = len(tokens) - len(window)
        losses.append(cross_entropy(logits[before:-1].double(), window[1:]))
    return float(torch.stack(losses).mean())


@pytest.mark.parametrize("add_bos", ["auto", "true", "false"])
@pytest.mark.parametrize("family", ["gemma3_text", "llama"])
def test_perplexity_is_that_of_a_naive_loop(family: str, add_bos: str, corpus: Path, tmp_path: Path) -> None:
    """Gemma needs the token, Llama is measured as in the papers; windows and targets are the same either way."""
    model = with_bos(make_folder(tmp_path / "m", family))
    evaluator, plain = bench_of(model, corpus, add_bos), bench_of(model, corpus, "false")
    assert torch.equal(evaluator.windows, plain.windows)
    assert evaluator.protocol["test_tokens_sha256"] == plain.protocol["test_tokens_sha256"]
    expected_bos = 0 if add_bos == "true" or (add_bos == "auto" and family == "gemma3_text") else None
    assert evaluator.protocol["bos"] == ("none" if expected_bos is None else 0)
    figures = evaluator.evaluate(evaluator.dense, tmp_path, NoExport(), QUIET)
    expected = naive_loss(evaluator.dense.model, evaluator.windows, expected_bos)
    assert math.log(figures.quality.perplexity) == pytest.approx(expected, abs=1e-5)
    with_it = naive_loss(evaluator.dense.model, evaluator.windows, 0)
    assert abs(with_it - naive_loss(evaluator.dense.model, evaluator.windows, None)) > 1e-3
    assert (family == "gemma3_text" and add_bos == "false") == bool(evaluator.bos.warnings)


def test_streamed_it_is_the_same(gemma: Path, corpus: Path, tmp_path: Path) -> None:
    evaluator = bench_of(gemma, corpus)
    text = TextFiles(path=str(corpus), seq_len=SEQ_LEN)
    streamed = Evaluator(HubModel(name=str(gemma), stream=True), text, evaluator.measure, CPU, 0, QUIET)
    here, there = (b.evaluate(b.dense, tmp_path, NoExport(), QUIET).quality for b in (evaluator, streamed))
    assert here.perplexity == pytest.approx(there.perplexity, rel=1e-6)


def test_calibration_sees_the_token_and_predicts_the_text_alone(gemma: Path, corpus: Path) -> None:
    evaluator = bench_of(gemma, corpus)
    calibrator, stamp = evaluator.calibrator(0, QUIET)
    plain, same = bench_of(gemma, corpus, "false").calibrator(0, QUIET)
    assert stamp["tokens_sha256"] == same["tokens_sha256"]
    assert torch.equal(calibrator.windows[:, 1:], plain.windows)
    assert (calibrator.windows[:, 0] == 0).all()
    model = evaluator.dense.model
    assert calibrator.loss(model) == pytest.approx(naive_loss(model, plain.windows, 0), abs=1e-5)
    name, linear = next(Anatomy(model).linears())
    statistics = next(iter(observed(calibrator, Anatomy(model), frozenset({"input_norm"}))))[name]
    inputs: list[torch.Tensor] = []
    hook = linear.register_forward_hook(lambda module, args, out: inputs.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        model(input_ids=calibrator.windows)
    hook.remove()
    assert statistics.input_norm is not None
    torch.testing.assert_close(statistics.input_norm, torch.cat(inputs).norm(dim=0))
    gradients = calibrator.saliency(Anatomy(model), 1)[name]
    expected = torch.zeros_like(linear.weight)
    linear.weight.requires_grad_(True)
    for window in plain.windows:
        logits = model(input_ids=torch.cat([torch.tensor([0]), window])[None]).logits[0]
        (gradient,) = torch.autograd.grad(cross_entropy(logits[1:-1], window[1:]), linear.weight)
        expected += (linear.weight * gradient).abs().detach() / len(plain.windows)
    linear.weight.requires_grad_(False)
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-8)


def test_training_and_validation_see_it(gemma: Path, tmp_path: Path) -> None:
    """The first loss and the first validation perplexity are those of naive loops over the same windows."""
    loaded = HubModel(name=str(gemma)).load(CPU, 0)
    found: dict[str, float] = {}
    training = training_of(
        loaded, tmp_path, lambda step, values: found.update({f"{name}@{step}": v for name, v in values.items()}),
        validation=tuple(story(i) for i in range(20, 24)), steps=1, bos=Bos(0),
    )  # fmt: skip
    windows = training.tokens.windows("validation", training.seq_len)
    expected = naive_loss(loaded.model, windows[:3], 0)
    from prune_lab.recovery.order import WindowOrder

    batch = WindowOrder(training.tokens.stream("train"), training.seq_len, 4, training.seed).batch(0)
    first = naive_loss(loaded.model, batch, 0)
    recipe = Finetune(steps=1, batch_size=4, validate_every=1, validate_windows=3, autocast="none", lr=1e-9)
    recipe.recover(loaded.model, training)
    assert math.log(found["validation/perplexity@0"]) == pytest.approx(expected, abs=1e-5)
    assert found["train/loss@1"] == pytest.approx(first, abs=1e-5)


def test_timed_prompts_begin_with_it(gemma: Path, corpus: Path) -> None:
    evaluator, plain = (bench_of(gemma, corpus, add_bos) for add_bos in ("auto", "false"))
    assert evaluator.prompt.tolist() == [[0, *plain.prompt[0].tolist()]]
    assert evaluator.protocol["prompt_tokens"] == plain.protocol["prompt_tokens"] == 9


def test_a_window_and_its_token_must_fit_the_context(gemma: Path, corpus: Path) -> None:
    """The model's context is 128 tokens."""
    text = TextFiles(path=str(corpus), seq_len=128)
    measure = Measure(latency=False, memory=False)
    with pytest.raises(Refused, match=r"dataset.seq_len=128 with the BOS token .* context of 128"):
        Evaluator(HubModel(name=str(gemma)), text, measure, CPU, 0, QUIET)
    Evaluator(HubModel(name=str(gemma)), TextFiles(path=str(corpus), seq_len=127), measure, CPU, 0, QUIET)
    evaluator = bench_of(gemma, corpus)
    evaluator._calibration = Calibration(n_samples=1, seq_len=128)
    with pytest.raises(Refused, match=r"dataset.calibration.seq_len=128 with the BOS"):
        evaluator.calibrator(0, QUIET)


class Tokenizer:
    """As far as `resolve_bos` looks at one."""

    backend_tokenizer = None

    def __init__(self, bos: int | None, adds: bool) -> None:
        self.bos_token_id, self._adds = bos, adds

    def __call__(self, texts: list[str], add_special_tokens: bool, verbose: bool) -> dict[str, list[list[int]]]:
        return {"input_ids": [[*([self.bos_token_id] if self._adds else []), 5] for _ in texts]}


@pytest.mark.parametrize(
    ("add_bos", "needed", "bos", "adds", "expected", "note"),
    [
        ("auto", True, 2, True, 2, None),
        ("auto", True, 2, False, 2, None),
        ("auto", True, None, False, None, "the tokenizer has none"),
        ("auto", False, 2, True, None, None),
        ("auto", None, 2, True, None, "is not known here"),
        ("auto", None, 2, False, None, None),
        ("auto", None, None, False, None, None),
        ("true", False, 2, False, 2, None),
        ("true", None, 2, True, 2, None),
        ("false", True, 2, True, None, "taken without it"),
        ("false", False, 2, True, None, None),
        ("false", None, 2, True, None, None),
    ],
)
def test_what_auto_means(
    add_bos: str, needed: bool | None, bos: int | None, adds: bool, expected: int | None, note: str | None
) -> None:
    found = resolve_bos(add_bos, "a family", needed, Tokenizer(bos, adds))
    assert found.id == expected
    assert all(note is not None and note in said for said in found.warnings)
    assert bool(found.warnings) == (note is not None)


def test_a_token_that_is_not_there_is_refused() -> None:
    with pytest.raises(Refused, match=r"dataset.add_bos=true: the tokenizer .* has no BOS token"):
        resolve_bos("true", "llama", False, Tokenizer(None, False))


def test_the_run_says_it(gemma: Path, corpus: Path, small: list[str], cli: Cli, tmp_path: Path) -> None:
    """Stamped; auto and true are the same run; false is another, with a note."""
    words = [*small, f"model.name={gemma}", "measure=quality_only", "measure.max_windows=4", "tracking=none"]
    stamps, again, notes = [], [], []
    for number, add_bos in enumerate(("auto", "true", "false")):
        done = cli(*words, f"dataset.add_bos={add_bos}", f"hydra.run.dir=run{number}")
        assert done.returncode == 0, done.stderr
        summary = json.loads((tmp_path / f"run{number}" / "summary.json").read_text())
        stamps.append(summary["protocol"]["bos"])
        again.append(summary["reused_from"] is not None)
        notes.append("dataset.add_bos=false: models of the family gemma3_text need a BOS" in done.stdout)
    assert (stamps, again, notes) == ([0, 0, "none"], [False, True, False], [False, False, True])
    done = cli(*small, "dataset.add_bos=true", "tracking=none")
    assert (done.returncode, "dataset.add_bos=true: the tokenizer" in done.stderr) == (2, True)
    assert cli(*small, "dataset.add_bos=perhaps").returncode == 2


def test_runs_with_and_without_are_not_alike() -> None:
    runs = [(name, "1", Summary("FINISHED", protocol={"bos": bos})) for name, bos in (("a", 2), ("b", "none"))]
    assert warnings(runs) == ["bos is 2 in a, none in b"]


def test_tasks_begin_with_it(gemma: Path, tmp_path: Path) -> None:
    """Also where the tokenizer would not put it there by itself; nothing else of a text changes."""
    loaded = HubModel(name=str(gemma)).load(CPU, 0)
    plain = loaded.tokenizer("the cat").input_ids
    assert plain[0] != 0
    write(tmp_path / "tasks", "arc_easy", arc_rows(3))
    tasks, first = prepare_tasks(settings(tmp_path / "tasks")), set[int]()
    loaded.model.register_forward_pre_hook(lambda module, args: first.update(args[0][:, 0].tolist()))
    measure_tasks(loaded.model, loaded.tokenizer, tasks, 1, QUIET, Bos(0))
    assert first == {0}
    first.clear()
    measure_tasks(loaded.model, loaded.tokenizer, tasks, 1, QUIET)
    assert first
    assert 0 not in first
    for _ in range(2):
        begin_with_bos(loaded.tokenizer)
        assert loaded.tokenizer("the cat").input_ids == [0, *plain]
