"""The two calls from Python, for notebooks and scripts: what `prune_lab.compress` and `prune_lab.run` do.

The process is somebody else's: its Hydra, random numbers, logging, warnings, environment and working folder are as they
were when a call returns or raises.
"""

from __future__ import annotations

import copy
import logging
import os
import random
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from prune_lab import explain, job, out_of_memory
from prune_lab.compatibility import check_found_layout, check_parts, pruning_events
from prune_lab.config import in_python
from prune_lab.config.parts import Parts, build_parts, plain
from prune_lab.errors import Refused
from prune_lab.evaluator import calibrator_of, check_length
from prune_lab.models.anatomy import Anatomy, check_matrices
from prune_lab.models.auto_class import auto_class
from prune_lab.models.contents import check_finite, count_nonzero, count_weights
from prune_lab.models.families import check_type, context_of, needs_bos
from prune_lab.pruning.pruned import LayerRow
from prune_lab.results.summary import Summary
from prune_lab.sweeps.sweep import place_of_job
from prune_lab.system import device as devices
from prune_lab.system.console import Console
from prune_lab.system.device import Device
from prune_lab.text.bos import resolve_bos
from prune_lab.text.calibration_windows import draw_windows
from prune_lab.text.corpus import Corpus, Documents
from prune_lab.text.source import Calibration
from prune_lab.text.splits import SPLITS, by_position
from prune_lab.text.stdlib import Stdlib
from prune_lab.text.text_files import TextFiles
from prune_lab.text.tokens import Tokens
from prune_lab.text.unsplit import UnsplitCorpus

NAME = "the model"  # what a model in memory is called in refusals
_LOUD = logging.CRITICAL


