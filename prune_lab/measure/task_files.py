"""Documents of a task in a local file: FOLDER/TASK.jsonl, one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prune_lab.errors import Refused

Row = dict[str, Any]


@dataclass(frozen=True)
class TaskFile:
    """A task's documents in the Hub's columns, each with the line it stands in."""

    path: Path
    rows: list[Row]
    lines: list[int]

    def check_columns(self, needed: set[str]) -> None:
        """Refuses a document that lacks one of the columns that the task's prompts are made of."""
        for line, row in zip(self.lines, self.rows, strict=True):
            if missing := sorted(needed - row.keys()):
                raise Refused(
                    f"{self.path}, line {line}: the column {missing[0]!r} is missing; its columns are "
                    f"{', '.join(sorted(row))}, and the task needs {', '.join(sorted(needed))}"
                )


def read_task_file(task: str, path: Path) -> TaskFile:
    """Reads a task's file; raises Refused, naming the line, where it is damaged.

    Beside the Hub's columns, the layout query, choices, gold is read for the tasks of `_FROM_QUERY`.
    """
    rows: list[Row] = []
    lines: list[int] = []
    for line, text in enumerate(path.read_bytes().split(b"\n"), 1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except ValueError as error:  # broken JSON, or not UTF-8
            raise Refused(f"{path}, line {line} is no JSON ({error}): mend or leave out the line") from error
        if not isinstance(row, dict):
            raise Refused(f"{path}, line {line} is no JSON object: give one document a line, {{column: value}}")
        if row.keys() == {"query", "choices", "gold"} and task in _FROM_QUERY:
            row = _converted(task, row, f"{path}, line {line}")
        rows.append(row)
        lines.append(line)
    if not rows:
        raise Refused(f"{path} holds no document: give one JSON object a line")
    return TaskFile(path, rows, lines)


_PREFIX = "Question: "


def _converted(task: str, row: Row, where: str) -> Row:
    """The Hub's columns of a document in the layout query, choices, gold; its prompt stays letter for letter."""
    query, choices, gold = row["query"], row["choices"], row["gold"]
    if not (isinstance(query, str) and query.startswith(_PREFIX)):
        raise Refused(f"{where}: query={str(query)[:40]!r} does not begin with {_PREFIX!r}")
    convert, most = _FROM_QUERY[task]
    if not (isinstance(choices, list) and 2 <= len(choices) <= most and all(isinstance(c, str) for c in choices)):
        raise Refused(f"{where}: choices={str(choices)[:40]!r} must be a list of 2 to {most} texts")
    if not (type(gold) is int and 0 <= gold < len(choices)):
        raise Refused(f"{where}: gold={gold!r} must be the index of one of its {len(choices)} choices, from 0")
    return convert(query.removeprefix(_PREFIX).removesuffix("\n"), choices, gold)


def _as_arc(question: str, choices: list[str], gold: int) -> Row:
    labels = [chr(ord("A") + index) for index in range(len(choices))]
    return {"question": question, "choices": {"text": choices, "label": labels}, "answerKey": labels[gold]}


def _as_piqa(goal: str, choices: list[str], gold: int) -> Row:
    return {"goal": goal, "sol1": choices[0], "sol2": choices[1], "label": gold}


# Tasks whose prompt "query" holds whole: how to their columns, and how many choices at most.
_FROM_QUERY: dict[str, tuple[Callable[[str, list[str], int], Row], int]] = {
    "arc_easy": (_as_arc, 26),
    "arc_challenge": (_as_arc, 26),
    "piqa": (_as_piqa, 2),
}
