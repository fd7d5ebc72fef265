"""The measure group: what is measured, and how long."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from prune_lab.measure.accelerate import CHOICES
from prune_lab.measure.beginnings import BEGINNINGS
from prune_lab.measure.continuations import LEAST
from prune_lab.measure.engine import ENGINES
from prune_lab.system.files import as_path

MIN_PAIRS = 10


@dataclass(frozen=True)
class Measure:
    """A measure option. Quality and size are always measured, the rest when asked for.

    batch_size: windows of a forward pass of the perplexity, and texts of one of the tasks.
    max_windows: the first so many windows of the test split; None: all.
    kl_windows: the first so many of these, on which the dense model runs beside the compressed one; None: all, 0: none.
    generation_prompts: how many of the BEGINNINGS both models continue greedily, the first so many; 0: none.
    generation_tokens: tokens put after each, at least LEAST, fewer in a short context.
    latency: prefill and decode, timed in `pairs` of dense and compressed, at least MIN_PAIRS, after `warmup` pairs that
    do not count, on a prompt of `prompt_tokens` with `decode_tokens` after it: the sizes of memory and energy too.
    batch_sizes, lengths: prompts that are timed beside that one, each number of rows with each number of tokens.
    memory: the peak of loading and inference. energy: joules per decoded token, where a counter can be read.
    aa: the dense model timed against a copy of itself. accelerate: how models are made ready to be timed, of CHOICES.
    engine: the program that runs the exported model too, one of ENGINES. engine_windows: the first so many windows on
    which its perplexity is measured; None: all, 0: none. engine_repack: llama.cpp may lay weights of few bits out anew
    for the processor, as it does by itself.
    tasks: names of lm-eval's tasks. task_path: a folder of TASK.jsonl, used for the tasks found there; None: the Hub.
    task_limit: documents of each, the first so many. task_shots: examples before each question.
    """

    batch_size: int = 8
    max_windows: int | None = None
    kl_windows: int | None = 32
    generation_prompts: int = 8
    generation_tokens: int = 64
    latency: bool = True
    pairs: int = 20
    warmup: int = 3
    prompt_tokens: int = 256
    decode_tokens: int = 16
    batch_sizes: tuple[int, ...] = (1,)
    lengths: tuple[int, ...] = ()
    memory: bool = True
    aa: bool = False
    accelerate: str = "none"
    energy: bool = False
    engine: str = "none"
    engine_windows: int | None = 32
    engine_repack: bool = True
    tasks: tuple[str, ...] = ()
    task_path: str | None = None
    task_limit: int | None = None
    task_shots: int = 0

    def __post_init__(self) -> None:
        for name in ("batch_sizes", "lengths", "tasks"):  # tuples: the evaluator of a sweep is found again by its parts
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name, least in (
            ("batch_size", 1), ("max_windows", 1), ("kl_windows", 0), ("pairs", MIN_PAIRS), ("warmup", 1),
            ("prompt_tokens", 1), ("decode_tokens", 1), ("task_limit", 1), ("task_shots", 0), ("generation_prompts", 0),
            ("generation_tokens", LEAST), ("engine_windows", 0),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value} must be at least {least}")
        if self.generation_prompts > len(BEGINNINGS):
            raise ValueError(f"generation_prompts={self.generation_prompts} must be at most {len(BEGINNINGS)}")
        if twice := [name for name, count in Counter(self.tasks).items() if count > 1]:
            raise ValueError(f"tasks={list(self.tasks)} names {twice[0]} twice: name each task once")
        if self.task_path is not None and not as_path(self.task_path).is_dir():
            raise ValueError(f"task_path={self.task_path!r} is no folder: give a folder of TASK.jsonl files, or null")
        if not self.batch_sizes:
            raise ValueError("batch_sizes=[] must hold at least one batch size, such as [1]")
        for name in ("batch_sizes", "lengths"):
            values = getattr(self, name)
            if any(value < 1 for value in values) or len(set(values)) < len(values):
                raise ValueError(f"{name}={list(values)} must be different whole numbers of at least 1")
        if self.accelerate not in CHOICES:
            raise ValueError(f"accelerate={self.accelerate!r} is not one of {', '.join(CHOICES)}")
        if self.engine not in ENGINES:
            raise ValueError(f"engine={self.engine!r} is not one of {', '.join(ENGINES)}")
        if not self.latency and self.accelerate != "none":
            raise ValueError(f"accelerate={self.accelerate!r} needs latency=true: it is for what is timed")
        if not self.latency and self.aa:
            raise ValueError("aa=true needs latency=true: nothing else is timed against itself")
        if not self.latency and self.energy:
            raise ValueError("energy=true needs latency=true: it is taken of the work that is timed")
        if not self.latency and self.has_grid:
            raise ValueError("batch_sizes and lengths need latency=true; leave them at [1] and [] without it")

    @property
    def has_grid(self) -> bool:
        """True where other batches or lengths are timed than the headline's one prompt of `prompt_tokens`."""
        return self.batch_sizes != (1,) or bool(self.lengths)
