"""Task scores by the real lm-eval against naive loops, on a small model and local files; and every refusal."""

from __future__ import annotations

import json
import math
import random
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from conftest import CPU, Cli
from datasets import Dataset
from hub_server import Hub

from prune_lab.errors import Refused
from prune_lab.evaluator import open_evaluator
from prune_lab.fingerprint import fingerprint
from prune_lab.measure import task_names
from prune_lab.measure.settings import Measure
from prune_lab.measure.task_files import read_task_file
from prune_lab.measure.task_setup import prepare_tasks
from prune_lab.measure.tasks import _answers, measure_tasks
from prune_lab.models.load import HubModel, Loaded
from prune_lab.results.metrics import dense_figures
from prune_lab.results.run_warnings import of_figures
from prune_lab.system.console import Console
from prune_lab.text.text_files import TextFiles

QUIET = Console(quiet=True)
Row = dict[str, Any]
WORDS = ["cat", "dog", "bird", "fish", "sees", "likes", "finds", "thing", "the", "our", "one", "a"]


def arc_rows(count: int = 12, seed: int = 0, words: tuple[int, int] = (1, 6)) -> list[Row]:
    """Documents in the columns of allenai/ai2_arc, with choices of very different lengths, which decide by default."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        texts = [" ".join(draw.choices(WORDS, k=draw.randint(*words))) + f" {i}" for i in range(4)]
        choices = {"text": texts, "label": list("ABCD")}
        rows.append(
            {
                "id": f"q{number}",
                "question": f"Which is {number}?",
                "choices": choices,
                "answerKey": draw.choice("ABCD"),
            }
        )
    return rows


def write(folder: Path, task: str, rows: list[Row]) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"{task}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder with documents of arc_easy and piqa."""
    write(tmp_path / "tasks", "arc_easy", arc_rows())
    goals = [
        {"goal": f"Find a {word}.", "sol1": f"the {word} sees", "sol2": "one fish finds it", "label": len(word) % 2}
        for word in WORDS
    ]
    write(tmp_path / "tasks", "piqa", goals)
    return tmp_path / "tasks"


def settings(folder: Path, *names: str, **options: Any) -> Measure:
    return Measure(tasks=names or ("arc_easy",), task_path=str(folder), **options)


def score(loaded: Loaded, measure: Measure) -> dict[str, dict[str, float]]:
    return measure_tasks(loaded.model, loaded.tokenizer, prepare_tasks(measure), measure.batch_size, QUIET)[0]


@torch.no_grad()
def log_probability(loaded: Loaded, context: str, continuation: str) -> float:
    """Of the continuation after the context: one sequence, one token after the other."""
    before, whole = (loaded.tokenizer(text)["input_ids"] for text in (context, context + continuation))
    logits = loaded.model(input_ids=torch.tensor([whole])).logits[0].double().log_softmax(-1)
    return sum(float(logits[at - 1, whole[at]]) for at in range(len(before), len(whole)))


def naive(loaded: Loaded, questions: list[tuple[str, list[str], int]]) -> dict[str, float]:
    """acc: the likeliest choice is right; acc_norm: the likeliest for its length; each with its standard error."""
    right, right_norm = answered(loaded, questions)
    found = {}
    for name, values in (("acc", right), ("acc_norm", right_norm)):
        found[name] = statistics.mean(values)
        found[f"{name}_stderr"] = statistics.stdev(values) / math.sqrt(len(values))
    return found | {"n": len(questions)}


def answered(loaded: Loaded, questions: list[tuple[str, list[str], int]]) -> tuple[list[float], list[float]]:
    """1 for each question whose likeliest choice is right, else 0; and the same for the likeliest for its length."""
    right, right_norm = [], []
    for question, choices, gold in questions:
        sums = [log_probability(loaded, f"Question: {question}\nAnswer:", f" {choice}") for choice in choices]
        by_length = [total / len(choice) for total, choice in zip(sums, choices, strict=True)]
        right.append(float(sums.index(max(sums)) == gold))
        right_norm.append(float(by_length.index(max(by_length)) == gold))
    return right, right_norm


def arc_questions(rows: list[Row]) -> list[tuple[str, list[str], int]]:
    return [(row["question"], row["choices"]["text"], "ABCD".index(row["answerKey"])) for row in rows]


