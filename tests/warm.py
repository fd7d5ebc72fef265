"""Command lines in processes of their own that find their imports done: each is forked from one that imported them.

`python -m prune_lab` spends most of a small run on importing torch, transformers and mlflow. What is forked has memory,
signals, a process group, a folder, an environment, standard streams and an exit code of its own, as any process has.
Where the environment would have been read while importing, the process is started anew.
"""

from __future__ import annotations

import atexit
import functools
import gc
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parent.parent
BEGAN_WITH = dict(os.environ)  # the environment in which the tests were started
LEFT = dict[str, str]()  # what modules that a test imported have set in it since
PRELOADED = (
    "torch", "transformers.modeling_utils", "transformers.models.auto.modeling_auto", "datasets", "matplotlib.pyplot",
    "mlflow.store.tracking.sqlalchemy_store", "mlflow.artifacts", "prune_lab.job", "prune_lab.runner",
    "prune_lab.tracking.mlflow_store", "prune_lab.recovery.train", "prune_lab.models.build",
)  # fmt: skip
# Names that are read when they are needed. Others, like those of the Hub's client, are read while importing.
READ_LATE = {
    "MLFLOW_TRACKING_URI", "PRUNE_LAB_CACHE", "PYTEST_CURRENT_TEST", "TMPDIR", "COVERAGE_PROCESS_START",
    "DO_NOT_TRACK", "HYDRA_FULL_ERROR", "MLFLOW_DISABLE_TELEMETRY", "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES",
}  # fmt: skip


