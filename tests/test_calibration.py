"""What calibration sees is what a stock forward pass puts through each Linear, on windows that a run can name."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ALL_FAMILIES, CPU, Cli, make_folder, observed, story
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from prune_lab import __main__ as program
from prune_lab.evaluator import Evaluator
from prune_lab.fingerprint import fingerprint
from prune_lab.measure.settings import Measure
from prune_lab.models.anatomy import Anatomy
from prune_lab.models.blocks import bypassed
from prune_lab.models.load import HubModel
from prune_lab.pruning.block_importance import block_influence, influence
from prune_lab.pruning.calibration import Calibrator, block_statistics
from prune_lab.pruning.statistics import LinearStatistics, RunningStatistics
from prune_lab.system.console import Console
from prune_lab.text.source import Calibration
from prune_lab.text.splits import split_of
from prune_lab.text.text_files import TextFiles

NEEDS = frozenset({"input_norm", "variance", "gram"})
WINDOWS = torch.randint(1, 300, (5, 24), generator=torch.Generator().manual_seed(4))  # 0 is padding
FIELDS = ("input_norm", "mean", "variance", "gram")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One small model of each family, in float32; to be copied, never changed."""
    place = tmp_path_factory.mktemp("calibration")
    return {
        family: HubModel(name=str(make_folder(place / family, family))).load(CPU, seed=0).model
        for family in ALL_FAMILIES
    }


@torch.no_grad()
def plain_sums(model: Any) -> dict[str, dict[str, Tensor]]:
    """The statistics of every Linear's input in the blocks: one forward pass of the whole model, sums in float64."""
    rows: dict[str, Tensor] = {}
    hooks = []
    for name, module in model.named_modules():
        if name.startswith(Anatomy(model).family.blocks) and isinstance(module, torch.nn.Linear | Conv1D):
            hook = lambda _, args, name=name: rows.update({name: args[0].reshape(-1, args[0].shape[-1]).double()})  # noqa: E731
            hooks.append(module.register_forward_pre_hook(hook))
    model(input_ids=WINDOWS, use_cache=False)
    for hook in hooks:
        hook.remove()
    return {
        name: {
            "input_norm": (x * x).sum(0).sqrt(),
            "mean": x.mean(0),
            "variance": x.var(0, correction=1),
            "gram": x.T @ x,
        }
        for name, x in rows.items()
    }


def check_seen(seen: dict[str, LinearStatistics], expected: dict[str, dict[str, Tensor]], rtol: float = 1e-4) -> None:
    """Same Linears, same statistics, each to a fraction of its own largest entry."""
    assert seen.keys() == expected.keys()
    for name, fields in expected.items():
        for field in FIELDS:
            found = getattr(seen[name], field)
            assert found.dtype == torch.float32
            scale = float(fields[field].abs().max())
            torch.testing.assert_close(found.double(), fields[field], rtol=0, atol=rtol * scale, msg=f"{name} {field}")


def walked(model: Any, calibrator: Calibrator, needs: frozenset[str] = NEEDS) -> dict[str, LinearStatistics]:
    """Statistics of all Linears, by name."""
    blocks = observed(calibrator, Anatomy(model), needs)
    return {name: statistics for of_block in blocks for name, statistics in of_block.items()}


def hooks_of(model: Any) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_statistics_are_those_of_one_stock_forward_pass(models: dict[str, Any], family: str) -> None:
    """Masks of two kinds, positions, scaled embeddings: a block by itself is given what the model gives it."""
    model = models[family]
    check_seen(walked(model, Calibrator(WINDOWS, "dense")), plain_sums(model))
    assert hooks_of(model) == 0