@pytest.mark.parametrize("batch_size", [1, 5])
def test_the_scores_are_those_of_a_naive_loop(loaded: Loaded, tmp_path: Path, batch_size: int) -> None:
    rows = arc_rows(30)
    write(tmp_path / "tasks", "arc_easy", rows)
    expected = naive(loaded, arc_questions(rows))
    assert 0 < expected["acc"] < 1
    assert expected["acc"] != expected["acc_norm"]  # else one could pass for the other
    found = score(loaded, settings(tmp_path / "tasks", batch_size=batch_size))
    assert found == {"arc_easy": pytest.approx(expected)}


def test_the_live_model_is_scored(loaded: Loaded, tasks: Path) -> None:
    """With the weights that it has now, and with what lm-eval would not find: a head untied against the config."""
    before = score(loaded, settings(tasks))
    assert loaded.model.config.tie_word_embeddings
    head = torch.nn.Parameter(torch.randn(300, 32, generator=torch.Generator().manual_seed(3)))
    loaded.model.lm_head.weight = head
    after = score(loaded, settings(tasks))
    assert loaded.model.lm_head.weight is head
    assert after == {"arc_easy": pytest.approx(naive(loaded, arc_questions(arc_rows())))}
    assert after != before


def test_answers_are_right_or_wrong_document_by_document(loaded: Loaded, tasks: Path) -> None:
    """In the order of the documents, whatever order they are scored in; of those that the limit leaves."""
    right = "".join(f"{value:.0f}" for value in answered(loaded, arc_questions(arc_rows()))[0])
    assert {"0", "1"} == set(right)
    for limit in (None, 7):
        ready = prepare_tasks(settings(tasks, task_limit=limit))
        assert measure_tasks(loaded.model, loaded.tokenizer, ready, 5, QUIET)[1] == {"arc_easy": right[:limit]}


def test_answers_go_by_the_first_filter_and_are_right_or_wrong() -> None:
    """Scores between 0 and 1, and those that are lists for an aggregate, are no answers."""

    def samples(*values: Any) -> list[dict[str, Any]]:
        return [
            {"doc_id": number, "filter": by, "exact_match": value if by == "strict" else 1.0}
            for by in ("strict", "flexible")
            for number, value in reversed(list(enumerate(values)))
        ]

    assert _answers(samples(1.0, 0, True, numpy.bool_(False), numpy.float32(1)), "exact_match") == "10101"
    for other in (0.5, None, (1, 0), [1.0, 0.0], "1", numpy.ones(2), math.nan):
        assert _answers(samples(1.0, other), "exact_match") is None
    assert _answers(samples(1.0), "acc") is None


def test_several_tasks_and_a_limit(loaded: Loaded, tasks: Path) -> None:
    found = score(loaded, settings(tasks, "piqa", "arc_easy", task_limit=7))
    assert list(found) == ["piqa", "arc_easy"]
    goals = [json.loads(line) for line in (tasks / "piqa.jsonl").read_text().splitlines()][:7]
    assert found["piqa"] == pytest.approx(
        naive(loaded, [(row["goal"], [row["sol1"], row["sol2"]], row["label"]) for row in goals])
    )
    assert found["arc_easy"] == pytest.approx(naive(loaded, arc_questions(arc_rows()[:7])))


def test_one_document_has_no_standard_error(loaded: Loaded, tasks: Path) -> None:
    assert set(score(loaded, settings(tasks, task_limit=1))["arc_easy"]) == {"acc", "acc_norm", "n"}


def test_few_shot_examples_are_other_documents_and_always_the_same(loaded: Loaded, tasks: Path) -> None:
    (ready,) = prepare_tasks(settings(tasks, task_shots=2))
    seen = []
    for _ in range(2):
        measure_tasks(loaded.model, loaded.tokenizer, (ready,), 4, QUIET)
        seen.append([instance.args for instance in ready.task.instances])
    assert seen[0] == seen[1]
    right = {row["question"]: row["choices"]["text"]["ABCD".index(row["answerKey"])] for row in arc_rows()}
    for context, _ in seen[0]:
        *examples, asked = [part.removeprefix("Question: ") for part in context.split("\n\n")]
        shown = dict(example.split("\nAnswer: ") for example in examples)
        assert len(shown) == 2
        assert shown.items() <= right.items()
        assert asked.removesuffix("\nAnswer:") not in shown
    assert ready.stamp["shots"] == 2


