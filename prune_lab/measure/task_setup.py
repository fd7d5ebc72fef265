"""lm-eval's tasks made ready before any model is loaded: from a local file, or from the Hub."""

from __future__ import annotations

import hashlib
import io
import json
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from prune_lab.errors import Refused
from prune_lab.measure.settings import Measure
from prune_lab.measure.task_files import TaskFile, read_task_file
from prune_lab.measure.task_names import find_definitions
from prune_lab.system.files import as_path, owner_suffix
from prune_lab.system.hub import why_not, why_unreachable
from prune_lab.text.hub_datasets import tell_nobody

SEED = 1234  # of few-shot examples and of whatever a task draws, as in lm-eval


@dataclass(frozen=True)
class ReadyTask:
    """A task with its documents, and its stamp: what its scores depend on beside the model."""

    task: Any
    stamp: dict[str, Any]

    @property
    def name(self) -> str:
        """The task's name."""
        return str(self.stamp["task"])


def prepare_tasks(settings: Measure) -> tuple[ReadyTask, ...]:
    """The tasks of `settings`, ready to be scored.

    Raises Refused, the cheap checks first, where lm-eval is missing or knows no such task, where a local file is
    damaged or lacks columns, and where documents cannot be had from the Hub.
    """
    if not settings.tasks:
        return ()
    definitions = find_definitions(settings.tasks)
    folder = as_path(settings.task_path) if settings.task_path is not None else None
    paths = {name: folder / f"{name}.jsonl" for name in settings.tasks} if folder is not None else {}
    files = {name: read_task_file(name, path) for name, path in paths.items() if path.is_file()}
    return tuple(_prepare(name, definitions[name], files.get(name), settings) for name in settings.tasks)


@contextmanager
def by_itself() -> Iterator[None]:
    """Runs lm-eval with seeds of its own, given back afterwards, and without its bars and prints."""
    import numpy

    python, arrays = random.getstate(), numpy.random.get_state()
    random.seed(SEED)
    numpy.random.seed(SEED)
    silence = io.StringIO()
    try:
        with torch.random.fork_rng(), redirect_stdout(silence), redirect_stderr(silence):
            torch.manual_seed(SEED)
            yield
    finally:
        random.setstate(python)
        numpy.random.set_state(arrays)


def _prepare(name: str, definition: Path, file: TaskFile | None, settings: Measure) -> ReadyTask:
    with tempfile.TemporaryDirectory(suffix=owner_suffix()) as place:
        config = _read_config(name, definition, Path(place))
        _check_safe(name, config)
        changes: dict[str, Any] = {"dataset_kwargs": _without_code(config.get("dataset_kwargs"))}
        if file is not None:
            if "class" in config:
                raise Refused(f"measure.tasks: {name} is a program in lm-eval: {file.path} cannot take its place")
            file.check_columns(_columns(config))
            changes |= _local(config, file, Path(place))
        else:
            _check_hub(name, config)
        task = _load(name, definition, changes, Path(place), file)
    shots = 0 if task.get_config("num_fewshot") == 0 else settings.task_shots  # a task that says 0 means it
    task.set_config("num_fewshot", shots)
    documents = list(task.eval_docs)
    if file is not None:
        _check_documents(task, file, documents)
    stamp = {
        "task": name,
        "version": task.VERSION,
        "lm_eval": version("lm_eval"),
        "metric": _main_metric(task),
        "shots": shots,
        "limit": settings.task_limit,
        "documents": min(len(documents), settings.task_limit or len(documents)),
        "source": "local file" if file is not None else str(config.get("dataset_path")),
        "sha256": hashlib.sha256(file.path.read_bytes()).hexdigest() if file is not None else _sha256(documents),
    }
    return ReadyTask(task, stamp)


def _read_config(name: str, definition: Path, place: Path) -> dict[str, Any]:
    """lm-eval's own configuration of a task, with what it includes; functions as their names."""
    entry = _manager(definition, {}, place).task_index.get(name)
    if entry is None or entry.cfg is None:
        raise Refused(f"measure.tasks: lm-eval cannot read its own task {name!r} ({definition.name})")
    config: dict[str, Any] = entry.cfg
    return config


def _manager(definition: Path, changes: dict[str, Any], place: Path) -> Any:
    """A task manager that knows one task alone, with some keys changed: reading all of lm-eval's would take 8 s."""
    from lm_eval.tasks import TaskManager

    overlay = {"include": str(definition)} | changes
    (place / "task.yaml").write_text(json.dumps(overlay), encoding="utf-8")  # JSON is YAML
    return TaskManager(include_defaults=False, include_path=str(place))