@pytest.mark.parametrize(("family", "batch_size"), [("llama", 1), ("llama", 2), ("gemma2", 3), ("opt", 3)])
def test_statistics_do_not_depend_on_the_batch_size(models: dict[str, Any], family: str, batch_size: int) -> None:
    """5 windows: with 2 or 3 at once the last batch is smaller."""
    once, again = (walked(models[family], Calibrator(WINDOWS, "dense", size)) for size in (16, batch_size))
    check_seen(again, {name: {f: getattr(seen, f).double() for f in FIELDS} for name, seen in once.items()}, rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "propagate"), [*((family, "pruned") for family in ALL_FAMILIES), ("llama", "dense"), ("gpt2", "dense")]
)
def test_later_blocks_are_seen_behind_what_was_asked_for(models: dict[str, Any], family: str, propagate: str) -> None:
    """The consumer changes block 0 once it has its statistics, as a method does."""
    dense, changed = plain_sums(models[family]), copy.deepcopy(models[family])
    anatomy, found = Anatomy(changed), []
    for index, of_block in enumerate(observed(Calibrator(WINDOWS, propagate, 2), anatomy, NEEDS)):
        found.append(of_block)
        if index == 0:
            halve(anatomy)
    expected = plain_sums(changed) if propagate == "pruned" else dense
    first, second = ({name for name, _ in linears} for linears in anatomy.linears_by_block())
    check_seen(found[0], {name: dense[name] for name in first})
    check_seen(found[1], {name: expected[name] for name in second})
    apart = max(float((dense[name]["gram"] - plain_sums(changed)[name]["gram"]).abs().max()) for name in second)
    assert apart > 0.1  # else the two could not be told apart
    assert hooks_of(changed) == 0


@torch.no_grad()
def halve(anatomy: Anatomy) -> None:
    """Zeroes half of every matrix of block 0."""
    for _, linear in anatomy.linears_by_block()[0]:
        linear.weight[::2] = 0


def test_dense_overrules_pruned(models: dict[str, Any]) -> None:
    """For one ranking of all blocks, and for scans."""
    changed = copy.deepcopy(models["llama"])
    anatomy, found = Anatomy(changed), {}
    for of_block in observed(Calibrator(WINDOWS, "pruned"), anatomy, NEEDS, behind_dense=True):
        found.update(of_block)
        halve(anatomy)
    check_seen(found, plain_sums(models["llama"]))


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_each_distinct_input_is_observed_once(models: dict[str, Any], family: str) -> None:
    """Four of a block: attention's, its output projection's, the MLP's, its output's. Shared ones are one object."""
    for of_block in observed(Calibrator(WINDOWS), Anatomy(models[family]), NEEDS):
        for field in ("gram", "mean"):
            assert len({id(getattr(seen, field)) for seen in of_block.values()}) == 4


def test_the_projections_of_a_llama_that_share_an_input(models: dict[str, Any]) -> None:
    of_block = next(iter(observed(Calibrator(WINDOWS), Anatomy(models["llama"]), NEEDS)))
    assert len(of_block) == 7
    grams = {name.rpartition(".")[2]: seen.gram for name, seen in of_block.items()}
    assert grams["q_proj"] is grams["k_proj"] is grams["v_proj"]
    assert grams["gate_proj"] is grams["up_proj"]
    assert len({id(grams[name]) for name in ("q_proj", "o_proj", "gate_proj", "down_proj")}) == 4


@pytest.mark.parametrize("need", sorted(NEEDS))
def test_only_what_is_needed_is_gathered(models: dict[str, Any], need: str) -> None:
    held = {"variance": {"mean", "variance"}}.get(need, {need})
    for of_block in observed(Calibrator(WINDOWS), Anatomy(models["llama"]), frozenset({need})):
        for seen in of_block.values():
            assert {field for field in FIELDS if getattr(seen, field) is not None} == held


@pytest.mark.parametrize(("propagate", "expected"), [("pruned", [1, 0]), ("dense", [1, 0])])
def test_what_nothing_looks_at_is_not_computed(models: dict[str, Any], propagate: str, expected: list[int]) -> None:
    """The last product of a block: once for its outputs, never only to observe inputs, and never in the last block."""
    model, times = copy.deepcopy(models["llama"]), [0, 0]
    for index, block in enumerate(model.model.layers):

        def count(*_: Any, index: int = index) -> None:
            times[index] += 1

        block.mlp.down_proj.register_forward_hook(count)
    walked(model, Calibrator(WINDOWS, propagate))
    assert times == expected


