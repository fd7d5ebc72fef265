"""GGUF files in llama.cpp: perplexity, peak memory, and times in pairs.

It runs in processes of its own (llama_cpp_process.py): where it crashes the run fails with what it said, and its log
stays out of the terminal.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prune_lab.errors import Refused
from prune_lab.measure.memory import EXACT_ALLOCATOR
from prune_lab.measure.settings import Measure
from prune_lab.measure.size import MB
from prune_lab.measure.speed import Latency, Paired
from prune_lab.system.console import Console
from prune_lab.system.files import owner_suffix

_PLAIN = {"GGML_NO_BACKTRACE": "1"}  # an abort says its reason last
# Threads that wait for each other sleep: on a machine with other work they else take several times as long. What is
# timed is as llama.cpp has it by itself.
_PATIENT = {"OMP_WAIT_POLICY": "PASSIVE"}
_OF_CRASHES = (
    ". Builds for processors with AMX were seen to crash with files of q8_0 and q4_0: try measure.engine_repack=false, "
    "which llama.cpp's programs call --no-repack"
)
_SAID = 700  # characters of a log's end in a message


class LlamaCpp:
    """Models that a process of llama.cpp holds; `ask` calls a method of Model in llama_cpp_process.py."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self._process, self._log = process, log

    def ask(self, model: int, do: str, **arguments: Any) -> Any:
        """Reply to a request about the model of a number; raises RuntimeError where the process ends instead."""
        return self.send({"model": model, "do": do, **arguments})

    def send(self, request: dict[str, Any]) -> Any:
        """Reply to a request of the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            reply = self._process.stdout.readline()
        except BrokenPipeError:
            reply = ""
        if not reply.endswith("\n"):
            code = self._process.wait()
            how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
            said = self._log.read_text(encoding="utf-8", errors="replace").strip()[-_SAID:]
            hint = _OF_CRASHES if code == -signal.SIGSEGV else ""
            raise RuntimeError(f"llama.cpp failed: its process {how}, and said last: {said or 'nothing'}{hint}")
        return json.loads(reply)


@contextmanager
def process(**environment: str) -> Iterator[LlamaCpp]:
    """A process of llama.cpp with no models yet; it ends with the context, however that ends."""
    with tempfile.TemporaryDirectory(suffix=owner_suffix()) as place:
        log = Path(place) / "log"
        with (
            log.open("wb") as said,
            subprocess.Popen(
                [sys.executable, "-m", "prune_lab.measure.llama_cpp_process"], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=said, text=True, encoding="utf-8", env=os.environ | _PLAIN | environment,
            ) as started,
        ):  # fmt: skip
            assert started.stdin is not None
            try:
                yield LlamaCpp(started, log)
            finally:
                started.kill()
                with suppress(BrokenPipeError):  # a request that it did not live to read
                    started.stdin.close()


@contextmanager
def loaded(files: list[Path], context: int, exact: bool, repack: bool = True) -> Iterator[LlamaCpp]:
    """A process of llama.cpp that has loaded files, with PyTorch's number of threads.

    context, exact, repack: as of Model in llama_cpp_process.py.
    """
    settings = {"context": context, "threads": torch.get_num_threads(), "exact": exact, "repack": repack}
    with process(**(_PATIENT if exact else {})) as started:
        started.send({"files": [str(file.absolute()) for file in files], "settings": settings})
        yield started


@cache
def build() -> str:
    """llama.cpp's own words on what of the processor it was built for; raises Refused where it does not start."""
    try:
        with process() as started:
            return str(started.send({"files": [], "settings": {}}))
    except RuntimeError as error:
        raise Refused(
            f"measure.engine=llama_cpp: {error}. Install the package again (docs/exports.md), or give "
            "measure.engine=none"
        ) from error


def mean_loss(file: Path, windows: Tensor, prefix: int, console: Console, repack: bool = True) -> float:
    """Mean cross-entropy of the tokens of windows, shape (windows, prefix + tokens), in nats, as perplexity has it."""
    found = list[float]()
    what = "perplexity in llama.cpp"
    with (
        loaded([file], windows.shape[1], exact=True, repack=repack) as llama,
        console.progress(windows.numel(), what, unit="tok") as bar,
    ):
        for window in windows.tolist():
            found += llama.ask(0, "losses", ids=window, prefix=prefix)
            bar.update(len(window))
    return sum(found) / len(found)


def peak_mb(file: Path, prompt: Tensor, settings: Measure, console: Console) -> float:
    """Peak memory in MB by which loading a file, a prefill of `prompt`, shape (1, tokens), and a decode raise it."""
    console.note("measuring memory of llama.cpp in a fresh process")
    asked = {
        "file": str(file.absolute()), "ids": prompt[0].tolist(), "tokens": settings.decode_tokens,
        "threads": torch.get_num_threads(), "repack": settings.engine_repack,
    }  # fmt: skip
    with process(**EXACT_ALLOCATOR, **_PATIENT) as llama:
        return float(llama.send({"peak": asked})) / MB


def measure_pairs(files: list[Path], prompt: Tensor, settings: Measure, console: Console) -> Latency:
    """Times of the files of the dense and of the compressed model on `prompt`, shape (1, tokens), in one process.

    In pairs whose order alternates, after warm-up pairs, as in speed.py.
    """
    ids, taken = prompt[0].tolist(), list[list[tuple[float, float]]]()
    pairs = settings.warmup + settings.pairs
    with (
        loaded(files, len(ids) + settings.decode_tokens, exact=False, repack=settings.engine_repack) as llama,
        console.progress(pairs, "latency in llama.cpp", unit="pair") as bar,
    ):
        for pair in range(pairs):
            both = dict[int, tuple[float, float]]()
            for model in (0, 1) if pair % 2 == 0 else (1, 0):
                reply = llama.ask(model, "timed", ids=ids, tokens=settings.decode_tokens)
                both[model] = reply["prefill_ms"], reply["decode_ms"]
            taken.append([both[0], both[1]])
            bar.update()
    times = torch.tensor(taken[settings.warmup :], dtype=torch.float64)  # pair, model, stage
    return Latency(*(Paired(times[:, 0, stage], times[:, 1, stage]) for stage in (0, 1)))
