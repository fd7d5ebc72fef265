"""Whatever a figure depends on makes it another one: nothing that was kept is served for something else."""

from __future__ import annotations

import copy
import itertools
import json
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import CPU, Cli, make_folder, story
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from warm import give_store

from prune_lab import __main__ as program
from prune_lab import evaluator, fingerprint
from prune_lab.models.contents import config_sha256
from prune_lab.models.load import HubModel
from prune_lab.sweeps import sweep
from prune_lab.text.encode import tokenizer_sha256

# MLflow 3's own models use a deprecated part of SQLAlchemy, which says so when a store is first opened.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")

Figures = dict[str, float]
Run = Callable[..., Figures]
Change = Callable[[Path, Path], list[str]]  # of the model's and the text's folder; overrides that belong to it


@pytest.fixture
def places(folder: Path, corpus: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Copies of the small model and its text, to be edited where they lie."""
    model, text = tmp_path / "model", tmp_path / "text"
    shutil.copytree(folder, model)
    shutil.copytree(corpus, text)
    edit(model / "tokenizer_config.json", bos_token="<|endoftext|>")
    return model, text


@pytest.fixture
def run(
    places: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Run]:
    """Runs a command line in this process, so that what is held in memory counts too, and returns its figures."""
    on_sigterm, count = signal.getsignal(signal.SIGTERM), 0
    monkeypatch.setattr(sweep, "_current", None)
    model, text = places

    def run(*overrides: str, cache: str = "cache") -> Figures:
        nonlocal count
        count += 1
        place = tmp_path / f"run{count}"
        monkeypatch.setenv("PRUNE_LAB_CACHE", str(tmp_path / cache))
        if cache != "cache":  # as another process would: what this one holds in memory is not fresh either
            evaluator._open.clear()
        arguments = [
            "model=hf", f"model.name={model}", "dataset=text", f"dataset.path={text}", "dataset.seq_len=24",
            "dataset.calibration.n_samples=8", "dataset.calibration.propagate=dense", "method=wanda", "device=cpu",
            "measure=quality_only", "measure.max_windows=8", "tracking=none", f"hydra.run.dir={place}", *overrides,
        ]  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["prune_lab", *arguments])
        capsys.readouterr()
        assert program._run(arguments) == 0, capsys.readouterr().err
        summary = json.loads((place / "summary.json").read_text())
        wanted = ("quality/perplexity", "quality/dense_perplexity", "params/nonzero", "params/dense_total")
        figures = {name: summary["metrics"][name] for name in wanted}
        return {**figures, "computed": summary["reused_from"] is None}

    yield run
    signal.signal(signal.SIGTERM, on_sigterm)


def edit(file: Path, **values: Any) -> None:
    """Changes keys of a JSON file; None takes one out."""
    found = json.loads(file.read_text()) if file.exists() else {}
    found = {key: value for key, value in {**found, **values}.items() if value is not None}
    file.write_text(json.dumps(found))


def config(**values: Any) -> Change:
    return lambda model, text: edit(model / "config.json", **values) or []


def overrides(*words: str) -> Change:
    return lambda model, text: list(words)


def rewrite(file: str, change: Callable[[str], str]) -> Change:
    def work(model: Path, text: Path) -> list[str]:
        path = model / file if (model / file).exists() else text / file
        path.write_text(change(path.read_text()))
        return []

    return work


ROPE = {"rope_theta": 10000.0, "rope_type": "default"}
# Each changes one input alone, and with it the figures.
COMPUTES: dict[str, Change] = {
    "rope theta": config(rope_parameters=ROPE | {"rope_theta": 500.0}),
    "rope theta, as older versions wrote it": config(rope_parameters=None, rope_theta=500.0),
    "rope scaling": config(rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}),
    "epsilon": config(rms_norm_eps=0.1),
    "activation": config(hidden_act="relu"),
    "heads of another width": config(num_attention_heads=8, num_key_value_heads=4, head_dim=4),
    "tokenizer": rewrite("tokenizer.json", lambda t: t.replace('"add_prefix_space": false', '"add_prefix_space": true')
                         .replace('"add_prefix_space":false', '"add_prefix_space":true')),
    "a word of the text": rewrite("0.txt", lambda text: text.replace("the", "any")),
    "the whole text": lambda model, text: [path.write_text(story(500 + i)) for i, path in
                                           enumerate(sorted(text.glob("*.txt")))] and [],
    "windows": overrides("measure.max_windows=7"),
    "length of windows": overrides("dataset.seq_len=23"),
    "BOS": overrides("dataset.add_bos=true"),
    "dtype": overrides("dtype=bfloat16"),
    "seed": overrides("seed=1"),
    "calibration": overrides("dataset.calibration.n_samples=7"),
    "calibration on a mix": lambda model, text: (text.parent / "more.txt").write_text(story(900)) and [
        "dataset.calibration.source=mix",
        f"dataset.calibration.mix=[{{source:own,share:0.5}},{{source:text,name:{text.parent}/more.txt,share:0.5}}]",
    ],
}  # fmt: skip
# What no figure depends on and an export has all the same.
CARRIED: dict[str, Change] = {
    "generation config": lambda model, text: edit(model / "generation_config.json", temperature=0.5) or [],
    "chat template": lambda model, text: edit(model / "tokenizer_config.json", chat_template="{{ messages }}") or [],
    "setting of the tokenizer": lambda model, text: edit(model / "tokenizer_config.json", model_max_length=99) or [],
    "licence": lambda model, text: (model / "README.md").write_text("---\nlicense: mit\n---\n") and [],
}  # fmt: skip


@pytest.mark.parametrize("name", [*COMPUTES, *CARRIED])
def test_an_input_that_changed_is_another_run_in_memory_and_on_disk(
    name: str, run: Run, places: tuple[Path, Path]
) -> None:
    """The files are edited where they lie, between two runs of one process that share a cache folder.

    What is served where nothing changes: test_another_version_of_a_library_or_of_the_source_is_another_run.
    """
    first = run()
    words = (COMPUTES | CARRIED)[name](*places)
    found, fresh = run(*words), run(*words, cache="fresh")
    assert found["computed"]
    assert found == fresh
    if name in COMPUTES and name != "a word of the text":  # it need not be one of the few windows
        assert found["quality/perplexity"] != first["quality/perplexity"]
    if name in ("rope theta", "epsilon", "activation", "tokenizer", "BOS", "dtype", "windows", "length of windows"):
        assert found["quality/dense_perplexity"] != first["quality/dense_perplexity"]


def test_a_sweep_over_equal_weights_with_other_configs(
    run: Run, cli: Cli, places: tuple[Path, Path], tmp_path: Path
) -> None:
    """Each job has its own figures, dense ones included; the sweep again is served each job's own.

    From a store and from the cache folder.
    """
    model, text = places
    other = tmp_path / "other"
    shutil.copytree(model, other)
    edit(other / "config.json", rope_parameters=ROPE | {"rope_theta": 500.0})
    alone = [run(f"model.name={name}", "tracking=none", cache=f"fresh{i}") for i, name in enumerate((model, other))]
    assert alone[0]["quality/dense_perplexity"] != alone[1]["quality/dense_perplexity"]
    give_store(tmp_path)
    for tracking, number in itertools.product(("mlflow", "none"), range(2)):
        place = tmp_path / f"{tracking}{number}"
        done = cli(
            "-m", "model=hf", f"model.name={model},{other}", "dataset=text", f"dataset.path={text}",
            "dataset.seq_len=24", "dataset.calibration.n_samples=8", "dataset.calibration.propagate=dense",
            "method=wanda", "device=cpu", "measure=quality_only", "measure.max_windows=8", f"tracking={tracking}",
            f"hydra.sweep.dir={place}", PRUNE_LAB_CACHE=str(tmp_path / f"shared_{tracking}"),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        for job, expected in zip("01", alone, strict=True):
            summary = json.loads((place / job / "summary.json").read_text())
            assert (summary["reused_from"] is None) == (number == 0)
            for name in ("quality/perplexity", "quality/dense_perplexity"):
                assert summary["metrics"][name] == expected[name]


def test_an_export_is_that_of_the_run(run: Run, tmp_path: Path) -> None:
    """A folder that another run has used since holds another model: the export is made again."""
    place = tmp_path / "kept"
    words = [f"hydra.run.dir={place}", "export=hf"]
    assert run_in(run, place, *words, "amount=0.2")["computed"]
    assert run_in(run, place, *words, "amount=0.4")["computed"]
    assert run_in(run, tmp_path / "again", f"hydra.run.dir={tmp_path / 'again'}", "export=hf", "amount=0.2")["computed"]


def run_in(run: Run, place: Path, *words: str) -> Figures:
    """A run in a folder of its own choice."""
    with suppress(FileNotFoundError):  # the fixture looks where it would have put the run
        run(*words)
    summary = json.loads((place / "summary.json").read_text())
    return {"computed": summary["reused_from"] is None}


def test_another_version_of_a_library_or_of_the_source_is_another_run(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run()
    real = fingerprint.version
    with monkeypatch.context() as patched:
        patched.setattr(fingerprint, "version", lambda name: "0.1" if name == "tokenizers" else real(name))
        assert run()["computed"]
    assert not run()["computed"]
    with monkeypatch.context() as patched:
        patched.setattr(fingerprint, "source_sha256", lambda *parts: "edited")
        assert run()["computed"]


# The hashes themselves.


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return HubModel(name=str(make_folder(tmp_path_factory.mktemp("model") / "m"))).load(CPU, 0).model


NAMES_ONLY = ("_name_or_path", "architectures", "transformers_version", "dtype")
VALUES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=5))


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_every_field_of_a_config_counts_but_those_that_only_name(model: Any, data: Any) -> None:
    """Fields that this version of transformers does not know count too: another version's forward may read them."""
    known = sorted(set(model.config.to_dict()) - {"model_type"})
    field, value = data.draw(st.sampled_from([*known, "a_field_of_another_version"])), data.draw(VALUES)
    config = copy.deepcopy(model.config)
    changed = SimpleNamespace(config=config)
    try:
        setattr(config, field, value)
        config.to_dict()
    except Exception:  # transformers holds no such config
        return
    differs = repr(getattr(config, field)) != repr(getattr(model.config, field, "no such field"))
    assert (config_sha256(changed) != config_sha256(model)) == (differs and field not in NAMES_ONLY), (field, value)


def test_the_kind_of_attention_counts(model: Any) -> None:
    other = SimpleNamespace(config=copy.deepcopy(model.config))
    assert config_sha256(other) == config_sha256(model)
    other.config._attn_implementation = "eager"
    assert config_sha256(other) != config_sha256(model)


def test_a_tokenizer_is_the_same_before_and_after_it_was_used(folder: Path, tmp_path: Path) -> None:
    """One that would cut and pad is used without: neither changes an id."""
    shutil.copytree(folder, tmp_path / "m")
    path = tmp_path / "m" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["truncation"] = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    path.write_text(json.dumps(content))
    plain, cutting = (HubModel(name=str(place)).load(CPU, 0).tokenizer for place in (folder, tmp_path / "m"))
    assert tokenizer_sha256(plain) == tokenizer_sha256(cutting)
    plain.backend_tokenizer.no_truncation()
    assert tokenizer_sha256(plain) == tokenizer_sha256(cutting)
