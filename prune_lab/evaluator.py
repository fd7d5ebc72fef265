"""The dense model, its text and its figures: what the runs of a sweep share."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prune_lab.cache import cache_folder
from prune_lab.dense_cache import DenseCache
from prune_lab.errors import Refused
from prune_lab.export.base import Export
from prune_lab.export.hf import HuggingFace
from prune_lab.fingerprint import baseline_key
from prune_lab.measure.continuations import Continuation
from prune_lab.measure.dense_states import DenseStates, can_keep_states
from prune_lab.measure.divergence import POSITIONS, Divergence, perplexity_of, ratio_interval
from prune_lab.measure.engine import stamp_of
from prune_lab.measure.generation import Prompts, continue_prompts, prepare_prompts, samples_of
from prune_lab.measure.macs import Macs, count_macs
from prune_lab.measure.measurements import Measurements, continuations_from
from prune_lab.measure.memory import measure_memory
from prune_lab.measure.perplexity import in_whole_batches, measure_beside, measure_losses, quality_of
from prune_lab.measure.prompts import PromptShape, cut_grid, cut_headline
from prune_lab.measure.routing import SameExperts
from prune_lab.measure.settings import Measure
from prune_lab.measure.size import measure_size
from prune_lab.measure.task_setup import ReadyTask, prepare_tasks
from prune_lab.measure.tasks import measure_tasks
from prune_lab.models.anatomy import Anatomy
from prune_lab.models.export import save_dense
from prune_lab.models.families import context_of, needs_bos
from prune_lab.models.load import Loaded, ModelSource
from prune_lab.models.offload.on_disk import own_copy
from prune_lab.pruning.calibration import Calibrator
from prune_lab.results.samples import Sample
from prune_lab.results.summary import write_json
from prune_lab.system.console import Console
from prune_lab.system.device import Device, uses_bfloat16
from prune_lab.system.files import owner_suffix, state_of
from prune_lab.system.lock import locked
from prune_lab.system.world import World
from prune_lab.text.bos import Bos, resolve_bos
from prune_lab.text.calibration_corpus import calibration_corpora, calibration_files
from prune_lab.text.calibration_windows import draw_windows
from prune_lab.text.corpus import Corpus
from prune_lab.text.source import Calibration, TextSource
from prune_lab.text.tokens import JOIN, Tokens, sha256


class Evaluator:
    """The dense model on its device and the tokenised text; measures models by one protocol.

    world: the processes that have an evaluator each and share calibration and test windows out. All of them call
    `measure_quality`, and `dense_losses` before it; what else is measured is the main one's alone.
    """

    def __init__(
        self,
        model: ModelSource,
        text: TextSource,
        measure: Measure,
        device: Device,
        seed: int,
        console: Console,
        world: World | None = None,
    ) -> None:
        self.device, self.measure, self.seq_len, self._world = device, measure, text.seq_len, world or World()
        self._losses_of_dense: Tensor | None = None
        self._baseline: Measurements | None = None
        self._calibration: Calibration = text.calibration
        self._calibrators: dict[int, tuple[Calibrator, dict[str, Any]]] = {}
        self._tasks: tuple[ReadyTask, ...] = prepare_tasks(measure)
        corpus = text.corpus()
        self.dense: Loaded = model.load(device, seed)
        self.context: int | None = context_of(self.dense.model.config)
        needed = needs_bos(self.dense.family)
        self.bos: Bos = resolve_bos(text.add_bos, self.dense.family, needed, self.dense.tokenizer)
        self._check_length("dataset.seq_len", text.seq_len)
        self.tokens = self._tokens(corpus, console)
        self.windows = self.tokens.windows("test", text.seq_len)[: measure.max_windows]
        stream = self.tokens.stream("test")
        room = None if self.context is None else self.context - self.bos.length
        self.prompt: Tensor = self.bos.before(cut_headline(stream, measure, room))
        grid = cut_grid(stream, measure, room)
        self.prompts: Prompts | None = prepare_prompts(measure, self.dense, self.bos, self.context)
        self.grid: dict[PromptShape, Tensor] = {shape: self.bos.before(prompt) for shape, prompt in grid.items()}

    def _tokens(self, corpus: Corpus, console: Console) -> Tokens:
        """A text as tokens of the model's tokenizer."""
        return Tokens(corpus, self.dense.tokenizer, console, self.dense.model.config.get_text_config().vocab_size)

    def _check_length(self, key: str, seq_len: int) -> None:
        check_length(key, seq_len, self.context, self.bos)

    @property
    def compared(self) -> int:
        """Number of test windows on which the dense model runs beside the compressed one."""
        asked = self.measure.kl_windows
        return len(self.windows) if asked is None else min(asked, len(self.windows))

    @property
    def processes(self) -> int:
        """Number of processes that share the test windows out."""
        return self._world.over(len(self.windows)).size

    @property
    def windows_of_engine(self) -> Tensor:
        """Test windows on which an engine's perplexity is measured, as `windows`."""
        return self.windows[: self.measure.engine_windows]

    @cached_property
    def protocol(self) -> dict[str, Any]:
        """Protocol stamp: all that figures depend on beside the model. Runs with other stamps must not be compared."""
        return {
            "dataset": self.tokens.corpus.name,
            "dataset_facts": self.tokens.corpus.stamp,
            "test_tokens_sha256": sha256(self.windows),
            "seq_len": self.seq_len,
            "windows": len(self.windows),
            "join": JOIN,
            "divergence": POSITIONS.format(windows=self.compared) if self.compared else None,
            "generation": self.prompts.stamp if self.prompts is not None else None,
            "bos": self.bos.stamp,  # `seq_len` and `prompt_tokens` are without it
            "calibration": None,  # of a run whose method looks at any: see `calibrator`
            "training": None,  # of a run that trains: see `training_text`
            "dtype": self.device.dtype_name,
            "device": str(self.device.torch_device),
            "prompt_tokens": self.prompt.shape[1] - self.bos.length,
            **asdict(self.measure),
            "engine": stamp_of(self.measure.engine, len(self.windows_of_engine)),
            "tasks": [task.stamp for task in self._tasks],
        }

    @cached_property
    def hashes(self) -> dict[str, str]:
        """sha256 of weights, config, tokenizer and text, and of what an export has from the model beside them."""
        return self.dense.fingerprint() | {
            "text": self.tokens.corpus.fingerprint(),
            "carried": self.dense.carried_sha256(),
        }

    @cached_property
    def dense_cache(self) -> DenseCache:
        """Results about the dense model, computed once for all its copies."""
        return DenseCache(self.dense.model, self.hashes, self.device)

    @cached_property
    def dense_states(self) -> DenseStates | None:
        """Last states of the dense model on the windows that are compared; None where it runs beside each model."""
        windows = self.windows[: in_whole_batches(self.compared, self.measure.batch_size)]
        if not self.compared or self.processes > 1 or not can_keep_states(self.dense.model, windows):
            return None
        of = (self.dense.model, windows, self.measure.batch_size, self.device, self.bos)
        return DenseStates(*of, self.dense_cache)

    def calibrator(self, seed: int, console: Console) -> tuple[Calibrator, dict[str, Any]]:
        """The calibration windows of a seed, and their stamp: source, sizes, propagation, where each window begins.

        Raises Refused where the model's context or the text is too short.
        """
        if seed not in self._calibrators:
            asked = self._calibration
            self._check_length("dataset.calibration.seq_len", asked.seq_len)
            corpora = calibration_corpora(asked, self.tokens.corpus, self.dense.tokenizer)
            parts = [None if corpus is None else self._tokens(corpus, console) for corpus in corpora]
            drawn = draw_windows(asked, self.tokens, parts, self.windows.flatten(), seed)
            self._calibrators[seed] = calibrator_of(self.dense.model, drawn, asked, seed, self.bos, self.device)
        calibrator, stamp = self._calibrators[seed]
        return replace(calibrator, console=console, world=self._world), stamp

    def training_text(self, steps: int, batch_size: int) -> dict[str, Any]:
        """The stamp of a training: tokens of its text, and how often it passes over them."""
        tokens = len(self.tokens.enough("train", self.seq_len))
        return {"tokens": tokens, "passes": round(steps * batch_size * self.seq_len / tokens, 4)}

    def copy_of_dense(self, folder: Path) -> Loaded:
        """A copy of the dense model to be pruned; of one on disk, its changed weights will rest in `folder`."""
        return replace(self.dense, model=own_copy(self.dense.model, folder))

    @cached_property
    def macs(self) -> Macs:
        """The dense model's multiply-accumulates per token, among as many tokens as the headline's prompt has."""
        return self.count_macs(self.dense)

    def count_macs(self, loaded: Loaded) -> Macs:
        """A model's multiply-accumulates per token; it must not be post-compressed yet."""
        return count_macs(Anatomy(loaded.model), self.prompt.shape[1])

    def measure_quality(self, loaded: Loaded, console: Console) -> tuple[Tensor, Divergence | None, float | None]:
        """Losses of a model on the test windows, its divergence from the dense one, and the share of same experts."""
        world = self._world.over(self.compared)
        compared = len(world.part(self.windows[: self.compared]))
        same_experts = SameExperts(compared * (self.windows.shape[1] + self.bos.length))
        with same_experts.watching(loaded.model, self.dense.model):
            losses, divergence = measure_beside(
                loaded.model, self.dense.model, self.compared, self.windows, self.measure.batch_size, self.device,
                console, self.bos, self._world, self.dense_states.batches(console) if self.dense_states else None,
            )  # fmt: skip
        same_experts.add_up(world)
        return losses, divergence, same_experts.share

    def evaluate(self, loaded: Loaded, folder: Path, export: Export, console: Console) -> Measurements:
        """Measurements of a model that `export` wrote into `folder`, and its divergence from the dense one."""
        losses, divergence, same_experts = self.measure_quality(loaded, console)
        return replace(
            self._repeatable_measurements(loaded, losses, folder, export, console),
            memory_mb=self._memory(loaded, folder, export, console),
            continuations=continue_prompts(loaded.model, self.prompts, self.device, console),
            divergence=divergence,
            ratio_interval=ratio_interval(self.dense_losses(console), losses),
            first_perplexity=self.first_perplexity(losses),
            same_experts=same_experts,
        )

    def _repeatable_measurements(
        self, loaded: Loaded, losses: Tensor, folder: Path, export: Export, console: Console
    ) -> Measurements:
        """Measurements that are the same each time: quality, by the losses of the test text, size and task scores."""
        quality = quality_of(losses, self.tokens.bytes_per_token("test"))
        size, batch_size = measure_size(loaded.model, export.files(folder)), self.measure.batch_size
        scores, answers = measure_tasks(loaded.model, loaded.tokenizer, self._tasks, batch_size, console, self.bos)
        return Measurements(quality, size, None, scores, answers)

    def _memory(self, loaded: Loaded, folder: Path, export: Export, console: Console) -> float | None:
        if not self.measure.memory:
            return None
        console.note("measuring memory in a fresh process" if not self.device.is_cuda else "measuring memory")
        return measure_memory(loaded.model, folder, export, self.prompt, self.measure, self.device)

    def first_perplexity(self, losses: Tensor) -> float | None:
        """Perplexity of the windows that an engine has, of all losses; None where it has none."""
        first = losses[: len(self.windows_of_engine)]
        return perplexity_of(float(first.double().mean())) if len(first) else None

    def baseline(self, sweep_folder: Path | None, console: Console) -> Measurements:
        """The dense model's figures, once in a process, and once in a sweep whoever runs its jobs.

        Quality, size, task scores and continuations come from the cache of earlier sweeps where they are there; memory
        is measured anew in each sweep, since it is not the same to the last bit, and latency in each run, beside the
        compressed.
        """
        if self._baseline is None:
            if sweep_folder is None:
                self._baseline = self._measure_dense(console)
                return self._baseline
            name = f"baseline-{baseline_key(self.protocol, self.hashes)}"
            stored, lock = sweep_folder / f"{name}.json", cache_folder() / "locks" / f"{sweep_folder.name}-{name}"
            with locked(lock, "exclusive"):
                try:
                    if not stored.exists():
                        write_json(stored, asdict(self._measure_dense(console)))
                finally:
                    lock.unlink(missing_ok=True)
            self._baseline = Measurements.from_dict(json.loads(stored.read_text(encoding="utf-8")))
        return self._baseline

    def _measure_dense(self, console: Console) -> Measurements:
        with tempfile.TemporaryDirectory(suffix=owner_suffix()) as place:
            folder, export = Path(place) / "dense", HuggingFace()
            save_dense(self.dense, folder)

            def lasting() -> dict[str, Any]:
                """Measurements that earlier sweeps may have made."""
                console.note("measuring the dense model")
                losses = self.dense_losses(console)
                return asdict(self._repeatable_measurements(self.dense, losses, folder, export, console))

            of = self.of_windows | {"tasks": self.protocol["tasks"]}
            of["bytes_per_token"] = self.tokens.bytes_per_token("test")
            figures = Measurements.from_dict(self.dense_cache.value("baseline", of, lasting))
            memory = self._memory(self.dense, folder, export, console)
            return replace(figures, memory_mb=memory, continuations=self._dense_continuations(console))

    def _dense_continuations(self, console: Console) -> tuple[Continuation, ...]:
        """The dense model's continuations, from the cache."""
        if self.prompts is None:
            return ()

        def found() -> list[dict[str, Any]]:
            return [asdict(one) for one in continue_prompts(self.dense.model, self.prompts, self.device, console)]

        return continuations_from(self.dense_cache.value("continuations", self.prompts.stamp, found))

    def samples(self, dense: Measurements, compressed: Measurements) -> list[Sample]:
        """Continuations of both models as text; none where no prompts are asked for."""
        return samples_of(self.prompts, self.dense.tokenizer, dense.continuations, compressed.continuations)

    @property
    def of_windows(self) -> dict[str, Any]:
        """Part of the protocol that losses of the test text depend on."""
        return {name: self.protocol[name] for name in ("test_tokens_sha256", "seq_len", "windows", "bos", "batch_size")}

    def dense_losses(self, console: Console) -> Tensor:
        """Loss of the dense model at each target of the test windows, (windows, seq_len - 1), from the cache."""
        if self._losses_of_dense is None:
            self._losses_of_dense = self._find_dense_losses(console)
        return self._losses_of_dense

    def _find_dense_losses(self, console: Console) -> Tensor:
        world = self._world.over(len(self.windows))

        @cache  # asked for twice where the disk keeps none
        def losses() -> list[dict[str, Tensor]]:
            kept, batch_size = self.dense_states, self.measure.batch_size
            first = [] if kept is None else [kept.losses(console)]
            rest = self.windows[0 if kept is None else len(kept.windows) :]
            if len(rest):
                of = (self.dense.model, rest, batch_size, self.device, console, self.bos, world)
                first.append(measure_losses(*of))
            return [{"losses": torch.cat(first)}]

        kind = "token_losses"
        key = self.dense_cache.key(kind, self.of_windows | {"processes": self.processes})
        (part,) = self.dense_cache.parts(key, kind, 1, losses, world)
        return part["losses"].cpu()