def test_bfloat16_is_of_the_products_alone(models: dict[str, Any]) -> None:
    """What a stock autocast pass puts through each Linear, to bfloat16's precision; the sums themselves are float32."""
    with torch.autocast("cpu", torch.bfloat16):
        expected = plain_sums(models["llama"])
    found = walked(models["llama"], Calibrator(WINDOWS, "dense", bfloat16=True))
    check_seen(found, expected, rtol=1e-3)  # a sum of 120 rows that was itself in bfloat16 would be 4e-3 off
    exact = walked(models["llama"], Calibrator(WINDOWS, "dense"))
    assert not torch.equal(found["model.layers.1.mlp.down_proj"].gram, exact["model.layers.1.mlp.down_proj"].gram)


def test_hooks_are_gone_when_a_walk_is_given_up(models: dict[str, Any]) -> None:
    """In the middle, or because something failed."""
    model = copy.deepcopy(models["llama"])
    walk = observed(Calibrator(WINDOWS), Anatomy(model), NEEDS)
    next(iter(walk))
    assert hooks_of(model) == 0
    walk.close()
    with pytest.raises(RuntimeError), bypassed(Anatomy(model), [0]):
        raise RuntimeError
    broken = copy.deepcopy(model)
    broken.model.layers[1].mlp.up_proj.weight.data = torch.zeros(32, 7)
    with pytest.raises(RuntimeError):
        list(observed(Calibrator(WINDOWS, "dense"), Anatomy(broken), NEEDS))
    assert hooks_of(model) == hooks_of(broken) == 0


@torch.no_grad()
def naive_losses(model: Any, windows: Tensor) -> list[float]:
    """The model's own loss of each window by itself."""
    return [float(model(input_ids=window[None], labels=window[None], use_cache=False).loss) for window in windows]


@pytest.mark.parametrize(("batch_size", "count"), [(1, None), (2, None), (2, 3), (16, 3)])
def test_the_loss_is_the_mean_over_windows(models: dict[str, Any], batch_size: int, count: int | None) -> None:
    for family in ("llama", "gemma2", "gpt2"):
        losses = naive_losses(models[family], WINDOWS)[:count]
        found = Calibrator(WINDOWS, batch_size=batch_size).loss(models[family], count)
        assert found == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_block_influence_of_two_tokens_by_hand() -> None:
    """(1, 0), (0, 1) -> (1, 1), (0, 2): cosines 1/sqrt 2 and 1, whatever batches they come in."""
    before, after = torch.eye(2), torch.tensor([[1.0, 1.0], [0.0, 2.0]])
    assert influence([(before, after)]) == pytest.approx(0.146447, abs=1e-6)
    assert influence(zip(before.split(1), after.split(1), strict=True)) == pytest.approx(0.146447, abs=1e-6)
    three = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    pairs = [(before, after), three, (before[:1], before[:1])]  # a smaller last batch weighs by its tokens
    assert influence(pairs) == pytest.approx(1 - (2**-0.5 + 1 + 0 - 1 + 1) / 5, abs=1e-6)


@torch.no_grad()
def naive_influence(model: Any) -> list[float]:
    """From the stock model's hidden states; what leaves the last block is caught there, before the final norm."""
    model, last = copy.deepcopy(model), list[Tensor]()  # a copy: asking for hidden states leaves stock hooks behind
    hook = (
        Anatomy(model)
        .blocks[-1]
        .register_forward_hook(lambda _, args, out: last.append(out[0] if isinstance(out, tuple) else out))
    )
    states = model(input_ids=WINDOWS, use_cache=False, output_hidden_states=True).hidden_states
    hook.remove()
    found = []
    for before, after in zip(states[:-1], (*states[1:-1], last[0]), strict=True):
        cosines = [
            float(a.double() @ b.double() / (a.double().norm() * b.double().norm()))
            for a, b in zip(before.flatten(0, 1), after.flatten(0, 1), strict=True)
        ]
        found.append(1 - sum(cosines) / len(cosines))
    return found


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_block_influence_is_that_of_the_stock_hidden_states(models: dict[str, Any], family: str) -> None:
    found = block_influence(Calibrator(WINDOWS, batch_size=2), Anatomy(models[family]))
    assert found == pytest.approx(naive_influence(models[family]), abs=1e-5)
    assert hooks_of(models[family]) == 0


