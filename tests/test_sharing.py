"""What a sweep shares, in a process and through the cache folder, is the same to the last bit as computed anew."""

from __future__ import annotations

import copy
import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CPU, ROOT, observed
from model_types import tiny_folder
from test_package import MODULES, imports
from torch import Tensor

from prune_lab import __main__ as program
from prune_lab import cache as store
from prune_lab import dense_cache, evaluator, fingerprint
from prune_lab.commands import cache as cache_command
from prune_lab.dense_cache import DenseCache
from prune_lab.errors import Refused
from prune_lab.measure import dense_states
from prune_lab.measure.settings import Measure
from prune_lab.methods.depth import Depth
from prune_lab.methods.magnitude import Magnitude
from prune_lab.methods.sensitivity import Sensitivity
from prune_lab.methods.structured import Structured
from prune_lab.methods.unstructured import Unstructured
from prune_lab.methods.wanda import Wanda
from prune_lab.models.anatomy import Anatomy
from prune_lab.models.load import HubModel, Loaded
from prune_lab.pruning import calibration
from prune_lab.pruning.calibration import Calibrator
from prune_lab.pruning.statistics import OF_INPUTS, LinearStatistics
from prune_lab.sweeps import sweep
from prune_lab.system.console import Console
from prune_lab.text.text_files import TextFiles

WINDOWS = torch.randint(300, (6, 16), generator=torch.Generator().manual_seed(0))
HASHES = {"weights": "w", "config": "c", "tokenizer": "t"}
ALL = OF_INPUTS

Blocks = list[dict[str, LinearStatistics]]


def facts_of(loaded: Loaded, **changes: str) -> DenseCache:
    """Facts of a model as another process would have them: with nothing in memory."""
    return DenseCache(loaded.model, HASHES | changes, CPU)


def walked(loaded: Loaded, facts: DenseCache | None, needs: frozenset[str] = ALL) -> Blocks:
    return list(observed(Calibrator(WINDOWS, "dense", 4), Anatomy(loaded.model, facts), needs))