def check_length(key: str, seq_len: int, context: int | None, bos: Bos) -> None:
    """Raises Refused where a window of `seq_len` tokens, with its BOS, is longer than a model's context."""
    if context is not None and seq_len + bos.length > context:
        with_bos = " with the BOS token before it (dataset.add_bos)" if bos.length else ""
        raise Refused(f"{key}={seq_len}{with_bos} is above the model's context of {context} tokens")


def calibrator_of(
    model: Any, drawn: tuple[Tensor, dict[str, Any]], asked: Calibration, seed: int, bos: Bos, device: Device
) -> tuple[Calibrator, dict[str, Any]]:
    """Calibrator with the windows that were drawn for a model, and the stamp of it; drawn: by `draw_windows`."""
    windows, text = drawn
    bfloat16 = uses_bfloat16(asked.autocast, device.torch_device)
    found = Anatomy(model).found
    one_by_one = found is None or found.one_by_one
    propagate = asked.propagate if one_by_one else "dense"  # its text passes the whole model at once
    stamp = text | {
        "seq_len": asked.seq_len,
        "propagate": propagate,
        "pass": "blocks one by one" if one_by_one else "the whole model",
        "bfloat16": bfloat16,
        "seed": seed,
    }
    seen, prefix = bos.before(windows), bos.length
    return Calibrator(seen, propagate, asked.batch_size, bfloat16, prefix), stamp


_open: dict[tuple[Any, ...], Evaluator] = {}


def open_evaluator(
    model: ModelSource,
    text: TextSource,
    measure: Measure,
    device: Device,
    seed: int,
    console: Console,
    world: World | None = None,
) -> Evaluator:
    """The evaluator of these parts; the jobs of a sweep in one process get the same one. One is kept at a time."""
    parts = (model, text, measure, device, seed)
    files = [*model.files(), *text.files(), *calibration_files(text.calibration)]
    key = (*parts, state_of(files))  # what is edited while a process runs is read again
    if key not in _open:
        _open.clear()
        _open[key] = Evaluator(*parts, console, world)
    _open[key].tokens.console = console
    return _open[key]