# Windows.


def evaluator(folder: Path, corpus: Path, **calibration: Any) -> Evaluator:
    text = TextFiles(path=str(corpus), seq_len=32, calibration=Calibration(**calibration))
    measure = Measure(max_windows=4, latency=False, memory=False, prompt_tokens=16, decode_tokens=2)
    return Evaluator(HubModel(name=str(folder)), text, measure, CPU, 0, Console(quiet=True))


def places_by_hand(made: Evaluator, corpus: Path, stamp: dict[str, Any]) -> Tensor:
    """The windows that the stamp names, cut out of the documents of the calibration split."""
    files = sorted(corpus.glob("*.txt"))
    texts = [text for text in (file.read_text() for file in files) if split_of(text) == "calibration"]
    rows = [made.dense.tokenizer(text)["input_ids"] for text in texts]
    return torch.tensor([rows[document][first : first + stamp["seq_len"]] for document, first in stamp["windows"]])


def test_windows_lie_where_their_stamp_says(folder: Path, corpus: Path) -> None:
    made = evaluator(folder, corpus, n_samples=12, seq_len=20, propagate="dense")
    calibrator, stamp = made.calibrator(7, Console(quiet=True))
    assert torch.equal(calibrator.windows, places_by_hand(made, corpus, stamp))
    assert calibrator.windows.shape == (12, 20)
    assert calibrator.propagate == stamp["propagate"] == "dense"
    assert (stamp["n_samples"], stamp["seq_len"], stamp["seed"], stamp["own"]) == (12, 20, 7, True)
    assert stamp["source"] == f"dataset.path={corpus}"
    assert stamp["tokens_sha256"] == hashlib.sha256(calibrator.windows.numpy().astype("<i8").tobytes()).hexdigest()
    assert len({tuple(place) for place in stamp["windows"]}) == 12


def test_a_seed_names_its_windows(folder: Path, corpus: Path) -> None:
    """The same in another process's evaluator, others for another seed."""
    first, second = (evaluator(folder, corpus, n_samples=12, seq_len=20) for _ in range(2))
    quiet = Console(quiet=True)
    of_0, of_1 = first.calibrator(0, quiet), first.calibrator(1, quiet)
    assert torch.equal(of_0[0].windows, second.calibrator(0, quiet)[0].windows)
    assert of_0[1] == second.calibrator(0, quiet)[1]
    assert of_0[1]["tokens_sha256"] != of_1[1]["tokens_sha256"]
    assert of_0[1]["windows"] != of_1[1]["windows"]


# Through the command line.

CALIBRATED = ["method=wanda", "tracking=none", "measure=quality_only", "hydra.run.dir=run", "quiet=true"]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Any]]:
    """Runs a command line in this process; gives its exit code, what it said, and its summary if there is one."""
    signals = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}

    def run(*arguments: str) -> tuple[int, str, dict[str, Any]]:
        monkeypatch.setattr(sys, "argv", ["prune_lab", *arguments])
        capsys.readouterr()
        code = program._run(list(arguments))
        summary = Path("run") / "summary.json"
        return code, capsys.readouterr().err, json.loads(summary.read_text()) if summary.exists() else {}

    yield run
    for number, handler in signals.items():
        signal.signal(number, handler)