def assert_equal(first: Blocks, second: Blocks) -> None:
    assert [of_block.keys() for of_block in first] == [of_block.keys() for of_block in second]
    for a, b in zip(first, second, strict=True):
        for name in a:
            for field in (f.name for f in fields(LinearStatistics) if f.name not in ("random", "score_counts")):
                one, other = getattr(a[name], field), getattr(b[name], field)
                assert type(one) is type(other), (name, field)
                assert torch.equal(one, other) if isinstance(one, Tensor) else one == other, (name, field)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each passing of the calibration text through the blocks."""
    count: list[int] = []
    real = calibration.BlockStream

    def stream(*arguments: Any) -> Any:
        count.append(1)
        return real(*arguments)

    monkeypatch.setattr(calibration, "BlockStream", stream)
    return count


# Statistics.


@pytest.mark.parametrize(("gigabytes", "memory"), [("1", 2**30), ("1", 0), ("0", 2**30), ("0", 0)])
def test_statistics_are_those_of_a_cold_pass(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch, passes: list[int], gigabytes: str, memory: int
) -> None:
    """Held in memory, read from disk each time, in memory alone, and neither: then each asking is a pass."""
    cold = walked(loaded, None)
    monkeypatch.setenv("PRUNE_LAB_CACHE_GB", gigabytes)
    monkeypatch.setattr(dense_cache, "MEMORY", memory)
    facts = facts_of(loaded)
    passes.clear()
    assert_equal(walked(loaded, facts), cold)
    first = len(passes)
    assert_equal(walked(loaded, facts), cold)
    assert_equal(walked(loaded, facts, frozenset({"gram"})), [
        {name: LinearStatistics(gram=of.gram, tokens=of.tokens) for name, of in of_block.items()} for of_block in cold
    ])  # fmt: skip
    assert (len(passes) == first) == (gigabytes == "1" or memory > 0)
    passes.clear()
    assert_equal(walked(loaded, facts_of(loaded)), cold)
    assert (len(passes) == 0) == (gigabytes == "1")


@pytest.mark.parametrize("model_type", ["olmo2", "mixtral", "gpt_oss", "bamba"])
def test_statistics_of_found_layouts_are_observed_once_too(model_type: str, tmp_path: Path) -> None:
    """Block by block or in one pass; with the tokens of each expert, and gates, of which other methods do not ask."""
    found = HubModel(name=str(tiny_folder(tmp_path / "m", model_type))).load(CPU, seed=0)
    passed, gates = list[int](), frozenset({"gated_norm"} if model_type == "mixtral" else ())
    found.model.get_input_embeddings().register_forward_hook(lambda *_: passed.append(1))
    cold, facts = walked(found, None, ALL | gates), facts_of(found)
    assert any(of.rows is not None for of_block in cold for of in of_block.values())
    assert_equal(walked(found, facts, ALL | gates), cold)
    passed.clear()
    for process in (facts, facts_of(found)):
        assert_equal(walked(found, process, ALL | gates), cold)
        assert_equal(walked(found, process, frozenset({"input_norm"})), [
            {name: LinearStatistics(input_norm=of.input_norm, rows=of.rows) for name, of in of_block.items()}
            for of_block in cold
        ])  # fmt: skip
    assert not passed


def test_a_need_that_is_known_is_not_observed_again(loaded: Loaded, passes: list[int]) -> None:
    facts = facts_of(loaded)
    walked(loaded, facts, frozenset({"input_norm"}))
    walked(loaded, facts, frozenset({"input_norm", "variance"}))
    assert len(passes) == 2
    walked(loaded, facts_of(loaded), frozenset({"variance"}))
    assert len(passes) == 2
    walked(loaded, facts_of(loaded, weights="other"), frozenset({"input_norm", "variance"}))
    assert len(passes) == 3  # both from one


KEY = {
    "weights": "other", "config": "other", "tokenizer": "other", "tokens": 1, "n_samples": 5, "seq_len": 15,
    "batch_size": 3, "prefix": 1, "dtype": torch.bfloat16, "code": "errors.py", "threads": 77, "torch": "0.0",
    "transformers": "0.0", "tokenizers": "0.0",
}  # fmt: skip


@pytest.mark.parametrize("field", ["nothing", *KEY])
def test_each_field_of_the_key_misses(
    loaded: Loaded, passes: list[int], monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    """Data and seed are in the tokens: they decide which these are. Propagation is in the test below."""
    needs = frozenset({"input_norm"})
    list(observed(Calibrator(WINDOWS, "dense", 4), Anatomy(loaded.model, facts_of(loaded)), needs))
    value = KEY.get(field)
    windows, size = WINDOWS.clone(), 3 if field == "batch_size" else 4
    if field == "tokens":
        windows[0, 0] = (windows[0, 0] + 1) % 300
    windows = windows[: value if field == "n_samples" else None, : value if field == "seq_len" else None]
    if field == "code":
        monkeypatch.setattr(dense_cache, "SOURCE", (*dense_cache.SOURCE, value))
    real = dense_cache.describe_environment
    if field in ("threads", *fingerprint.LIBRARIES):
        monkeypatch.setattr(dense_cache, "describe_environment", lambda device: real(device) | {field: value})
    facts = facts_of(loaded, **({field: value} if field in HASHES else {}))
    if field == "dtype":
        facts = DenseCache(loaded.model, HASHES, replace(CPU, dtype=value))
    calibrator = Calibrator(windows, "dense", size, prefix=int(field == "prefix"))
    list(observed(calibrator, Anatomy(loaded.model, facts), needs))
    assert len(passes) == (1 if field == "nothing" else 2)


def test_behind_pruned_blocks_nothing_is_served(loaded: Loaded, passes: list[int]) -> None:
    facts, needs = facts_of(loaded), frozenset({"input_norm"})
    for propagate, count in (("dense", 1), ("pruned", 2), ("pruned", 3), ("dense", 3)):
        list(observed(Calibrator(WINDOWS, propagate, 4), Anatomy(loaded.model, facts), needs))
        assert len(passes) == count


@pytest.mark.parametrize(
    ("edited", "is_another"),
    [
        ("models/contents.py", True), ("pruning/thresholds.py", True), ("measure/task_names.py", True),
        ("text/tokens.py", True), ("evaluator.py", True), ("report/page.py", False), ("tracking/params.py", False),
    ],
)  # fmt: skip
def test_edited_source_is_another_key(
    loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, edited: str, is_another: bool
) -> None:
    """In a copy of the package: of all that could compute the fact, and of nothing else."""
    package = shutil.copytree(ROOT / "prune_lab", tmp_path / "package", ignore=shutil.ignore_patterns("tiny*", "*.pyc"))
    monkeypatch.setattr(fingerprint, "PACKAGE", package)
    facts, keys = facts_of(loaded), set()
    for addition in ("", "\n# edited\n"):
        with (package / edited).open("a") as file:
            file.write(addition)
        fingerprint.source_sha256.cache_clear()
        keys.add(facts.key("baseline", {}))
    fingerprint.source_sha256.cache_clear()
    assert len(keys) == 1 + is_another


# What the modules of a key's source import and cannot change a figure by: where things are kept, said, locked, awaited.
HARMLESS = {
    "cache", "checks", "errors", "export.loads_in", "fingerprint", "results.metrics", "results.run_warnings",
    "results.samples", "results.summary",
    "system.console", "system.environment", "system.files", "system.hub", "system.launch", "system.lock",
    "system.resident", "system.run_clock", "system.timing_lock",
}  # fmt: skip


def test_the_source_of_a_key_holds_all_that_it_imports() -> None:
    package = ROOT / "prune_lab"
    modules = {path.relative_to(package): ".".join(path.relative_to(package).with_suffix("").parts) for path in MODULES}
    inside = {name for path, name in modules.items() if any(path.is_relative_to(part) for part in dense_cache.SOURCE)}
    known: set[str] = set()
    for path, name in modules.items():
        if name in inside | HARMLESS:
            known |= {found.removeprefix("prune_lab.") for found in imports(package / path)}
    assert known & set(modules.values()) - inside == HARMLESS


def test_an_edited_method_is_another_scan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    found = set()
    for number in range(2):
        (tmp_path / "statistic_of_a_test.py").write_text(f"# {number}\n")
        dense_cache.source_of.cache_clear()
        found.add(dense_cache.source_of(("statistic_of_a_test",)))
    assert len(found) == 2


def test_a_changed_model_has_no_facts(loaded: Loaded) -> None:
    facts, changed = facts_of(loaded), copy.deepcopy(loaded.model)
    assert Anatomy(changed, facts).dense_cache is facts
    assert Anatomy(changed.train(), facts).dense_cache is None
    changed.eval()
    with torch.no_grad():
        Anatomy(changed).linears_by_block()[1][0][1].weight[0, 0] += 1e-3
    assert Anatomy(changed, facts).dense_cache is None


# Gradients, scans, block influence, counts: of the dense model, whatever is propagated.


@pytest.mark.parametrize(
    "method",
    [
        Unstructured(score="taylor"), Unstructured(score="taylor2"), Wanda(allocation="owl"),
        Wanda(allocation="sensitivity"), Depth(), Depth(by="perplexity"), Magnitude(scope="global"),
        Structured(score="obs", refit="inputs", physical=False),
    ],
    ids=lambda method: f"{type(method).__name__} {getattr(method, 'score', '')}",
)  # fmt: skip
def test_pruned_with_known_facts_as_without(loaded: Loaded, method: Any) -> None:
    def prune(amount: float, facts: DenseCache | None) -> dict[str, Tensor]:
        model = copy.deepcopy(loaded.model)
        method.prune(Anatomy(model, facts), amount, 0, Calibrator(WINDOWS, "pruned", 4))
        state: dict[str, Tensor] = model.state_dict()
        return state

    facts = facts_of(loaded)
    for amount, known in ((0.3, facts), (0.5, facts), (0.5, facts_of(loaded))):
        found, cold = prune(amount, known), prune(amount, None)
        assert found.keys() == cold.keys()
        assert all(torch.equal(found[name], cold[name]) for name in cold)


def test_a_scan_is_served_for_no_other(loaded: Loaded) -> None:
    """Of another kind of unit, score, seed, amount or scope: each equals the one that nothing was known for."""
    scans: list[tuple[Sensitivity, int]] = [
        (Sensitivity(parts=("mlp",)), 0), (Sensitivity(parts=("heads",)), 0), (Sensitivity(parts=("weights",)), 0),
        (Sensitivity(parts=("weights",), score="ria"), 0), (Sensitivity(parts=("mlp",), score="ria"), 0),
        (Sensitivity(parts=("weights",), amounts=(0.4, 0.6)), 0), (Sensitivity(parts=("block",)), 0),
        *((Sensitivity(parts=(part,), score="random"), seed) for part in ("weights", "mlp") for seed in (1, 2)),
    ]  # fmt: skip
    facts, found = facts_of(loaded), []
    for method, seed in scans:
        known, cold = (
            method.prune(Anatomy(copy.deepcopy(loaded.model), of), 0.0, seed, Calibrator(WINDOWS, "dense", 4)).files
            for of in (facts, None)
        )
        assert known == cold, (method, seed)
        found.append(json.loads(cold["sensitivity.json"])["blocks"])
    assert all(one != other for one, other in itertools.combinations(found, 2))  # else one could stand for the other


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_counts_of_scores_are_kept_for_every_block(loaded: Loaded, scope: str) -> None:
    """Also for those that are scored when the blocks before them are pruned already."""
    facts, model = facts_of(loaded), copy.deepcopy(loaded.model)
    Magnitude(scope=scope).prune(Anatomy(model, facts), 0.5, 0)
    names = [name for name, _ in Anatomy(model).linears()] if scope == "layer" else ["all"]
    assert set(facts._in_process) >= {f"magnitude of {name}" for name in names}


@dataclass(frozen=True)
class Largest(Magnitude):
    """The opposite of its base, in a module and under keys that others share."""

    def importance(self, weight: Tensor, statistics: LinearStatistics) -> Tensor:
        return 1 / (1 + weight.abs())


@dataclass(frozen=True)
class Middle(Magnitude):
    def importance(self, weight: Tensor, statistics: LinearStatistics) -> Tensor:
        return (weight.abs() - 0.05).abs()


@pytest.mark.parametrize("keys", [{}, {"scope": "global"}, {"allocation": "sensitivity"}], ids=str)
def test_a_subclass_of_another_score_shares_no_facts(loaded: Loaded, keys: dict[str, str]) -> None:
    """Neither counts nor scans."""
    facts = facts_of(loaded)
    for method in (Magnitude(**keys), Largest(**keys), Middle(**keys)):
        models = [copy.deepcopy(loaded.model) for _ in range(2)]
        for model, known in zip(models, (facts, None), strict=True):
            method.prune(Anatomy(model, known), 0.5, 0, Calibrator(WINDOWS, "dense", 4))
        found, cold = (model.state_dict() for model in models)
        assert all(torch.equal(found[name], cold[name]) for name in cold)


# Whole sweeps.

Run = Callable[..., Path]


@pytest.fixture
def run(small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Runs a command line in this process as if it were a new one, untracked, and returns its folder."""
    on_sigterm, count = signal.getsignal(signal.SIGTERM), 0
    monkeypatch.setattr(sweep, "_current", None)

    def here(*overrides: str) -> Path:
        nonlocal count
        count += 1
        folder = tmp_path / f"run{count}"
        places = [f"hydra.run.dir={folder}", f"hydra.sweep.dir={folder}", "resume=false", "quiet=true"]
        calibration = ["dataset.calibration.n_samples=8", "dataset.calibration.propagate=dense"]
        arguments = [*small, "measure=quality_only", "tracking=none", *places, *calibration, *overrides]
        monkeypatch.setattr(sys, "argv", ["prune_lab", *arguments])
        evaluator._open.clear()
        assert program._run(arguments) == 0
        return folder

    yield here
    signal.signal(signal.SIGTERM, on_sigterm)


