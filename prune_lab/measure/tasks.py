"""Scores of tasks by lm-eval, taken on the live model."""

from __future__ import annotations

import copy
from typing import Any

from prune_lab.measure.task_setup import SEED, ReadyTask, by_itself
from prune_lab.system.console import Console
from prune_lab.text.bos import NO_BOS, Bos, begin_with_bos

Scores = dict[str, float]
Answers = str  # "1" for each document that is answered rightly, in order, and "0" for the others


def measure_tasks(
    model: Any, tokenizer: Any, tasks: tuple[ReadyTask, ...], batch_size: int, console: Console, bos: Bos = NO_BOS
) -> tuple[dict[str, Scores], dict[str, Answers]]:
    """lm-eval's scores of each task: acc, acc_stderr, acc_norm ... as the task has them, n, and truncated; and answers.

    n is the number of documents scored; truncated, of how many of them the model's context held the end alone (left
    out where it held all). Answers are by the task's main metric, of tasks in which an answer is right or wrong. The
    same model gets the same scores: lm-eval draws with seeds of its own. With a `bos` each text begins with it; without
    one, as the tokenizer has it.
    """
    scores, answers = {}, {}
    for task in tasks:
        with console.progress(None, task.name, unit="batch") as bar, by_itself():
            own = copy.deepcopy(tokenizer)
            if bos.id is not None:
                begin_with_bos(own)
            scores[task.name], right = _score(_Watched(model, bar), own, task, batch_size)
            if right is not None:
                answers[task.name] = right
    return scores, answers


class _Watched:
    """The model as lm-eval sees it. No module, or lm-eval would tie weights again that pruning may have untied."""

    def __init__(self, model: Any, bar: Any) -> None:
        self._model, self._bar = model, bar

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self._bar.update()
        return self._model(*arguments, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def _score(model: _Watched, tokenizer: Any, ready: ReadyTask, batch_size: int) -> tuple[Scores, Answers | None]:
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    lm: Any = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, backend="causal")
    ready.task.set_fewshot_seed(SEED)
    results: Any = evaluate(lm, {"tasks": {ready.name: ready.task}}, limit=ready.stamp["limit"], log_samples=True)
    scores = _by_metric(results["results"][ready.name])
    scores["n"] = float(results["n-samples"][ready.name]["effective"])
    if cut := _truncated(lm, ready.task.instances):
        scores["truncated"] = float(cut)
    return scores, _answers(results["samples"][ready.name], str(ready.stamp["metric"]))


def _answers(samples: list[dict[str, Any]], metric: str) -> Answers | None:
    """Answers by a metric, of the filter that `_by_metric` has first; None where it is more than right or wrong."""
    import numpy  # which lm-eval needs too

    first = samples[0]["filter"]
    ordered = sorted((sample for sample in samples if sample["filter"] == first), key=lambda sample: sample["doc_id"])
    values = [sample.get(metric) for sample in ordered]
    if not all(isinstance(value, int | float | numpy.number | numpy.bool_) and value in (0, 1) for value in values):
        return None
    return "".join("1" if value else "0" for value in values)


def _by_metric(found: dict[str, Any]) -> Scores:
    """{"acc,none": 0.5, "acc_stderr,none": 0.1} as {"acc": 0.5, "acc_stderr": 0.1}.

    Where a task filters the answers in several ways, the first goes by the metric's name and the others add theirs.
    """
    scores, first = {}, None
    for key, value in found.items():
        name, comma, filtered = key.partition(",")
        if not comma or not isinstance(value, int | float):  # alias, sample_len; "N/A" where there is no error bar
            continue
        first = first or filtered
        metric = name.removesuffix("_stderr")
        by = "" if filtered == first else f"_{filtered}"
        scores[metric + by + name.removeprefix(metric)] = float(value)
    return scores


def _truncated(lm: Any, instances: list[Any]) -> int:
    """Documents with a prompt and answer longer than the model's context, of which lm-eval drops the beginning."""
    cut = set()
    for instance in instances:
        if instance.request_type == "loglikelihood_rolling":  # scored window by window
            continue
        text = "".join(part for part in instance.args if isinstance(part, str))
        if len(text.encode()) > lm.max_length and len(lm.tok_encode(text)) > lm.max_length + 1:
            cut.add(instance.doc_id)
    return len(cut)