def _check_safe(name: str, config: dict[str, Any]) -> None:
    metrics = [metric for metric in config.get("metric_list") or [] if isinstance(metric, dict)]
    if any(metric.get("hf_evaluate") for metric in metrics):
        raise Refused(f"measure.tasks: {name} takes a metric from the Hub as code, which is not run here")
    if config.get("unsafe_code"):
        raise Refused(f"measure.tasks: {name} runs code that the model writes, which is not done here")
    if config.get("doc_to_image") or config.get("doc_to_audio"):
        raise Refused(f"measure.tasks: {name} needs a model that sees or hears: only text is scored here")


def _without_code(options: dict[str, Any] | None) -> dict[str, Any]:
    """The options of `datasets` without the one that would let a dataset run code of its own."""
    return {key: value for key, value in (options or {}).items() if key != "trust_remote_code"}


def _columns(config: dict[str, Any]) -> set[str]:
    """The columns that a task's templates read; none where a function of lm-eval's makes the documents first."""
    from jinja2 import Environment, meta

    fields = [config.get(key) for key in ("doc_to_text", "doc_to_target", "doc_to_choice")]
    if config.get("process_docs") is not None:
        return set()
    needed: set[str] = set()
    for text in fields:
        if isinstance(text, str) and text.isidentifier():  # a column by its name
            needed.add(text)
        elif isinstance(text, str) and "{" in text:
            needed |= meta.find_undeclared_variables(Environment().parse(text))
    return needed


def _local(config: dict[str, Any], file: TaskFile, place: Path) -> dict[str, Any]:
    """What makes a task read a local file: it scores all documents; few-shot examples are others of the same file."""
    copy = place / "documents.jsonl"
    copy.write_text("".join(json.dumps(row) + "\n" for row in file.rows), encoding="utf-8")
    split = (config.get("fewshot_config") or {}).get(
        "split", "test"
    )  # one name for both keeps a document out of its own
    return {
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {split: str(copy)},
            "cache_dir": str(place / "cache"),
            "keep_in_memory": True,
        },
        "custom_dataset": None,
        "training_split": None,
        "validation_split": None,
        "test_split": split,
        "fewshot_split": split,
    }


def _check_hub(name: str, config: dict[str, Any]) -> None:
    """Refuses documents that are neither in the cache of `datasets` nor to be had from the Hub."""
    import datasets

    dataset = config.get("dataset_path")
    if not isinstance(dataset, str):
        return
    cached = Path(datasets.config.HF_DATASETS_CACHE) / dataset.replace("/", "___")
    if not cached.is_dir() and (reason := why_unreachable()) is not None:
        raise Refused(
            f"measure.tasks: {name} needs {dataset} from the Hub, and {reason}: put {name}.jsonl with its documents "
            "into a folder and give measure.task_path=FOLDER, or give a network"
        )


def _load(name: str, definition: Path, changes: dict[str, Any], place: Path, file: TaskFile | None) -> Any:
    tell_nobody()
    try:
        with by_itself():
            return _manager(definition, changes, place).load([name])["tasks"][name]
    except Exception as error:  # of lm-eval, its templates, `datasets`, the Hub's client
        source = file.path if file is not None else "the Hub"
        raise Refused(f"measure.tasks: {name} cannot be made from {source}: {why_not(name, error)}") from error


def _check_documents(task: Any, file: TaskFile, documents: list[Any]) -> None:
    """Refuses a document of which no prompt can be made or whose answer is none of its choices."""
    lines = file.lines if len(documents) == len(file.lines) else None
    for number, document in enumerate(documents):
        where = f"{file.path}, {f'line {lines[number]}' if lines else f'document {number + 1}'}"
        try:
            task.doc_to_text(document)
            target = task.doc_to_target(document)
            choices = task.doc_to_choice(document) if task.get_config("doc_to_choice") is not None else None
        except Exception as error:  # of the template, or of lm-eval's function
            raise Refused(f"{where}: no prompt can be made of it: {' '.join(str(error).split())[:150]}") from error
        if choices is not None and task.OUTPUT_TYPE == "multiple_choice":
            valid = set(range(len(choices))) | set(choices)
            if any(answer not in valid for answer in (target if isinstance(target, list) else [target])):
                raise Refused(f"{where}: its answer {target!r} is none of its {len(choices)} choices")


def _main_metric(task: Any) -> str:
    metrics = list(task.aggregation())
    return "acc" if "acc" in metrics or not metrics else str(metrics[0])


def _sha256(documents: list[Any]) -> str:
    digest = hashlib.sha256()
    for document in documents:
        digest.update(json.dumps(document, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()
