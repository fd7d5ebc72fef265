"""Tracker: the interface for runs and sweeps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from prune_lab.errors import Refused
from prune_lab.job_context import JobContext
from prune_lab.results.summary import Summary


class Unreachable(Refused):
    """The store cannot be reached, or cannot be used as it is."""


class RunLog(Protocol):
    """The record of a run that is going on."""

    def step_metrics(self, step: int, values: dict[str, float]) -> None:
        """Logs figures of a training step."""

    def result(self, summary: Summary, files: list[Path]) -> None:
        """Logs what came out: metrics, artifacts, and a tag that names what diverged."""


class Tracker(ABC):
    """A tracking option. `name` is the experiment throughout."""

    @abstractmethod
    def start_run(self, name: str, summary: Summary, context: JobContext) -> AbstractContextManager[RunLog]:
        """Opens the record of a run; it ends FINISHED, FAILED or KILLED, whatever happens inside.

        A record that the store did not take is said in summary.unlogged; it does not end the run.
        """

    @abstractmethod
    def find_finished(self, name: str, fingerprint: str) -> Summary | None:
        """The summary of the finished run with this fingerprint, or None. Raises Unreachable."""

    @abstractmethod
    def enter_again(self, name: str, summary: Summary, context: JobContext) -> None:
        """Enters a finished run's result into the comparison of the sweep that asked for it again."""

    @abstractmethod
    def open_sweep(self, name: str, folder: Path) -> None:
        """Opens the record of a sweep, before its first job."""

    @abstractmethod
    def close_sweep(self, name: str, folder: Path, status: str, summaries: list[Summary]) -> list[str]:
        """Closes it with its files and dense figures; returns lines that tell how to look at it."""

    @abstractmethod
    def discard_sweep(self, name: str, folder: Path) -> None:
        """Takes back the record of a sweep that was refused before its first job."""