def test_a_sweep_from_the_cache_equals_cold_runs(run: Run, monkeypatch: pytest.MonkeyPatch, passes: list[int]) -> None:
    """Metrics but for times, and exported weights, of the amounts that others went before."""
    dense_measured: list[int] = []
    real = dense_states.states_at_targets

    def measure(*arguments: Any) -> Any:
        dense_measured.append(1)
        return real(*arguments)

    monkeypatch.setattr(dense_states, "states_at_targets", measure)
    methods = ("magnitude", "wanda", "sparsegpt")
    swept = run(f"method={','.join(methods)}", "amount=0.3,0.6", "export=hf", "-m")
    assert len(passes) == 2  # one for wanda, one for sparsegpt
    assert len(dense_measured) == 1
    again = run("method=wanda", "amount=0.6", "export=hf")  # another process, another day
    assert len(passes) == 2
    assert len(dense_measured) == 1

    def outcome(folder: Path) -> tuple[dict[str, float], bytes]:
        metrics = json.loads((folder / "summary.json").read_text())["metrics"]
        lasting = {name: value for name, value in metrics.items() if not name.startswith("time/")}
        return lasting, (folder / "export" / "model.safetensors").read_bytes()

    assert outcome(again) == outcome(swept / "3")
    for number, method in enumerate(methods):
        monkeypatch.setenv("PRUNE_LAB_CACHE", str(swept / f"cold {method}"))
        cold = run(f"method={method}", "amount=0.6", "export=hf")
        assert outcome(cold) == outcome(swept / str(2 * number + 1))


