"""Comparison of a sweep's jobs: results.json, results.md, pareto.png, report.html and the leaderboard."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from rich.box import SIMPLE_HEAD
from rich.table import Table

from prune_lab.report import page
from prune_lab.report.runs import Run, report_of
from prune_lab.results.metrics import ENGINES, formatted, speedup
from prune_lab.results.pareto import Point, dense_points, draw, front
from prune_lab.results.series import pivot, plain, position, shared
from prune_lab.results.summary import RESULTS, Summary, read_summary, write_json
from prune_lab.system.console import Console
from prune_lab.system.files import write_text

LEADERBOARD, PLOT, REPORT = "results.md", "pareto.png", "report.html"
ANSWER = "answer.md"  # what a sweeper that searches leaves; its first line is shown above the leaderboard
# Columns of the leaderboard in the order in which a narrow terminal goes without them; and what is kept for `run`.
_STAGES = ("prefill", "decode")
_IN_ENGINES = tuple(f"{stage} in {title}" for title, _ in ENGINES.values() for stage in _STAGES)
_DISPENSABLE = (
    "non-zero", "x dense", "removed", "peak memory", *_IN_ENGINES, "decode speed-up", "disk MB", "prefill speed-up",
)  # fmt: skip
_LABEL = 24
_COLUMNS = ("params/nonzero", "size/disk_mb", "quality/perplexity")  # of the leaderboard, of dense models too


@dataclass(frozen=True)
class Row:
    """A job of a sweep and its summary."""

    job: str
    summary: Summary


def read_job(folder: Path) -> Row:
    """Job of a folder with its summary; a job that left none was killed."""
    summary = read_summary(folder)
    return Row(folder.name, summary or Summary("KILLED", reason="its process ended without saying so"))


def write(folder: Path, rows: list[Row]) -> None:
    """Writes the sweep's files; the plot and the report only where a job finished."""
    write_json(folder / RESULTS, [{"job": row.job, **asdict(row.summary)} for row in rows])
    write_text(folder / LEADERBOARD, "\n".join([*_answer(folder), _markdown(rows)]))
    points = _points(rows)
    if points:
        draw(points, dense_points(points), folder / PLOT)
        name = f"{folder.parent.name}/{folder.name}"
        page.write(report_of({name: [Run(name, row.job, row.summary) for row in rows]}), folder / REPORT)


def show(folder: Path, rows: list[Row], console: Console) -> None:
    """Prints the leaderboard as far as the terminal is wide, what did not finish, and where the files are."""
    for answer in _answer(folder):
        console.result(answer.splitlines()[0].replace("*", "").replace("`", ""))
    by_series = pivot([(point.position, point.metrics["quality/perplexity"]) for point in _points(rows)])
    if by_series:
        console.result(_table("Perplexity, over seeds the mean and the range", by_series, left=1))
    header, lines = _cells([row for row in rows if row.summary.status == "FINISHED"], rows)
    kept = _fitting([header, *lines], console.width)
    title = f"Leaderboard, by perplexity (* on the size/quality front)   {' '.join(_shared_overrides(rows))}"
    console.result(_table(title, kept, left=2))
    if left_out := [name for name in header if name not in kept[0]]:
        console.result(f"In {LEADERBOARD} too: {', '.join(left_out)}")
    for row in rows:
        if row.summary.status != "FINISHED":
            asked = " ".join(map(_short, row.summary.overrides))
            console.result(f"job {row.job} ({asked})  {row.summary.status}: {row.summary.reason}")
    made = [folder / name for name in (LEADERBOARD, PLOT, REPORT) if (folder / name).exists()]
    console.result("Files: " + "  ".join(map(_shown, made)))


def _answer(folder: Path) -> list[str]:
    """Answer of a sweeper that searches, if one ran."""
    path = folder / ANSWER
    return [path.read_text(encoding="utf-8")] if path.is_file() else []


