"""The command line: overrides in any order, what Hydra cannot read, and sweeps whose options have not all one key."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
from conftest import Cli
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from prune_lab.config import parts
from prune_lab.config.command_line import in_order
from prune_lab.config.composing import Loader
from prune_lab.config.overrides import ambiguous, as_override, as_shell, unreadable
from prune_lab.errors import Refused
from prune_lab.results.summary import from_dict
from prune_lab.tracking.params import params_of

FAST = ["measure=quality_only", "tracking=none", "quiet=true"]
# What Hydra's grammar, OmegaConf or a shell has a meaning for.
TEXTS = [
    "My Drive (1)", "a=b, c", "x{y}", "it's", 'say "hi"', "it's \"both\"", "a\\", "\\", "\\'", "a\\\"b", "$HOME",
    "`id`", "!x", "${now:%H}", "\\${x}", "\\\\${x}", "${", "a\nb", "\t", " lead", "trail ", "~", "[x]*.txt", "a,b",
    "null", "true", "1e3", "007", "é", "e\u0301", "😀", "שלום", "#", "?", ";", "%20", "2:4", "'q'", '"q"', "-x",
    "choice(a,b)", "*",
]  # fmt: skip


def given_by(word: str) -> Any:
    """What Hydra and OmegaConf make of an override's value."""
    return OmegaConf.create({"x": OverridesParser.create().parse_override(word).value()})["x"]


@given(st.text(alphabet="ab'\"\\${}[](),=: ~%\n!`é", max_size=12))
@settings(max_examples=150, deadline=None)
@example("It's \\")
def test_any_text_can_be_written_as_an_override(text: str) -> None:
    word = as_override("dataset.path", text)
    assert word is not None
    assert given_by(word) == text


def test_what_is_suggested_gives_the_text_when_it_is_pasted_in_a_shell() -> None:
    for text in TEXTS:
        word = as_override("dataset.path", text)
        assert word is not None, text
        typed = subprocess.run(["bash", "-c", f"printf %s {as_shell(word)}"], capture_output=True, check=True).stdout
        assert typed.decode() == word
        assert given_by(word) == text


@pytest.mark.parametrize(
    ("word", "suggestion"),
    [
        ("dataset.path=My Drive (1)", "\"dataset.path='My Drive (1)'\""),
        ("dataset.path=a=b, c", "\"dataset.path='a=b, c'\""),
        ("dataset.path=x{y}", "\"dataset.path='x{y}'\""),
        ("model.name=it's", "\"model.name='it\\'s'\""),
    ],
)
def test_a_value_that_hydra_cannot_read_is_shown_as_it_must_be_written(word: str, suggestion: str) -> None:
    message = unreadable(word, "mismatched input")
    assert message.startswith(f"{word}: Hydra cannot read the value")
    assert message.endswith(suggestion)
    assert given_by(shlex.split(suggestion)[0]) == word.partition("=")[2]


def test_commas_without_m_are_named_with_three_ways_to_write_them() -> None:
    message = ambiguous("method.units=mlp,heads")
    for part in ("-m", "'method.units=[mlp,heads]'", "\"method.units='mlp,heads'\""):
        assert part in message


@pytest.mark.parametrize(
    ("words", "ordered"),
    [
        (["method=wanda", "-m", "amount=0.2,0.4"], ["--multirun", "method=wanda", "amount=0.2,0.4"]),
        (["a=1", "-cd", "x", "b=2", "-cn=y", "c=3"], ["--config-name=y", "--config-dir=x", "a=1", "b=2", "c=3"]),
        (["a=1", "--cfg", "job", "b=2", "--resolve"], ["--cfg=job", "--resolve", "a=1", "b=2"]),
        (["a=1", "--", "b=2"], ["a=1", "b=2"]),
        ([], []),
    ],
)
def test_flags_may_stand_anywhere(words: list[str], ordered: list[str]) -> None:
    assert in_order(words) == ordered


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--multrun"], "did you mean --multirun"),
        (["amount=0.2", "-amount=0.5"], "an override has no dash: amount=0.5"),
        (["-cd"], "expected one argument"),
        (["--cfg", "nope"], "invalid choice"),
    ],
)
def test_a_flag_that_is_none_is_named(words: list[str], says: str) -> None:
    with pytest.raises(Refused, match=says):
        in_order(words)