def test_a_run_stamps_what_it_was_calibrated_on(small: list[str], corpus: Path, tmp_path: Path, cli: Cli) -> None:
    keys = ["dataset.calibration.n_samples=6", "dataset.calibration.seq_len=16", "dataset.calibration.propagate=dense"]
    done = cli(*small, *CALIBRATED, *keys, "seed=3")
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    stamp = summary["protocol"]["calibration"]
    assert stamp["tokens_sha256"]
    assert len(stamp.pop("tokens_sha256")) == 64
    windows = stamp.pop("windows")
    assert len(windows) == 6
    assert all(len(place) == 2 and min(place) >= 0 for place in windows)
    covered = Counter((document, first + n) for document, first in windows for n in range(16))
    assert stamp == {
        "source": f"dataset.path={corpus}", "own": True, "n_samples": 6, "seq_len": 16, "propagate": "dense", "seed": 3,
        "pass": "blocks one by one",
        "bfloat16": False, "sampling": "at random", "text": None, "windows_tested_on": 0, "solved_width": None,
            "mix": None,
        "documents": len({document for document, _ in windows}), "documents_too_short": 0,
        "distinct_tokens": len(covered), "overlap": max(covered.values()),
    }  # fmt: skip
    assert any("flatters" in warning for warning in summary["warnings"])


def test_a_run_that_looks_at_no_text_stamps_none(small: list[str], run: Callable[..., Any]) -> None:
    """Though the keys are there, and n_samples is more than the text could give."""
    keys = ["method=magnitude", "dataset.calibration.n_samples=1000000"]
    code, stderr, summary = run(*small, *CALIBRATED, *keys)
    assert code == 0, stderr
    assert summary["protocol"]["calibration"] is None
    assert not any("calibrated" in warning for warning in summary["warnings"])


def test_calibration_text_may_be_another_text(small: list[str], tmp_path: Path, run: Callable[..., Any]) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for seed in range(500, 560):
        (other / f"{seed}.txt").write_text(story(seed))
    keys = ["dataset.calibration.source=text", f"dataset.calibration.name={other}", "dataset.calibration.n_samples=5"]
    code, stderr, summary = run(*small, *CALIBRATED, *keys)
    assert code == 0, stderr
    stamp = summary["protocol"]["calibration"]
    assert (stamp["own"], stamp["n_samples"], stamp["seq_len"], len(stamp["windows"])) == (False, 5, 32, 5)
    assert str(other) in stamp["source"]
    assert summary["protocol"]["dataset"] != stamp["source"]
    assert not any("flatters" in warning for warning in summary["warnings"])


REFUSALS = [
    ("source=nope", ("dataset.calibration.source='nope'", "own", "wikitext2", "c4")),
    ("source=own dataset.calibration.name=here", ("dataset.calibration.name='here'", "own")),
    ("source=text", ("dataset.calibration.name", "path")),
    ("source=text dataset.calibration.name=nowhere", ("dataset.calibration.name='nowhere'", "no file")),
    ("propagate=none", ("dataset.calibration.propagate='none'", "pruned", "dense")),
    ("n_samples=0", ("dataset.calibration.n_samples=0", "at least 1")),
    ("seq_len=1", ("dataset.calibration.seq_len=1", "at least 2")),
    ("batch_size=0", ("dataset.calibration.batch_size=0", "at least 1")),
    ("seq_len=129", ("dataset.calibration.seq_len=129", "128")),
    ("n_samples=1000000", ("dataset.calibration", "1000000", "n_samples", "seq_len")),
]


@pytest.mark.parametrize(("key", "parts"), REFUSALS)
def test_calibration_that_cannot_be_is_refused(
    key: str, parts: tuple[str, ...], small: list[str], run: Callable[..., Any]
) -> None:
    code, stderr, _ = run(*small, *CALIBRATED, *f"dataset.calibration.{key}".split())
    assert code == 2, stderr
    assert len(stderr.splitlines()) == 1, stderr
    for part in parts:
        assert part in stderr


# What makes two calibrated runs the same.


def print_of(made: Evaluator, **calibration: Any) -> str:
    """The fingerprint of a run that calibrates as this evaluator does."""
    _, stamp = made.calibrator(0, Console(quiet=True))
    config = {
        "seed": 0,
        "model": {"name": "somewhere", "revision": None},
        "dataset": {"path": "somewhere", "test_path": None, "calibration": calibration},
    }
    return fingerprint(config, made.protocol | {"calibration": stamp}, made.hashes)


