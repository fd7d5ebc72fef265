"""Any character in any path: where commands are given, where text, model and store lie, and where nothing can lie."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import ROOT, Cli
from warm import give_store, run_module

from prune_lab.config.overrides import as_override
from prune_lab.config.parts import Settings
from prune_lab.job_context import JobContext
from prune_lab.system.files import as_path, matching
from prune_lab.system.hub import proxy_for, shown_proxy
from prune_lab.tracking.links import sqlite_file, store_uri

NAMES = [
    "it's", 'say "hi"', "it's \"both\"", "[x]", "{y}", "100%", "a%20b", "a%3Fb", "%s", "a+b", "a,b", "a=b", "a b", "é",
    "e\u0301", "😀 שלום", "a\nb", "a\\b", "a#b", "a?b", "a;b", "$a", "~", "-x", " lead", "trail ", "dot.", "a&b", "a:b",
    "*", "`", "!",
]  # fmt: skip
WORST = 'it\'s "q" [x] {y} 50% %20 %s + , = #? ; $a é 😀 שלום \\ ~ & \n end. '
FAST = ["measure=quality_only", "measure.max_windows=4", "quiet=true"]


def test_a_sweep_a_run_resume_sync_and_a_report_in_the_worst_of_folders(
    folder: Path, corpus: Path, tmp_path: Path
) -> None:
    """The working folder, the store in it, the cache, the model and the text lie in folders of that name."""
    here = tmp_path / WORST
    here.mkdir()
    give_store(here)
    shutil.copytree(folder, here / "[model] it's")
    shutil.copytree(corpus, here / "te[x]ts, 1=2")
    cache = {"PRUNE_LAB_CACHE": str(here / "cache")}
    words = ["model=hf", "model.name=\"[model] it's\"", "dataset=text", "dataset.path='te[x]ts, 1=2/*.txt'",
             "dataset.seq_len=32", *FAST]  # fmt: skip
    swept = run_module("prune_lab", ["-m", *words, "amount=0.2,0.4"], here, **cache)
    assert (swept.returncode, swept.stderr) == (0, "")
    with sqlite3.connect(here / "mlflow.db") as store:
        runs = store.execute("select r.status, t.value from runs r left join tags t on t.run_uuid = r.run_uuid and "
                             "t.key = 'mlflow.parentRunId' order by r.start_time").fetchall()  # fmt: skip
    store.close()
    assert [status for status, _ in runs] == ["FINISHED"] * 3
    assert len({parent for _, parent in runs if parent}) == 1
    again = run_module("prune_lab", ["-m", *words, "amount=0.2,0.4"], here, **cache)
    assert again.returncode == 0
    sweeps = sorted(here.glob("multirun/*/*"))
    summary = json.loads((sweeps[1] / "0" / "summary.json").read_text())
    assert summary["reused_from"] is not None  # resumed
    # A job's own command, pasted into a shell, is the same run.
    place = JobContext(sweeps[0] / "0", sweeps[0], "0", overrides=summary["overrides"])
    pasted = subprocess.run(["sh", "-c", f"printf '%s\\0' {place.command}"], capture_output=True, check=True).stdout
    command = pasted.decode().split("\0")[:-1]
    single = run_module("prune_lab", [*command[3:], "export=hf"], here, **cache)
    assert (single.returncode, single.stderr) == (0, "")
    (alone,) = here.glob("outputs/*/*/summary.json")
    assert json.loads(alone.read_text())["fingerprint"] == summary["fingerprint"]
    # What the store lost, sync enters; it finds the sweep's parent and makes no other.
    with sqlite3.connect(here / "mlflow.db") as store:
        store.execute("update tags set value = 'x' where key = 'prune_lab.fingerprint'")
    store.close()
    synced = run_module("prune_lab", ["sync"], here, **cache)
    assert (synced.returncode, synced.stderr) == (0, "")
    assert "2 logged" in synced.stdout
    with sqlite3.connect(here / "mlflow.db") as store:
        (parents,) = store.execute("select count(*) from tags where key = 'prune_lab.sweep'").fetchone()
    store.close()
    assert parents == 2
    for source in (str(sweeps[0].relative_to(here)), "prune_lab"):
        reported = run_module("prune_lab.report", [source, "-o", "a $b$ {c}"], here, **cache)
        assert (reported.returncode, reported.stderr) == (0, "")
    assert (here / "a $b$ {c}" / "report.png").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == [here.name]  # nothing went beside it


@pytest.mark.parametrize("name", ["${x}", "\\\\${now:%H}", "a ${amount} b"])
def test_what_looks_like_a_reference_may_be_a_part_of_a_path(
    name: str, folder: Path, corpus: Path, tmp_path: Path, cli: Cli
) -> None:
    """Of the model, the text, calibration text and a teacher."""
    shutil.copytree(folder, tmp_path / name / "model")
    shutil.copytree(corpus, tmp_path / name / "text")
    places = {"model.name": "model", "dataset.path": "text", "dataset.calibration.name": "text/*.txt",
              "recovery.teacher": "model"}  # fmt: skip
    words = [as_override(key, f"{name}/{place}") for key, place in places.items()]
    keys = ["model=hf", "dataset=text", "dataset.seq_len=32", "dataset.calibration.source=text", "method=wanda",
            "dataset.calibration.n_samples=4", "dataset.calibration.seq_len=16", "recovery=distill",
            "recovery.steps=1", "recovery.validate_every=0", "tracking=none", "hydra.run.dir=run"]  # fmt: skip
    done = cli(*keys, *FAST, *map(str, words))
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "run" / "summary.json").read_text())["config"]
    assert config["model"]["name"] == f"{name}/model"
    assert config["dataset"]["calibration"]["name"] == f"{name}/text/*.txt"


def test_a_store_may_be_named_by_the_path_of_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As people write it, and as addresses are encoded."""
    for number, name in enumerate(NAMES):
        place = tmp_path / str(number) / name  # the others are not beside it
        place.mkdir(parents=True)
        path = place / "mlflow.db"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{path}")
        assert sqlite_file(store_uri()) == path
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{str(path).replace('%', '%25').replace('?', '%3F')}")
        assert sqlite_file(store_uri()) == path


