"""The measure group: what is measured, and how long."""

from __future__ import annotations

from dataclasses import dataclass

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
    aa: bool = False

    def __post_init__(self) -> None:
        for name, least in (
            ("batch_size", 1), ("max_windows", 1), ("pairs", MIN_PAIRS), ("warmup", 1), ("prompt_tokens", 1),
            ("decode_tokens", 1),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value} must be at least {least}")
        if not self.latency and self.aa:
            raise ValueError("aa=true needs latency=true: nothing else is timed against itself")
