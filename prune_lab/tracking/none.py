"""tracking=none: summaries in the runs' folders, and an index of finished ones in the cache folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from prune_lab.cache import cache_folder, why_not_kept
from prune_lab.fingerprint import text_sha256
from prune_lab.job_context import JobContext
from prune_lab.results.summary import Summary, read_summary
from prune_lab.tracking.base import Tracker


class _Silent:
    """A RunLog that keeps nothing."""

    def step_metrics(self, step: int, values: dict[str, float]) -> None:
        """No-op."""

    def result(self, summary: Summary, files: list[Path]) -> None:
        """No-op: the files stand in the run's folder."""


@dataclass(frozen=True)
class NoTracking(Tracker):
    """Tracker that does nothing, for tracking=none; finished runs are found by their fingerprint all the same."""

    def _entry(self, name: str, fingerprint: str) -> Path:
        # The experiment's name is the user's text: its hash is safe as a file name.
        return cache_folder() / "finished" / text_sha256(name)[:16] / fingerprint

    @contextmanager
    def start_run(self, name: str, summary: Summary, context: JobContext) -> Iterator[_Silent]:
        """Keeps a copy of the summary in the cache folder when the run finishes."""
        yield _Silent()
        if summary.status == "FINISHED":
            entry = self._entry(name, summary.fingerprint)
            try:
                entry.mkdir(parents=True, exist_ok=True)
                summary.write(entry)
            except OSError as error:  # the result itself is safe in the run's folder
                if why_not_kept() is None:  # a job says once that there is no cache, and goes on without
                    summary.unlogged = f"not kept for the next time ({error}); see PRUNE_LAB_CACHE"

    def find_finished(self, name: str, fingerprint: str) -> Summary | None:
        """Looks the fingerprint up in the cache folder."""
        entry = self._entry(name, fingerprint)
        summary = read_summary(entry)
        if summary is not None:
            summary.reused_from = str(entry)
        return summary

    def enter_again(self, name: str, summary: Summary, context: JobContext) -> None:
        """No-op: the summary in the job's folder is the entry."""

    def open_sweep(self, name: str, folder: Path) -> None:
        """No-op."""

    def close_sweep(self, name: str, folder: Path, status: str, summaries: list[Summary]) -> list[str]:
        """No-op."""
        return []

    def discard_sweep(self, name: str, folder: Path) -> None:
        """No-op."""