# Entries on disk.


def make_text(text: str) -> Callable[[Path], dict[str, Any]]:
    def make(folder: Path) -> dict[str, Any]:
        (folder / "file").write_text(text)
        return {"text": text[:20]}

    return make


def read_text(kind: str, key: str, make: Callable[[Path], dict[str, Any]]) -> str:
    with store.entry(kind, key, make) as entry:
        text = (entry.folder / "file").read_text()
        assert text.startswith(entry.metadata["text"])
        return text


WRITER = """
import os, sys, time
from pathlib import Path
from prune_lab import cache as store
def make(folder):
    with open(sys.argv[1], "a") as log:
        log.write("made\\n")
    (folder / "file").write_text("x" * 1000)
    time.sleep(float(sys.argv[2]))
    return {"by": os.getpid()}
with store.entry("gram", "one", make) as entry:
    print(entry.metadata["by"], len((entry.folder / "file").read_text()))
"""


def start_writer(log: Path, seconds: float) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    arguments = [sys.executable, "-c", WRITER, str(log), str(seconds)]
    return subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, text=True)


def test_of_two_processes_one_makes_the_entry(tmp_path: Path) -> None:
    log = tmp_path / "log"
    both = [start_writer(log, 1.0) for _ in range(2)]
    said = [process.communicate()[0] for process in both]
    assert said[0] == said[1]
    assert said[0].split()[1] == "1000"
    assert log.read_text() == "made\n"


