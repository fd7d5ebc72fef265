"""The measure group: what is measured, and how long."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

MIN_PAIRS = 10


@dataclass(frozen=True)
class Measure:
    """A measure option. Quality and size are always measured; latency and memory when asked for."""

    batch_size: int = 8
    max_windows: int | None = None
    latency: bool = True
    pairs: int = 20
    warmup: int = 3
    prompt_tokens: int = 256
    decode_tokens: int = 16
    memory: bool = True
    tasks: tuple[str, ...] = ()
    task_path: str | None = None
    task_limit: int | None = None
    task_shots: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", tuple(self.tasks))
        for name, least in (
            ("batch_size", 1), ("max_windows", 1), ("pairs", MIN_PAIRS), ("warmup", 1), ("prompt_tokens", 1),
            ("decode_tokens", 1), ("task_limit", 1), ("task_shots", 0),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value} must be at least {least}")
        if twice := [name for name, count in Counter(self.tasks).items() if count > 1]:
            raise ValueError(f"tasks={list(self.tasks)} names {twice[0]} twice: name each task once")
        if self.task_path is not None and not Path(self.task_path).expanduser().is_dir():
            raise ValueError(f"task_path={self.task_path!r} is no folder: give a folder of TASK.jsonl files, or null")