def _table(title: str, lines: list[list[str]], left: int) -> Table:
    """Table to print; its first line is the header, its first `left` columns are text."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for number, name in enumerate(lines[0]):
        is_label = number == left - 1  # what may be long, and is text with spaces to fold at
        justify: Literal["left", "right"] = "left" if number < left else "right"
        table.add_column(name, justify=justify, overflow="fold", no_wrap=not is_label)
    for cells in lines[1:]:
        table.add_row(*cells)
    return table


def _fitting(table: list[list[str]], width: int) -> list[list[str]]:
    """Table without the columns that a narrow terminal has no room for, the least telling first."""
    names = list(table[0])
    room = {name: 2 + max(len(line[place]) for line in table) for place, name in enumerate(names)}
    room["run"] = min(room["run"], _LABEL)  # it folds
    for name in _DISPENSABLE:
        if sum(room[kept] for kept in names) + 2 <= width:
            break
        if name in names:
            names.remove(name)
    return [[line[table[0].index(name)] for name in names] for line in table]


def _shared_overrides(rows: list[Row]) -> list[str]:
    return shared([row.summary.overrides for row in rows])


def _points(rows: list[Row]) -> list[Point]:
    common = _shared_overrides(rows)
    finished = [row for row in rows if row.summary.status == "FINISHED"]
    return [
        Point(row.job, position(row.summary, common), row.summary.metrics)
        for row in finished
        if {"quality/perplexity", "params/nonzero", "size/disk_mb"} <= set(row.summary.metrics)
    ]


def _cells(rows: list[Row], sweep: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Leaderboard of rows of a sweep as text: the dense model, then by perplexity, then what did not finish."""
    points = _points(sweep)
    on_front = {point.job for point in front(points, "params/nonzero")}
    header = ["job", "run", "removed", "non-zero", "disk MB", "perplexity", "x dense"]
    header += ["prefill speed-up", "decode speed-up", "peak memory"]
    timed = [of for of in ENGINES if any(f"{of}/prefill_speedup" in row.summary.metrics for row in sweep)]
    header += [f"{stage} in {ENGINES[of][0]}" for of in timed for stage in _STAGES]
    common = set(_shared_overrides(sweep))
    lines: list[list[str]] = []
    for dense in dense_points(points):
        lines.append(["", "dense", "0", *(formatted(dense.metrics, name) for name in _COLUMNS), "1"])
    infinite = float("inf")
    for row in sorted(rows, key=lambda r: r.summary.metrics.get("quality/perplexity", infinite)):
        m = row.summary.metrics
        label = " ".join(_short(o) for o in row.summary.overrides if o not in common) or "defaults"
        cells = [row.job + ("*" if row.job in on_front else ""), label]
        if row.summary.status != "FINISHED":
            cells += [f"{row.summary.status}: {row.summary.reason}"]
        else:
            cells += [
                *(formatted(m, name) for name in ("amount/realized", *_COLUMNS, "quality/perplexity_ratio")),
                *(speedup(m, stage) for stage in _STAGES),
                f"{-m['memory/reduction']:+.1%}" if "memory/reduction" in m else "-",
                *(speedup(m, stage, of=of) for of in timed for stage in _STAGES),
            ]
        lines.append(cells)
    return header, [cells + [""] * (len(header) - len(cells)) for cells in lines]


def _short(override: str) -> str:
    """Override with its numbers rounded: range(0.1,0.6,0.2) gives 0.30000000000000004."""
    return re.sub(r"\d\.\d{9,}", lambda number: f"{float(number[0]):g}", plain(override))


def _markdown(rows: list[Row]) -> str:
    header, lines = _cells(rows, rows)
    by_series = pivot([(point.position, point.metrics["quality/perplexity"]) for point in _points(rows)])
    tables = ([by_series] if by_series else []) + [[header, *lines]]
    return "\n".join(_markdown_table(table) for table in tables)


def _markdown_table(table: list[list[str]]) -> str:
    lines = [table[0], ["---"] * len(table[0]), *table[1:]]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in lines) + "\n"


def _shown(path: Path) -> str:
    """Path as a person in the working folder would type it."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