def test_a_dense_model_that_cannot_be_stored_leaves_no_lock(folder: Path, corpus: Path, tmp_path: Path) -> None:
    """The sweep's folder is gone: the job fails, and the next one finds nothing that it would have to wait for."""
    measure = Measure(max_windows=4, latency=False, memory=False)
    text, quiet = TextFiles(path=str(corpus), seq_len=32), Console(quiet=True)
    made = evaluator.Evaluator(HubModel(name=str(folder)), text, measure, CPU, 0, quiet)
    with pytest.raises(FileNotFoundError):
        made.baseline(tmp_path / "away", quiet)
    locks = {path.name for path in (store.cache_folder() / "locks").iterdir()}
    assert not any("away" in name for name in locks)


def test_what_a_killed_process_left_goes(tmp_path: Path) -> None:
    log, kind = tmp_path / "log", tmp_path / "cache" / "gram"
    process = start_writer(log, 600)
    while not list(kind.glob(".one.*.tmp/file")):
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.communicate()
    assert read_text("gram", "one", make_text("whole")) == "whole"
    assert [path.name for path in kind.iterdir()] == ["one"]


@pytest.mark.parametrize("damage", ["a byte", "cut short", "no file", "no facts", "broken facts", "other facts"])
def test_a_damaged_entry_is_made_again_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    assert read_text("gram", "one", make_text("first")) == "first"
    entry = tmp_path / "cache" / "gram" / "one"
    if damage in ("a byte", "cut short"):
        (entry / "file").write_text("fIrst" if damage == "a byte" else "fir")
    elif damage in ("no file", "no facts"):
        (entry / ("file" if damage == "no file" else "facts.json")).unlink()
    else:
        whole = (entry / "facts.json").read_text()
        (entry / "facts.json").write_text(whole.replace("first", "fIrst") if damage == "other facts" else whole[:20])
    assert read_text("gram", "one", make_text("second")) == "second"
    assert "are damaged" in caplog.text
    assert read_text("gram", "one", make_text("third")) == "second"