class Running:
    """A command line under way, the leader of a process group."""

    def __init__(self, pid: int, ended: Path) -> None:
        self.pid, self._ended = pid, ended

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        with suppress(FileNotFoundError, ValueError):  # not there, or being written
            return int(self._ended.read_text())
        return None

    def wait(self, timeout: float) -> int | None:
        """Its exit code; None where it still runs after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None and time.monotonic() < deadline:
            time.sleep(0.005)
        return code

    def send_signal(self, number: int) -> None:
        """To it alone."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """Ends it, if it has not ended."""
        if self.poll() is None:
            self.send_signal(signal.SIGKILL)
            self.wait(60)


class Nursery:
    """The process that has imported what a run needs, and forks."""

    def __init__(self) -> None:
        self._place = tempfile.TemporaryDirectory()
        self.always = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HOME": f"{self._place.name}/hub"}
        self.environment = {**BEGAN_WITH, **self.always}
        command, pipe = [sys.executable, __file__, self._place.name], subprocess.PIPE
        self._process = subprocess.Popen(command, env=self.environment, stdin=pipe, stdout=pipe, text=True)

    def fork(self, module: str, arguments: list[str], folder: Path, env: dict[str, str], files: list[Path]) -> Running:
        """`python -m module arguments` with its standard output and error in files."""
        assert self._process.stdin
        assert self._process.stdout
        asked = [[module, *arguments], str(folder), env, [str(file) for file in files]]
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        pid = int(self._process.stdout.readline())
        return Running(pid, Path(self._place.name) / f"{pid}")

    def close(self) -> None:
        """Ends it."""
        self._process.kill()
        self._process.communicate()
        self._place.cleanup()


@functools.cache
def nursery() -> Nursery:
    """Started by the first who needs it, and shared by all tests of this process."""
    started = Nursery()
    atexit.register(started.close)
    return started


def note_what_imports_left() -> None:
    """Notes down what is set between two tests: lm_eval, joblib and MLflow, for instance, set what they read.

    A command line does not inherit it: it would have to be started anew each time, which takes seconds.
    """
    LEFT.clear()
    changed = {name: value for name, value in os.environ.items() if BEGAN_WITH.get(name) != value}
    LEFT.update({name: value for name, value in changed.items() if name not in READ_LATE})


def environment_of(**changes: str | None) -> dict[str, str]:
    """That of the tests with the package and no Hub, changed; None takes a name away."""
    own = {name: value for name, value in os.environ.items() if LEFT.get(name) != value}
    as_begun = {name: BEGAN_WITH[name] for name in LEFT.keys() - own.keys() if name in BEGAN_WITH}
    env: dict[str, str | None] = {**own, **as_begun, **nursery().always, **changes}
    return {name: value for name, value in env.items() if value is not None}


def start_module(
    module: str, arguments: list[str], folder: Path, files: list[Path], **environment: str | None
) -> Running:
    """Starts `python -m module arguments` in a folder, with its standard output and error in files."""
    return nursery().fork(module, arguments, folder, environment_of(**environment), files)


def run_module(
    module: str, arguments: list[str], folder: Path, **environment: str | None
) -> subprocess.CompletedProcess[str]:
    """Runs `python -m module arguments` in a folder to its end."""
    command, env = [sys.executable, "-m", module, *arguments], environment_of(**environment)
    if {name for name, _ in env.items() ^ nursery().environment.items()} - READ_LATE:
        return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    with tempfile.TemporaryDirectory() as place:
        files = [Path(place) / name for name in ("stdout", "stderr")]
        code = nursery().fork(module, arguments, folder, env, files).wait(timeout=600)
        assert code is not None, f"{command} did not end"
        return subprocess.CompletedProcess(command, code, *(file.read_text("utf-8") for file in files))


@functools.cache
def _empty_store() -> Path:
    place = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    made = run_module("mlflow", ["db", "upgrade", f"sqlite:///{place}/mlflow.db"], place, MLFLOW_TRACKING_URI=None)
    assert made.returncode == 0, made.stderr
    return place / "mlflow.db"


def give_store(folder: Path) -> None:
    """Puts an empty store, which MLflow itself has made, where the default one is: making each anew takes seconds."""
    shutil.copy(_empty_store(), folder / "mlflow.db")


def serve(place: Path, set_by_imports: dict[str, str]) -> None:
    """Forks for each line of the standard input and notes down how each ended. What is forked returns from here."""
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake)
    rest = b""
    while True:
        ready, _, _ = select.select([0, woken], [], [])
        if woken in ready:
            os.read(woken, 1024)
            with suppress(ChildProcessError):
                while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                    note = place / f"{ended[0]}"
                    (place / "note").write_text(str(os.waitstatus_to_exitcode(ended[1])))
                    (place / "note").rename(note)
        if 0 in ready:
            read = os.read(0, 65536)
            if not read:
                sys.exit()
            *lines, rest = (rest + read).split(b"\n")
            for line in lines:
                pid = os.fork()
                if pid == 0:
                    signal.set_wakeup_fd(-1)
                    for number in (signal.SIGCHLD, signal.SIGHUP, signal.SIGTERM):
                        signal.signal(number, signal.SIG_DFL)
                    signal.signal(signal.SIGINT, signal.default_int_handler)
                    os.close(woken)
                    os.close(wake)
                    return become(set_by_imports, *json.loads(line))
                sys.stdout.write(f"{pid}\n")
                sys.stdout.flush()


def become(
    set_by_imports: dict[str, str], arguments: list[str], folder: str, env: dict[str, str], files: list[str]
) -> None:
    """Takes over a command line: its arguments, its folder, its environment, and the files of its output.

    set_by_imports: what importing a module sets in the environment where it is not set, as it would do again.
    """
    os.setsid()
    for stream, file in enumerate([os.devnull, *files]):
        opened = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, stream)
        os.close(opened)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update({**set_by_imports, **env})
    tempfile.tempdir = None
    sys.path[0] = folder  # as python -m has it
    sys.argv = arguments


def leave(code: int) -> None:
    """Ends this process as Python would, with its threads and exit functions, but for taking each module apart.

    That takes two seconds: all memory that is shared with the process it was forked from would be copied to be freed.
    """
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    import importlib
    import runpy

    before = dict(os.environ)
    for name in PRELOADED:
        with suppress(ModuleNotFoundError):  # a run without tracking needs no mlflow
            importlib.import_module(name)
    gc.freeze()  # what is shared stays so: a collection would write to all of it
    serve(Path(sys.argv[1]), {name: value for name, value in os.environ.items() if name not in before})
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:  # any other way of ending is left to Python
        if end.code is not None and not isinstance(end.code, int):
            raise
        leave(end.code or 0)
    leave(0)