def test_another_metric_goes_by_its_name(loaded: Loaded, tmp_path: Path) -> None:
    """wikitext: the perplexity by word of a whole page, of which the first token follows the end-of-text token."""
    page = "the cat sees thing A. a dog likes thing B."
    write(tmp_path / "tasks", "wikitext", [{"page": page}])
    (ready,) = prepare_tasks(settings(tmp_path / "tasks", "wikitext"))
    assert ready.stamp["metric"] == "word_perplexity"
    scores, answers = measure_tasks(loaded.model, loaded.tokenizer, (ready,), 4, QUIET)
    found = scores["wikitext"]
    ids = [loaded.tokenizer.eos_token_id, *loaded.tokenizer(page)["input_ids"]]
    with torch.no_grad():
        logits = loaded.model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    total = sum(float(logits[at - 1, ids[at]]) for at in range(1, len(ids)))
    assert found["word_perplexity"] == pytest.approx(math.exp(-total / len(page.split())), rel=1e-4)
    assert "acc" not in found
    assert answers == {}  # no document is right or wrong


def test_documents_longer_than_the_context_are_counted_and_said(loaded: Loaded, tmp_path: Path) -> None:
    rows = arc_rows(5)
    rows[3]["question"] = "the cat sees thing A0. " * 100
    write(tmp_path / "tasks", "arc_easy", rows)
    scores = score(loaded, settings(tmp_path / "tasks"))["arc_easy"]
    assert scores["truncated"] == 1
    metrics = dict.fromkeys((f"params/{name}" for name in ("total", "nonzero", "dense_total", "dense_nonzero")), 1.0)
    metrics |= {"params/physical_reduction": 0.0, "tasks/arc_easy_truncated": 1.0}
    assert any("arc_easy: 1 documents are longer" in note for note in of_figures(metrics))