@dataclass(frozen=True)
class Report:
    """Report of a pruning: fractions of the pruned scope, weights of the whole model (a tied matrix once), seconds.

    layers: what was removed from each matrix. metrics: figures of the method, by name. calibration: the stamp of its
    text, as in summary.json; None for a method that looks at none. overrides: the same on a command line. files: those
    that the method leaves in the folder of a run, such as sensitivity.md, by name.
    """

    amount: float
    removed: float
    parameters_before: int
    parameters: int
    nonzero: int
    seconds: float
    overrides: tuple[str, ...]
    layers: tuple[LayerRow, ...] = field(repr=False)
    metrics: dict[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    calibration: dict[str, Any] | None = field(default=None, repr=False)
    files: dict[str, bytes] = field(default_factory=dict, repr=False)

    def __str__(self) -> str:
        lines = [
            f"removed {self.removed:.4f} of the pruned scope ({self.amount:g} requested) in {self.seconds:.1f} s",
            f"parameters {self.parameters_before:,} -> {self.parameters:,}, not zero {self.nonzero:,}",
        ]
        return "\n".join([*lines, *(f"note: {warning}" for warning in self.warnings)])


class Compression(NamedTuple):
    """A pruned model and the report of its pruning."""

    model: Any
    report: Report


def run(overrides: Sequence[str], recipe: str | None, recipes: str | Path | None) -> Summary:
    """One run, by overrides; see `prune_lab.run`."""
    if isinstance(overrides, str) or not isinstance(overrides, Iterable):
        raise Refused(f"overrides={overrides!r}: give a list, one override each")
    with _as_it_was(), in_python.own_hydra():
        config = in_python.composed([str(word) for word in overrides], recipe, recipes)
        task, hydra = in_python.without_hydra(config)
        context = place_of_job(hydra)
        context.folder.mkdir(parents=True, exist_ok=True)
        with _logged(context.folder / f"{hydra.job.name}.log"):
            summary = job.perform(lambda: build_parts(task), plain(task), context)
    if summary.unlogged is not None:
        explain.to_stderr(f"finished, but {summary.unlogged}")
    return summary


def compress(
    model: Any,
    tokenizer: Any,
    method: str | Mapping[str, Any],
    amount: float | None,
    text: Any,
    seed: int,
    calibration: Mapping[str, Any],
    in_place: bool,
    quiet: bool,
    keys: Mapping[str, Any],
) -> Compression:
    """A pruned model and the report; see `prune_lab.compress`."""
    words = _words(method, amount, seed, calibration, keys)
    with _as_it_was(), in_python.own_hydra():
        # Nothing is measured here: what has to be able to be measured is no reason to refuse a model.
        config = in_python.composed([*words, "measure=quality_only", "tracking=none"])
        task, hydra = in_python.without_hydra(config)
        choices = place_of_job(hydra).choices
        parts = build_parts(task)
        check_parts(parts, choices)
        with out_of_memory.explained(plain(task)):
            return _compressed(model, tokenizer, text, parts, choices, in_place, Console(quiet), tuple(words))


def _words(
    method: str | Mapping[str, Any],
    amount: float | None,
    seed: int,
    calibration: Mapping[str, Any],
    keys: Mapping[str, Any],
) -> list[str]:
    """The overrides of a call."""
    of_method = dict(method) if isinstance(method, Mapping) else {"name": method}
    if "name" not in of_method:
        raise Refused(f"method={method!r} has no name: give {{'name': 'structured', ...}}")
    if not isinstance(calibration, Mapping):
        raise Refused(f"calibration is a {type(calibration).__name__}: give a dictionary, such as {{'n_samples': 32}}")
    if others := [key for key in [*of_method, *calibration] if not isinstance(key, str)]:
        raise Refused(f"{others[0]!r}: keys are names of settings, such as 'score'")
    if not isinstance(of_method["name"], str):
        raise Refused(
            f"method is a {type(of_method['name']).__name__}: give the name of a method, such as 'structured', or a "
            "dictionary with a name"
        )
    if both := of_method.keys() & keys.keys():
        raise Refused(f"{', '.join(sorted(both))}: given twice, in method and as a keyword")
    words = [in_python.as_words("method", of_method.pop("name"))]
    given = {"amount": amount} if amount is not None else {}
    given |= {"seed": seed}
    given |= {f"method.{key}": value for key, value in (of_method | dict(keys)).items()}
    given |= {f"dataset.calibration.{key}": value for key, value in calibration.items()}
    return words + [in_python.as_words(key, value) for key, value in given.items()]


def _compressed(
    model: Any,
    tokenizer: Any,
    text: Any,
    parts: Parts,
    choices: Mapping[str, str],
    in_place: bool,
    console: Console,
    words: tuple[str, ...],
) -> Compression:
    began, seed = time.perf_counter(), parts.settings.seed
    _check_model(model)
    amounts = [event.amount for event in pruning_events(parts)[0]]
    parts.method.check(model.config, amounts)
    device, was_training = _device_of(model), {name for name, module in model.named_modules() if module.training}
    devices.seed_all(seed)
    own = model if in_place else copy.deepcopy(model)
    trained = {name: parameter.requires_grad for name, parameter in own.named_parameters()}
    own.eval().requires_grad_(True)  # scores may be of gradients
    own.zero_grad(set_to_none=True)  # those of a training would be added to them, and have the shapes of before
    try:
        check_matrices(own)
        check_finite(own, NAME)
        anatomy = Anatomy(own)
        if anatomy.found is not None:
            checkpointing = bool(getattr(own, "supports_gradient_checkpointing", False))
            check_found_layout(parts, choices, own.config.model_type, anatomy.found, checkpointing)
        parts.method.check_model(anatomy, amounts)
        before, calibrator, stamp = count_weights(own), None, None
        if parts.method.calibrated:
            calibrator, stamp = _calibrator(own, tokenizer, text, parts.dataset.calibration, seed, device, console)
        pruned = parts.method.prune(anatomy, amounts[-1], seed, calibrator)
    finally:
        for name, module in own.named_modules():
            module.training = name in was_training
        for name, parameter in own.named_parameters():
            parameter.requires_grad_(trained.get(name, any(trained.values())))
    report = Report(
        amount=amounts[-1], removed=pruned.realized, parameters_before=before, parameters=count_weights(own),
        nonzero=count_nonzero(own), seconds=time.perf_counter() - began, overrides=words, layers=tuple(pruned.rows),
        metrics=dict(pruned.metrics), warnings=tuple(pruned.warnings), calibration=stamp,
        files=dict(pruned.files),
    )  # fmt: skip
    return Compression(own, report)


def _check_model(model: Any) -> None:
    """Raises Refused for what is no language model of transformers in memory, in floats."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise Refused(
            f"model is a {type(model).__name__}: give a model of transformers, such as "
            "AutoModelForCausalLM.from_pretrained(...); of an adapter, merged into its model"
        )
    if not model.can_generate():
        raise Refused(
            f"model is a {type(model).__name__}, which has no output layer for text: give the language model, such as "
            "AutoModelForCausalLM.from_pretrained(...)"
        )
    check_type(model.config.model_type)
    auto_class(model.config)
    if getattr(model.config, "quantization_config", None) is not None:
        raise Refused("model has quantized weights already: give the model that it was made from")
    places = {parameter.device for parameter in model.parameters()}
    if len(places) > 1 or any(place.type == "meta" for place in places):
        raise Refused(
            f"model is on {', '.join(sorted(map(str, places)))}: give one whose weights are in memory, on one device"
        )


def _device_of(model: Any) -> Device:
    return Device(devices.numbered(model.device), model.dtype)


def _calibrator(
    model: Any, tokenizer: Any, text: Any, asked: Calibration, seed: int, device: Device, console: Console
) -> tuple[Any, dict[str, Any]]:
    """Calibration windows of the text, as a run with dataset.calibration.source=text would have it."""
    if not hasattr(tokenizer, "bos_token_id") or not callable(tokenizer):
        raise Refused(f"tokenizer is a {type(tokenizer).__name__}: give the model's, such as AutoTokenizer's")
    family = model.config.model_type
    bos = resolve_bos("auto", family, needs_bos(family), tokenizer)
    check_length("dataset.calibration.seq_len", asked.seq_len, context_of(model.config), bos)
    corpus = _corpus(text).for_tokenizer(tokenizer)
    tokens = Tokens(corpus, tokenizer, console, model.config.get_text_config().vocab_size)
    named = [tokens] if isinstance(corpus, UnsplitCorpus) else [None]
    if asked.source != "own":
        raise Refused(f"calibration={{'source': {asked.source!r}}}: give the text itself, text=...")
    drawn = draw_windows(asked, tokens, [*named], torch.empty(0, dtype=torch.int64), seed)
    calibrator, stamp = calibrator_of(model, drawn, asked, seed, bos, device)
    return replace(calibrator, console=console), stamp


def _corpus(text: Any) -> Corpus:
    """The calibration text that was given; None: the included one, of which the calibration split is used."""
    if text is None:
        return Stdlib().corpus()
    if isinstance(text, Path):
        return TextFiles(path=str(text)).unsplit("text")
    if isinstance(text, str) and text.strip():
        train, calibration, validation, test = (tuple(by_position(text)[split]) for split in SPLITS)
        return UnsplitCorpus("text", Documents("text", train, calibration, validation, test, is_cut=True))
    if isinstance(text, list | tuple) and all(isinstance(one, str) for one in text) and any(map(str.strip, text)):
        documents = tuple(one for one in text if one.strip())
        return UnsplitCorpus("text", Documents("text", (), documents, (), ()))
    raise Refused(
        f"text is {'without any text' if isinstance(text, str | list | tuple) else f'a {type(text).__name__}'}: give "
        "a list of documents (str), one document (str), a pathlib.Path of files, or None for the included text"
    )


@contextmanager
def _logged(path: Path) -> Iterator[None]:
    """Context in which what this package logs goes to a file, as on the command line."""
    logger, handler = logging.getLogger("prune_lab"), logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # the terminal is the console's
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()
        logger.setLevel(level)
        logger.propagate = propagate


@contextmanager
def _as_it_was() -> Iterator[None]:
    """Context whose end puts back what of the process a run changes, but for what lies in its caches."""
    from transformers.utils import logging as of_transformers

    bars = of_transformers.is_progress_bar_enabled()
    here, environment, threads = Path.cwd(), dict(os.environ), torch.get_num_threads()
    numbers, of_torch = random.getstate(), torch.get_rng_state()
    of_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None
    of_numpy = sys.modules["numpy"].random.get_state() if "numpy" in sys.modules else None
    levels = _levels()
    try:
        with warnings.catch_warnings(), _own_switches():
            yield
    finally:
        random.setstate(numbers)
        torch.set_rng_state(of_torch)
        if of_gpus is not None:
            torch.cuda.set_rng_state_all(of_gpus)
        if gpu is not None:
            torch.cuda.set_device(gpu)
        if of_numpy is not None:
            sys.modules["numpy"].random.set_state(of_numpy)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
        os.chdir(here)
        for name, level in _levels().items():
            if name in levels:
                logging.getLogger(name).setLevel(levels[name])
            elif level == _LOUD:  # of a library that came with the run, and which is told to be silent in it
                logging.getLogger(name).setLevel(logging.NOTSET)
        if bars:
            of_transformers.enable_progress_bar()


@contextmanager
def _own_switches() -> Iterator[None]:
    """Context in which PyTorch computes as on a command line, whatever contexts of its own the caller is within."""
    kinds = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    # An autocast keeps its casts of weights until the outermost one ends: in a training they would be of weights before
    # their steps.
    around = torch.autocast_increment_nesting()
    for _ in range(around):
        torch.autocast_decrement_nesting()
    try:
        for kind in kinds:
            torch.set_autocast_enabled(kind, False)
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for kind in kinds:
            torch.set_autocast_enabled(kind, True)
        for _ in range(around - 1):
            torch.autocast_increment_nesting()


def _levels() -> dict[str, int]:
    """Levels of all loggers by name."""
    loggers = logging.root.manager.loggerDict.items()
    return {name: logger.level for name, logger in loggers if isinstance(logger, logging.Logger)}