def test_the_bound_throws_out_what_is_unused_for_longest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four of 0.4 MB where 1 MB is allowed; what a process is using stays, and what cannot be computed anew."""
    monkeypatch.setenv("PRUNE_LAB_CACHE_GB", "0.001")
    lasting = tmp_path / "cache" / "training" / "run" / "training.safetensors"
    lasting.parent.mkdir(parents=True)
    lasting.write_bytes(b"x" * 2_000_000)
    text = "x" * 400_000

    def kept() -> set[str]:
        return {folder.name for kind in store.KINDS for folder in store.entries(kind)}

    for age, (kind, key) in enumerate((("gram", "old"), ("tokens", "older"))):
        read_text(kind, key, make_text(text))
        os.utime(tmp_path / "cache" / kind / key / "facts.json", (1000 - age, 1000 - age))
    read_text("gram", "new", make_text(text))
    assert kept() == {"old", "new"}
    with store.entry("gram", "old", make_text("unused")):
        os.utime(tmp_path / "cache" / "gram" / "old" / "facts.json", (1, 1))
        read_text("sensitivity", "newest", make_text(text))
        assert kept() == {"old", "newest"}
    read_text("sensitivity", "too large", make_text("x" * 1_200_000))
    assert kept() == {"old", "newest"}
    assert lasting.exists()
    assert not list((tmp_path / "cache").rglob("*.tmp"))


@pytest.mark.parametrize("said", ["much", "-1", "nan", "inf"])
def test_a_bound_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    monkeypatch.setenv("PRUNE_LAB_CACHE_GB", said)
    with pytest.raises(Refused, match=f"PRUNE_LAB_CACHE_GB='{said}' must be"):
        store.limit_bytes()


def test_where_nothing_can_be_kept_the_run_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No folder can be made in /dev/fd; and a disk that is full says so to who writes."""
    cache = Path(os.environ["PRUNE_LAB_CACHE"])

    def full(folder: Path) -> dict[str, Any]:
        if folder.is_relative_to(cache):
            raise OSError(errno.ENOSPC, "No space left on device")
        return make_text("third")(folder)

    assert read_text("gram", "one", full) == "third"
    monkeypatch.setenv("PRUNE_LAB_CACHE", "/dev/fd/cache")
    assert [read_text("gram", "one", make_text(text)) for text in ("first", "second")] == ["first", "second"]
    assert caplog.text.count("cannot be kept") == 3
    assert [path for path in cache.rglob("*") if path.parent.name != "locks"] == [cache / "gram", cache / "locks"]
    with pytest.raises(FileNotFoundError, match="of the text"):
        read_text("gram", "one", lambda folder: {"text": Path("file of the text").read_text()})


def test_a_kind_that_is_not_listed_is_not_kept() -> None:
    """It would be neither bounded nor shown nor cleared."""
    with pytest.raises(AssertionError, match="grams: what is no kind"):
        read_text("grams", "one", make_text("text"))


# The command.


def test_the_cache_command_shows_and_clears(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind, key in (("gram", "a"), ("gram", "b"), ("tokens", "c")):
        read_text(kind, key, make_text("x" * 50_000))
    (tmp_path / "cache" / "training" / "run").mkdir(parents=True)

    def said(*arguments: str) -> str:
        assert program._run(["cache", *arguments]) == 0
        return capsys.readouterr().out

    rows = {line.split()[0]: line.split()[1:3] for line in said().splitlines() if line.split()}
    assert rows["gram"] == ["2", "0.10"]
    assert rows["tokens"] == ["1", "0.05"]
    assert rows["training"][0] == "1"
    with store.entry("gram", "a", make_text("")):
        assert "1 entries thrown out, 0.05 MB; 1 in use stay" in said("clear", "gram")
    assert "2 entries thrown out" in said("clear")
    assert [path.name for path in (tmp_path / "cache").rglob("*") if path.parent.name in store.KINDS] == []
    assert not list((tmp_path / "cache" / "locks").iterdir())
    assert "1 entries" in said("clear", "training")


@pytest.mark.parametrize("arguments", [["clear", "nothing"], ["clean"], ["clear", "gram", "tokens"], ["clear", "../x"]])
def test_the_cache_command_refuses(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cache_command.main(arguments) == 2
    assert " ".join(["cache", *arguments]) in capsys.readouterr().err


def test_the_cache_command_does_without_torch() -> None:
    code = "import sys; from prune_lab import __main__ as p; p._run(['cache']); print('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