def test_scoring_leaves_no_trace(loaded: Loaded, tasks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not in the generators that a later training draws from, not in the tokenizer, not in the terminal."""
    loaded.tokenizer.pad_token = None
    drawn = []
    for scored in (False, True):
        random.seed(5)
        numpy.random.seed(5)
        torch.manual_seed(5)
        if scored:
            score(loaded, settings(tasks, task_shots=1))
        drawn.append((random.random(), float(numpy.random.rand()), float(torch.rand(1))))
    assert drawn[0] == drawn[1]
    assert loaded.tokenizer.pad_token is None
    assert capsys.readouterr() == ("", "")


def test_the_layout_query_choices_gold_gives_the_same_documents(tmp_path: Path) -> None:
    arc, gold = arc_rows(4), "ABCD"
    queries = [
        {"query": f"Question: {r['question']}", "choices": r["choices"]["text"], "gold": gold.index(r["answerKey"])}
        for r in arc
    ]
    converted = read_task_file("arc_easy", write(tmp_path / "a", "arc_easy", queries)).rows
    assert converted == [{key: value for key, value in row.items() if key != "id"} for row in arc]
    piqa = [{"query": "Question: Open a jar.\n", "choices": ["Twist.", "Sing."], "gold": 0}]
    (row,) = read_task_file("piqa", write(tmp_path / "a", "piqa", piqa)).rows
    assert row == {"goal": "Open a jar.", "sol1": "Twist.", "sol2": "Sing.", "label": 0}


# The command line.


def summary_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


@pytest.fixture
def hub() -> Iterator[Hub]:
    served = Hub({})
    yield served
    served.close()


def test_dense_and_compressed_side_by_side_and_nobody_is_asked(
    small: list[str], tasks: Path, cli: Cli, loaded: Loaded, hub: Hub, tmp_path: Path
) -> None:
    """A Hub could be reached, and is not."""
    rows = arc_rows(40, words=(3, 3))
    write(tasks, "arc_easy", rows)
    asked = ["measure.tasks=[arc_easy,piqa]", f"measure.task_path={tasks}", "method=structured"]
    asked += ["method.score=l2", "method.refit=none", "amount=0.9", "export=hf"]
    away = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")}
    done = cli(*small, "tracking=none", *asked, "hydra.run.dir=here", **away)
    assert (done.returncode, done.stderr) == (0, "")
    assert hub.requests == []
    summary = summary_of(tmp_path / "here")
    metrics = summary["metrics"]
    for task, scores in score(loaded, settings(tasks, "arc_easy", "piqa")).items():
        for name, value in scores.items():
            assert metrics[f"tasks/dense_{task}_{name}"] == pytest.approx(value), name
            assert f"tasks/dense_{task}_{name}" in dense_figures(metrics)
            assert f"tasks/{task}_{name}" not in dense_figures(metrics)
            assert f"tasks/{task}_{name}" in metrics
    exported = HubModel(name=str(tmp_path / "here/export")).load(CPU, seed=0)
    expected = naive(exported, arc_questions(rows))
    assert {name: metrics[f"tasks/arc_easy_{name}"] for name in expected} == pytest.approx(expected)
    assert any(value != metrics[f"tasks/dense_arc_easy_{name}"] for name, value in expected.items())
    dense, compressed = (answered(of, arc_questions(rows))[0] for of in (loaded, exported))
    flipped = statistics.mean(a != b for a, b in zip(dense, compressed, strict=True))
    assert metrics["tasks/arc_easy_flips"] == pytest.approx(flipped)
    assert flipped > abs(statistics.mean(dense) - statistics.mean(compressed))  # some each way
    assert f"{flipped:.1%} flipped" in done.stdout
    for task, count in (("arc_easy", 40), ("piqa", 12)):
        (line,) = (line for line in done.stdout.splitlines() if f"{task}, acc of {count}" in line)
        for prefix in ("dense_", ""):
            value, error = (metrics[f"tasks/{prefix}{task}_acc{suffix}"] for suffix in ("", "_stderr"))
            assert f"{value:.4f} ± {error:.4f}" in line
    assert [task["task"] for task in summary["protocol"]["tasks"]] == ["arc_easy", "piqa"]


@pytest.mark.slow
@pytest.mark.process
def test_what_is_in_no_folder_comes_from_the_hub(small: list[str], cli: Cli, tasks: Path, tmp_path: Path) -> None:
    """baber/piqa as lm-eval asks for it: it evaluates the validation split. Once fetched, it is there offline."""
    (tasks / "piqa.jsonl").unlink()
    data = tmp_path / "repository/data"
    data.mkdir(parents=True)
    for split, count in (("train", 3), ("validation", 5)):
        rows = [{"goal": f"Find {i}.", "sol1": "the cat", "sol2": "a dog", "label": i % 2} for i in range(count)]
        Dataset.from_list(rows).to_parquet(data / f"{split}-00000-of-00001.parquet")
    served = Hub({"datasets/baber/piqa": tmp_path / "repository"})
    away = {"HF_ENDPOINT": served.url, "HF_HOME": str(tmp_path / "hf")}
    asked = [*small, "tracking=none", "measure.tasks=[piqa,arc_easy]", f"measure.task_path={tasks}", "resume=false",
             "measure=quality_only", "measure.max_windows=4"]  # fmt: skip
    online = cli(*asked, "hydra.run.dir=online", HF_HUB_OFFLINE="0", **away)
    served.close()
    assert (online.returncode, online.stderr) == (0, "")
    offline = cli(*asked, "hydra.run.dir=offline", HF_HUB_OFFLINE="1", **away)
    assert (offline.returncode, offline.stderr) == (0, "")
    first, second = (summary_of(tmp_path / place) for place in ("online", "offline"))
    assert first["metrics"]["tasks/piqa_n"] == 5
    assert first["protocol"]["tasks"] == second["protocol"]["tasks"]
    assert [task["source"] for task in first["protocol"]["tasks"]] == ["baber/piqa", "local file"]


def test_a_sweep_measures_the_dense_tasks_once(
    folder: Path, corpus: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stands in the sweep's folder is what later jobs take, also those in another process."""
    measure = settings(tasks, max_windows=4, memory=False, prompt_tokens=16, decode_tokens=2)
    parts = HubModel(name=str(folder)), TextFiles(path=str(corpus), seq_len=32), measure, CPU, 0, QUIET
    first = open_evaluator(*parts).baseline(tmp_path, QUIET)
    (stored,) = tmp_path.glob("baseline-*.json")
    values = json.loads(stored.read_text())
    assert values["tasks"] == first.tasks
    values["tasks"]["arc_easy"]["acc"] = 0.123
    stored.write_text(json.dumps(values))
    monkeypatch.setattr("prune_lab.evaluator._open", {})  # as in another process
    assert open_evaluator(*parts).baseline(tmp_path, QUIET).tasks["arc_easy"]["acc"] == 0.123


def test_a_run_with_other_tasks_is_another_run(tasks: Path, tmp_path: Path) -> None:
    def stamp(measure: Measure) -> str:
        config = {"measure": {"task_path": measure.task_path}}
        protocol = {"task_path": measure.task_path, "tasks": [task.stamp for task in prepare_tasks(measure)]}
        return fingerprint(config, protocol, {})

    plain = stamp(settings(tasks))
    others = [settings(tasks, task_limit=3), settings(tasks, task_shots=1), settings(tasks, "piqa")]
    moved = write(tmp_path / "moved", "arc_easy", arc_rows()).parent
    changed = write(tmp_path / "changed", "arc_easy", arc_rows(seed=1)).parent
    assert stamp(settings(moved)) == plain
    assert len({plain, *map(stamp, others), stamp(settings(changed))}) == 5


# Refusals.

Damage = Callable[[list[str]], list[str]]


def replaced(line: int, text: str) -> Damage:
    return lambda lines: [*lines[: line - 1], text, *lines[line:]]


def changed(line: int, **values: Any) -> Damage:
    return lambda lines: replaced(line, json.dumps(json.loads(lines[line - 1]) | values))(lines)


def without(line: int, column: str) -> Damage:
    def damage(lines: list[str]) -> list[str]:
        row = json.loads(lines[line - 1])
        del row[column]
        return replaced(line, json.dumps(row))(lines)

    return damage


DAMAGED: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "broken JSON": (replaced(3, '{"question": "tw'), ("line 3", "no JSON")),
    "not UTF-8": (replaced(2, "\udcff\udcfe"), ("line 2", "no JSON")),
    "a list": (replaced(4, "[1, 2]"), ("line 4", "no JSON object")),
    "empty": (lambda lines: [], ("holds no document",)),
    "blank": (lambda lines: ["", "  "], ("holds no document",)),
    "a column is missing": (without(5, "answerKey"), ("line 5", "'answerKey' is missing", "question")),
    "a document without choices": (changed(6, choices={"text": [], "label": []}), ("line 6",)),
    "an answer of no choice": (changed(7, answerKey="E"), ("line 7",)),
    "a query without its beginning": (
        replaced(1, '{"query": "What?", "choices": ["a", "b"], "gold": 0}'),
        ("line 1", "query='What?'", "'Question: '"),
    ),
    "a gold of no choice": (
        replaced(2, '{"query": "Question: What?", "choices": ["a", "b"], "gold": 2}'),
        ("line 2", "gold=2", "2 choices"),
    ),
    "choices that are no list": (
        replaced(2, '{"query": "Question: What?", "choices": "ab", "gold": 0}'),
        ("line 2", "choices='ab'"),
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_refused_with_its_line(name: str, tasks: Path) -> None:
    damage, parts = DAMAGED[name]
    path = tasks / "arc_easy.jsonl"
    lines = damage(path.read_text().splitlines())
    path.write_bytes("\n".join(lines).encode(errors="surrogateescape"))
    with pytest.raises(Refused) as refused:
        prepare_tasks(settings(tasks))
    assert len(str(refused.value)) < 400 + len(str(path))
    for part in (str(path), *parts):
        assert part in str(refused.value)


def test_an_answer_outside_the_choices_is_refused(tasks: Path) -> None:
    rows = [json.loads(line) for line in (tasks / "piqa.jsonl").read_text().splitlines()]
    rows[1]["label"] = 2
    write(tasks, "piqa", rows)
    with pytest.raises(Refused, match=r"line 2: its answer 2 is not one of its 2 choices"):
        prepare_tasks(settings(tasks, "piqa"))


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ("measure.tasks=[arc_easyy]", ("measure.tasks", "'arc_easyy'", "arc_easy")),
        ("measure.tasks=[mmlu]", ("'mmlu'", "of a group or tag")),
        ("measure.tasks=[/etc/passwd]", ("'/etc/passwd'", "close ones: none")),
        ("measure.tasks=[piqa,piqa]", ("measure.tasks", "piqa twice")),
        ("measure.tasks=[piqa] measure.task_path=nowhere", ("measure.task_path='nowhere'", "no folder")),
        ("measure.tasks=[piqa] measure.task_limit=0", ("measure.task_limit=0", "at least 1")),
        ("measure.tasks=[piqa] measure.task_shots=-1", ("measure.task_shots=-1", "at least 0")),
        ("measure.tasks=[piqa]", ("piqa needs baber/piqa from the Hub", "HF_HUB_OFFLINE", "measure.task_path=FOLDER")),
        ("measure.tasks=[humaneval]", ("humaneval", "code")),
    ],
)
def test_what_cannot_be_scored_is_refused(overrides: str, parts: tuple[str, ...], cli: Cli, small: list[str]) -> None:
    """The Hub's cache is empty."""
    done = cli(*small, "tracking=none", *overrides.split())
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert len(done.stderr) <= 400
    for part in parts:
        assert part in done.stderr


def test_without_lm_eval_it_is_said_how_to_get_it(tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as where it is not installed
    task_names._yaml_files.cache_clear()
    with pytest.raises(Refused, match=r'pip install "prune-lab\[tasks\]"'):
        prepare_tasks(settings(tasks))
    assert prepare_tasks(Measure()) == ()  # who asks for no task needs no lm-eval