def test_a_glob_in_a_folder_of_any_name_names_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, name in enumerate(NAMES):
        here = tmp_path / str(number)
        (here / name / "deep").mkdir(parents=True)
        (here / name / "a.txt").touch()
        (here / name / "deep" / "b.txt").touch()
        monkeypatch.chdir(here)
        for place in (here / name, Path(name)):
            assert matching(place / "*.txt") == [place / "a.txt"]
            assert sorted(matching(place / "**" / "*.txt")) == [place / "a.txt", place / "deep" / "b.txt"]
            assert matching(place / "a.txt") == [place / "a.txt"]


def test_a_tilde_is_the_home_folder_where_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "~nobody at all").mkdir()
    assert as_path("~nobody at all") == Path("~nobody at all")
    (tmp_path / "home" / "x").mkdir(parents=True)
    assert as_path("~/x") == tmp_path / "home" / "x"


@pytest.mark.parametrize("name", ["/Users/someone/prune", "team/project", "a\\b", "..", "👨‍👩‍👧", "50% [x] it's"])
def test_an_experiment_may_have_any_name(name: str) -> None:
    assert Settings(name=name).name == name


def test_the_name_of_an_experiment_is_made_fit_for_a_folder(small: list[str], tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.mkdir()
    give_store(here)
    for name in ("/Users/someone/prune", ".."):
        words = [*small, *FAST, f"name={name}", "hydra.run.dir=runs/${name}/x"]
        done = run_module("prune_lab", words, here)
        assert (done.returncode, done.stderr) == (0, "")
    assert sorted(path.parent.parent.name for path in here.rglob("summary.json") if "mlruns" not in path.parts) == [
        "Users_someone_prune", "_",
    ]  # fmt: skip
    with sqlite3.connect(here / "mlflow.db") as store:
        names = {name for (name,) in store.execute("select name from experiments")}
    store.close()
    assert {"/Users/someone/prune", ".."} <= names


# Where nothing can lie.


def test_a_cache_that_cannot_be_written_costs_a_note(small: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    words = [*small, *FAST, "tracking=none", "recovery=finetune", "recovery.steps=2", "recovery.checkpoint_every=1"]
    done = run_module("prune_lab", words, tmp_path, PRUNE_LAB_CACHE=str(tmp_path / "file" / "x"))
    assert done.returncode == 0
    assert done.stderr.count("\n") == 1
    assert f"warning: the cache folder {tmp_path}/file/x cannot be written (Not a directory)" in done.stderr
    assert "PRUNE_LAB_CACHE=FOLDER" in done.stderr


@pytest.mark.slow
def test_a_sweep_without_a_home_draws_its_plot_and_says_nothing_of_fonts(small: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    words = ["-m", *small, *FAST, "tracking=none", "amount=0.2,0.4"]
    homeless = {"HOME": str(tmp_path / "file"), "XDG_CACHE_HOME": "", "MPLCONFIGDIR": str(tmp_path / "file" / "x")}
    done = run_module("prune_lab", words, tmp_path, **homeless)
    assert (done.returncode, done.stderr) == (0, "")
    assert list(tmp_path.glob("multirun/*/*/pareto.png"))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["hydra.run.dir=file/x", "tracking=none"], ["file/x", "Not a directory", "hydra.run.dir=FOLDER"]),
        (["-m", "amount=0.1,0.2", "hydra.sweep.dir=file/x", "tracking=none"], ["Not a directory", "hydra.sweep.dir"]),
    ],
)
def test_a_folder_of_results_that_cannot_be_made_is_named(words: list[str], says: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = run_module("prune_lab", [*words, *FAST], tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert all(part in done.stderr for part in says), done.stderr


def test_a_store_in_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    done = run_module("prune_lab", FAST, tmp_path, MLFLOW_TRACKING_URI="sqlite:///nowhere/mlflow.db")
    assert done.returncode == 2
    assert "no MLflow store can be made in" in done.stderr
    assert "tracking=none" in done.stderr


def started(code: str, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The command line after some Python."""
    line = ["prune_lab", *words, *FAST]
    program = f"{code}\nimport sys\nsys.argv = {line}\nfrom prune_lab.__main__ import main\nmain()"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


def test_a_working_folder_that_is_gone_or_that_hydra_would_resolve_is_named(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    done = started("import os; os.rmdir(os.getcwd())", tmp_path / "gone")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "the working folder cannot be read" in done.stderr
    (tmp_path / "a${now:%H}").mkdir()
    done = started("", tmp_path / "a${now:%H}")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "takes for a reference" in done.stderr
    assert list((tmp_path / "a${now:%H}").iterdir()) == []


# Packages that are not there.

NO_PLUGINS = f"import hydra_plugins; hydra_plugins.__path__ = [{str(ROOT / 'hydra_plugins')!r}]"
NO_MLFLOW = "import sys; sys.modules['mlflow'] = None"


@pytest.mark.parametrize(
    ("without", "words", "says"),
    [
        (NO_PLUGINS, ["-m", "hydra/launcher=joblib"], 'pip install "prune-lab[parallel]"'),
        (NO_PLUGINS, ["-m", "hydra/launcher=submitit_slurm"], 'pip install "prune-lab[slurm]"'),
        (NO_PLUGINS, ["-m", "hydra/launcher=ray"], 'pip install "prune-lab[ray]"'),
        (NO_PLUGINS, ["-m", "hydra/sweeper=optuna"], 'pip install "prune-lab[search]"'),
        (NO_MLFLOW, [], "pip install mlflow, or give tracking=none"),
        (NO_MLFLOW, ["-m", "amount=0.1,0.2"], "pip install mlflow, or give tracking=none"),
        ("import sys; sys.modules['accelerate'] = None", ["measure.tasks=[piqa]"], 'pip install "prune-lab[tasks]"'),
    ],
)
def test_a_package_that_is_missing_is_named_with_what_installs_it(
    without: str, words: list[str], says: str, tmp_path: Path
) -> None:
    done = started(without, tmp_path, *words)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert says in done.stderr


@pytest.mark.slow
def test_a_missing_driver_is_named_with_what_installs_it(tmp_path: Path) -> None:
    without = (
        "import sys, os; sys.modules['psycopg2'] = None\nos.environ['MLFLOW_TRACKING_URI'] = 'postgresql://u:pw@h/d'"
    )
    done = started(without, tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert 'pip install "prune-lab[postgres]"' in done.stderr
    assert "pw" not in done.stderr.replace("psycopg2", "")


# Behind a proxy.


@pytest.fixture
def proxy() -> Iterator[tuple[str, list[str]]]:
    """A proxy that leads nowhere, and what it was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_CONNECT(self) -> None:
            asked.append(f"CONNECT {self.path}")
            self.send_error(502)

        def do_HEAD(self) -> None:
            asked.append(f"HEAD {self.path}")
            self.send_error(502)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_address[1]}", asked
    server.shutdown()
    server.server_close()


def why_unreachable(**environment: str) -> str:
    """As a fresh process finds it."""
    env = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE" and "proxy" not in key.lower()}
    env |= {"PYTHONPATH": str(ROOT), **environment}
    code = "from prune_lab.system.hub import why_unreachable\nprint(why_unreachable())"
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("name", ["HTTPS_PROXY", "https_proxy", "ALL_PROXY"])
def test_a_proxy_is_asked_where_names_cannot_be_looked_up(name: str, proxy: tuple[str, list[str]]) -> None:
    address, asked = proxy
    said = why_unreachable(HF_ENDPOINT="https://hub.invalid", **{name: f"http://me:secret@{address}"})
    assert asked == ["CONNECT hub.invalid:443"]
    assert f"the proxy http://***@{address} does not lead to hub.invalid" in said
    assert "secret" not in said


def test_a_proxy_that_answers_is_a_way_and_one_that_is_excluded_is_not_asked(proxy: tuple[str, list[str]]) -> None:
    address, asked = proxy
    assert why_unreachable(HF_ENDPOINT="http://hub.invalid", HTTP_PROXY=f"http://{address}") == "None\n"
    assert [words.rstrip("/") for words in asked] == ["HEAD http://hub.invalid"]
    excluded = why_unreachable(HF_ENDPOINT="https://hub.invalid", HTTPS_PROXY=f"http://{address}", NO_PROXY=".invalid")
    assert excluded == "hub.invalid cannot be reached\n"
    assert len(asked) == 1


def test_the_proxy_of_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    assert proxy_for("https://hub.invalid") is None
    monkeypatch.setenv("HTTP_PROXY", "http://plain:1")
    assert proxy_for("https://hub.invalid") is None
    assert proxy_for("http://hub.invalid") == "http://plain:1"
    monkeypatch.setenv("NO_PROXY", "hub.invalid")
    assert proxy_for("http://hub.invalid") is None
    assert shown_proxy("socks5://me:p@ss@host:1080") == "socks5://***@host:1080"
    assert shown_proxy("http://host:1") == "http://host:1"
