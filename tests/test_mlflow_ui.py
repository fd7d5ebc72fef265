"""A sweep as a person finds it in the MLflow UI: its runs unfolded, ticked and compared, in a real browser.

PRUNE_LAB_SCREENSHOT=FILE.png writes what the README shows; PRUNE_LAB_SCREENSHOT_OF=FOLDER takes the sweep of that
folder (with its mlflow.db) instead of a small one made here.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Cli
from mlflow import MlflowClient
from processes import answers, free_port, wait_until

# MLflow 3's own models use a deprecated part of SQLAlchemy, which says so when a store is first opened.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PATIENCE = 300  # seconds for the server to come up and for each step of the page, on a machine that is busy


@pytest.fixture
def sweep(cli: Cli, small: list[str], tmp_path: Path) -> Path:
    """The working folder of a finished sweep over two methods and two amounts."""
    if "PRUNE_LAB_SCREENSHOT_OF" in os.environ:
        return Path(os.environ["PRUNE_LAB_SCREENSHOT_OF"])
    done = cli(*small, "measure=quality_only", "method=magnitude,random", "amount=0.2,0.4", "-m")
    assert done.returncode == 0, done.stderr
    return tmp_path


@pytest.fixture
def server(sweep: Path) -> Iterator[str]:
    """`mlflow ui` on a free port, in a process group of its own, since ending the first process leaves the others."""
    port = free_port()
    line = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", "sqlite:///mlflow.db", "--port", str(port)]
    # One worker, and none of the executors of MLflow's own jobs, which have nothing to do here.
    env = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with (sweep / "ui.log").open("w") as log:
        process = subprocess.Popen(
            [*line, "--workers", "1"], cwd=sweep, env=env, stdout=log, stderr=log, start_new_session=True
        )
    try:
        wait_until(lambda: answers(port), process, sweep / "ui.log")
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture
def page() -> Iterator[Any]:
    """A page of the installed browser, driven through its own protocol; nothing is downloaded."""
    if BROWSER is None:
        pytest.skip("no Chromium or Chrome is installed")
    driver = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with driver.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1280, "height": 720})
        page.set_default_timeout(PATIENCE * 1000)
        yield page
        browser.close()


def children_of(sweep: Path) -> list[Any]:
    """The sweep's runs as the store has them, by amount."""
    client = MlflowClient(f"sqlite:///{sweep / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name = 'prune_lab'")
    runs = client.search_runs([experiment.experiment_id])
    return sorted(
        (run for run in runs if "mlflow.parentRunId" in run.data.tags), key=lambda run: float(run.data.params["amount"])
    )


def test_the_runs_of_a_sweep_are_compared_in_the_ui(page: Any, server: str, sweep: Path) -> None:
    children = children_of(sweep)
    page.goto(f"{server}/#/experiments/{children[0].info.experiment_id}/runs?workflowType=machine_learning")

    parent = page.get_by_role("row").filter(has_text="sweep ").first
    parent.wait_for()
    assistant = page.get_by_role("button", name="Close", exact=True)
    if assistant.count():  # a panel that covers a third of the page
        assistant.first.click()
    names = [run.info.run_name for run in children]
    assert page.get_by_role("link", name=names[0]).count() == 0  # children are folded under their parent
    parent.locator("button").first.click()
    for name in names:
        page.get_by_role("row").filter(has=page.get_by_role("link", name=name)).locator(
            "input.ag-checkbox-input"
        ).check()
    page.get_by_role("button", name="Compare", exact=True).click()

    page.get_by_text(f"Comparing {len(children)} Runs").wait_for()
    axes = page.locator(".parcoords .axis-title")
    axes.last.wait_for()
    titles = axes.all_text_contents()
    assert {"amount", "quality/perplexity"} <= set(titles)
    assert len({run.data.params["method"] for run in children}) == 1 or "method" in titles
    shown = {
        float(text) for text in page.locator(".parcoords .axis-extent-text").all_text_contents() if _is_number(text)
    }
    perplexities = [run.data.metrics["quality/perplexity"] for run in children]
    for expected in (0.2, 0.4, min(perplexities), max(perplexities)):
        assert any(abs(value - expected) < 1e-4 * expected for value in shown), (expected, shown)

    picture = Path(os.environ.get("PRUNE_LAB_SCREENSHOT", sweep / "comparison.png"))
    page.screenshot(path=picture)
    assert picture.read_bytes().startswith(b"\x89PNG")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