def test_a_fingerprint_is_of_the_calibration_text_not_of_its_place(folder: Path, corpus: Path, tmp_path: Path) -> None:
    """Moved text is the same text; changed text, another propagation or number of windows is another run."""
    first, moved, changed = (tmp_path / name for name in ("first", "moved", "changed"))
    for place, shift in ((first, 0), (changed, 1000)):
        place.mkdir()
        for seed in range(500, 560):
            (place / f"{seed}.txt").write_text(story(seed + shift))
    shutil.copytree(first, moved)
    keys: dict[str, Any] = {"source": "text", "n_samples": 5, "seq_len": 16, "propagate": "pruned"}

    def of(**changes: Any) -> str:
        calibration = keys | {"name": str(first)} | changes
        return print_of(evaluator(folder, corpus, **calibration), **calibration)

    there = of()
    assert of(name=str(moved)) == there
    assert of(name=str(changed)) != there
    assert of(propagate="dense") != there
    assert of(n_samples=6) != there
    assert of(seq_len=17) != there


# Statistics by Linear, of inputs and of outputs.


def test_only_the_linears_that_are_named_are_observed(models: dict[str, Any]) -> None:
    """Each with its own fields: Linears that are given one tensor share no more than both asked for."""
    expected = plain_sums(models["llama"])
    first, second = (f"model.layers.{index}." for index in range(2))
    needs = {
        first + "mlp.gate_proj": frozenset({"gram"}), first + "mlp.up_proj": frozenset({"gram", "input_norm"}),
        second + "mlp.down_proj": frozenset({"variance"}),
    }  # fmt: skip
    found: dict[str, LinearStatistics] = {}
    for of_block in block_statistics(Anatomy(models["llama"]), needs, 0, Calibrator(WINDOWS, batch_size=2)):
        found |= of_block
    assert found.keys() == expected.keys()
    fields = {name: {field for field in FIELDS if getattr(of, field) is not None} for name, of in found.items()}
    assert {name: held for name, held in fields.items() if held} == {
        first + "mlp.gate_proj": {"gram"}, first + "mlp.up_proj": {"gram", "input_norm"},
        second + "mlp.down_proj": {"mean", "variance"},
    }  # fmt: skip
    for name, held in fields.items():
        for field in held:
            torch.testing.assert_close(
                getattr(found[name], field).double(), expected[name][field], rtol=1e-3, atol=1e-4
            )
    assert found[first + "mlp.gate_proj"].gram is found[first + "mlp.up_proj"].gram


@pytest.mark.parametrize("propagate", ["pruned", "dense"])
def test_outputs_are_observed_as_inputs_are(models: dict[str, Any], propagate: str) -> None:
    """What a stock forward pass gets out of each Linear, of the last block too, whose outputs nothing else needs."""
    model, rows = models["llama"], dict[str, Tensor]()
    hooks = [
        module.register_forward_hook(lambda _, args, out, name=name: rows.update({name: out.flatten(0, -2).double()}))
        for name, module in Anatomy(model).linears()
    ]
    with torch.no_grad():
        model(input_ids=WINDOWS, use_cache=False)
    for hook in hooks:
        hook.remove()
    needs = frozenset({"output_norm"})
    found = walked(model, Calibrator(WINDOWS, propagate, batch_size=2), needs=needs)
    for name, out in rows.items():
        torch.testing.assert_close(found[name].output_norm.double(), out.norm(dim=0), rtol=1e-4, atol=1e-5)
        assert found[name].input_norm is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gram_matrix_is_exact_to_float32_and_no_setting_stays(dtype: torch.dtype) -> None:
    """Of inputs of six orders of magnitude; products of bfloat16 factors lose nothing."""
    spread = torch.randn(300, 70, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 70)
    rows, running = spread.to(dtype), RunningStatistics()
    settings = getattr(torch.backends.mkldnn, "matmul", None)
    was = getattr(settings, "fp32_precision", None)
    for part in rows.split(90):
        running.add(part, frozenset({"gram"}))
    found, wanted = running.result()["gram"].double(), rows.double().T @ rows.double()
    norms = wanted.diagonal().sqrt()
    assert float(((found - wanted).abs() / norms.outer(norms)).max()) < 2e-6
    assert getattr(settings, "fp32_precision", None) == was