# The mode: one run, or a sweep.


@pytest.mark.parametrize(
    ("words", "mode"),
    [
        ([], None), (["amount=0.2,0.4", "hydra/launcher=joblib"], None), (["+hydra.mode=RUN"], RunMode.RUN),
        (["hydra.mode=MULTIRUN"], RunMode.MULTIRUN), (["++hydra={mode:MULTIRUN}"], RunMode.MULTIRUN),
        (["hydra.searchpath=[file://PLACE]", "+mine=sweep"], RunMode.MULTIRUN),
    ],
)  # fmt: skip
def test_the_mode_is_the_one_that_hydra_finds(words: list[str], mode: RunMode | None, tmp_path: Path) -> None:
    """Nothing is composed for it where nothing can give it."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "sweep.yaml").write_text("# @package _global_\nhydra: {mode: MULTIRUN}\n")
    words = [word.replace("PLACE", str(tmp_path)) for word in words]
    parts.register_schema()
    hydras, ours = [
        loader(create_config_search_path(parts.CONF_DIR)).load_configuration(
            "config", words, RunMode.MULTIRUN, validate_sweep_overrides=False
        )
        for loader in (ConfigLoaderImpl, Loader)
    ]
    assert hydras.hydra.mode == ours.hydra.mode == mode
    assert ("amount" in ours) == (mode is not None)


def test_no_shipped_option_has_a_mode() -> None:
    for path in Path(parts.CONF_DIR).rglob("*.yaml"):
        assert OmegaConf.select(OmegaConf.load(path), "hydra.mode") is None, path


# Sweeps whose options have not all one key.


def jobs(folder: Path) -> list[dict[str, Any]]:
    """The summaries of the one sweep in a folder, by job."""
    found = sorted(folder.glob("multirun/*/*/*/summary.json"), key=lambda path: int(path.parent.name))
    return [json.loads(path.read_text()) for path in found]


def test_a_key_of_one_option_is_not_applicable_to_the_others(cli: Cli, small: list[str], tmp_path: Path) -> None:
    """Written between overrides; a run without the key is the same run, and each command repeats its job."""
    shared = [*small, *FAST, "recovery.steps=2"]
    done = cli(*shared, "recovery=none,distill", "-m", "recovery.temperature=3", "++recovery.validate_every=0")
    assert (done.returncode, done.stderr) == (0, "")
    none, distill = jobs(tmp_path)
    assert set(none["not_applicable"]["recovery"]) == {"steps", "lr", "batch_size", "temperature", "validate_every"}
    assert distill["not_applicable"]["recovery"] == []
    assert distill["config"]["recovery"]["temperature"] == 3
    assert "temperature" not in none["config"]["recovery"]
    assert not any("temperature" in word for word in none["overrides"])
    assert params_of(from_dict(none))["recovery.temperature"] == "n/a"
    alone = cli(*none["overrides"], "hydra.run.dir=alone")
    assert alone.returncode == 0
    again = json.loads((tmp_path / "alone" / "summary.json").read_text())
    assert again["fingerprint"] == none["fingerprint"]
    assert again["reused_from"] is not None
    assert "temperature" not in again["not_applicable"]["recovery"]


@pytest.mark.parametrize("options", ["none,distill", "distill,none"])
def test_a_key_of_one_option_may_be_taken_out(options: str, cli: Cli, small: list[str], tmp_path: Path) -> None:
    """What is not given is the default of the class."""
    words = ["recovery.steps=1", "recovery.validate_every=0", "~recovery.temperature"]
    done = cli("-m", *small, *FAST, f"recovery={options}", *words)
    assert (done.returncode, done.stderr) == (0, "")
    found = {job["choices"]["recovery"]: job for job in jobs(tmp_path)}
    assert "temperature" in found["none"]["not_applicable"]["recovery"]
    assert "temperature" not in found["distill"]["config"]["recovery"]
    again = cli(*found["distill"]["overrides"], "hydra.run.dir=alone")
    assert again.returncode == 0, again.stderr
    assert json.loads((tmp_path / "alone" / "summary.json").read_text())["reused_from"] is not None


def test_a_recipe_may_give_what_only_one_of_its_options_takes(cli: Cli, small: list[str], tmp_path: Path) -> None:
    """In its own values and in a grid; the command of each job, in a model card too, repeats it by itself."""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.yaml").write_text(
        "defaults: [config, override hydra/sweeper: grids, _self_]\n"
        "recovery: {temperature: 3}\n"
        "hydra:\n  mode: MULTIRUN\n  sweeper:\n    params: {recovery.steps: 1, recovery: 'none,distill'}\n"
        "    grids: [{method: 'magnitude,structured', method.pattern: '\"2:4\",\"4:8\"', recovery.alpha: 0.4}]\n"
    )
    done = cli("-cd", "recipes", *small, *FAST, "export=hf", "-cn", "mine")
    assert (done.returncode, done.stderr) == (0, "")
    found = jobs(tmp_path)
    # A structured run has no pattern, so that two of its jobs are one.
    assert [(job["choices"]["recovery"], job["choices"]["method"]) for job in found] == [
        ("none", "magnitude"), ("none", "magnitude"), ("none", "structured"),
        ("distill", "magnitude"), ("distill", "magnitude"), ("distill", "structured"),
    ]  # fmt: skip
    assert found[2]["not_applicable"]["method"] == ["pattern"]
    assert {"alpha", "temperature"} <= set(found[2]["not_applicable"]["recovery"])
    assert found[5]["config"]["recovery"]["temperature"] == 3
    folder = next(tmp_path.glob("multirun/*/*/2"))
    card = (folder / "export" / "README.md").read_text()
    command = next(line for line in card.splitlines() if "-m prune_lab" in line)
    alone = cli(*shlex.split(command)[3:], "hydra.run.dir=alone")
    assert alone.returncode == 0, alone.stderr
    assert json.loads((tmp_path / "alone" / "summary.json").read_text())["fingerprint"] == found[2]["fingerprint"]


def test_optuna_leaves_out_what_does_not_apply_and_takes_any_path(
    cli: Cli, small: list[str], corpus: Path, tmp_path: Path
) -> None:
    """Its sweeper hands values on without their quotes."""
    place = tmp_path / "my texts (1), a={b}"
    place.symlink_to(corpus)
    done = cli(
        "-m", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=2", "hydra.sweeper.n_jobs=1",
        "hydra/sweeper/sampler=grid", *small, *FAST, "method=structured,wanda", "method.pattern='2:4'",
        f"dataset.path='{place}'",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = {job["choices"]["method"]: job for job in jobs(tmp_path)}
    assert found["structured"]["not_applicable"]["method"] == ["pattern"]
    assert found["wanda"]["config"]["dataset"]["path"] == str(place)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["recovery=none,finetune", "recovery.validate_evry=0"], ["recovery.validate_evry", "none,finetune", "steps"]),
        (["recovery=none,finetune", "recovery.temperature=1,2"], ["recovery.temperature: no such key"]),
        (["amount=0.1,0.2", "recovery.validate_every=0"], ["recovery.validate_every", "recovery=none", "steps"]),
        (["recovery=none,distill", "~recovery.temprature"], ["recovery.temprature: no such key", "temperature"]),
        (["tracking=none,mlflow", "tracking.uri=x"], ["tracking.uri: no such key", "it has none"]),
    ],
)
def test_a_key_that_no_option_of_the_sweep_has_is_refused_before_the_first_job(
    words: list[str], says: list[str], cli: Cli, tmp_path: Path
) -> None:
    done = cli("-m", *words)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert all(part in done.stderr for part in says), done.stderr
    assert not (tmp_path / "multirun").exists()
    assert not (tmp_path / "mlflow.db").exists()


def test_a_grid_may_not_name_a_key_of_another_grid(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "x.yaml").write_text(
        "defaults: [config, override hydra/sweeper: grids, _self_]\nhydra: {mode: MULTIRUN, sweeper: {grids: ["
        "{method: 'magnitude,wanda', method.units: '[mlp]'}, {method: structured}]}}\n"
    )
    done = cli("-cd", "r", "-cn", "x", *FAST)
    assert done.returncode == 2
    assert "method.units: no such key in method=magnitude,wanda" in done.stderr
