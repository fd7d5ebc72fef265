"""What a person sees of one run: its header, its table dense -> compressed -> change, and its notes."""

from __future__ import annotations

import re
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from prune_lab.results.metrics import of_dense, speedup
from prune_lab.results.summary import Summary
from prune_lab.system.console import Console

_ROWS = (  # title, metric, format
    ("perplexity", "quality/perplexity", ".3f"),
    ("bits per byte", "quality/bits_per_byte", ".4f"),
    ("parameters", "params/total", ",.0f"),
    ("non-zero parameters", "params/nonzero", ",.0f"),
    ("multiply-accumulates per token", "compute/macs_per_token", ",.0f"),
    ("on disk, MB", "size/disk_mb", ".2f"),
    ("weights in memory, MB", "memory/weights_mb", ".2f"),
    ("peak memory, MB", "memory/peak_mb", ".1f"),
    ("energy, J per token", "energy/joules_per_token", ".4f"),
)
_TIMED = (("prefill, ms (speed-up)", "prefill", "ms"), ("decode, ms per token (speed-up)", "decode", "ms_per_token"))


def header(summary: Summary, console: Console) -> None:
    """Says what is about to run, a line each."""
    model, protocol = summary.model, summary.protocol
    at = f" at {model['revision'][:12]}" if model["revision"] else ""
    console.note(f"model     {model['name']}{at} ({model['family']}), {model['parameters']:,} parameters")
    windows, seq_len = protocol["windows"], protocol["seq_len"]
    tokens = f"{windows} test windows of {seq_len} tokens, {windows * seq_len:,} in all"
    before = "" if protocol["bos"] == "none" else f", token {protocol['bos']} (BOS) before each"
    console.note(f"text      {protocol['dataset']}: {tokens}{before}")
    console.note(f"device    {protocol['device']} ({summary.environment['gpu'] or summary.environment['cpu']})")
    console.note(f"dtype     {protocol['dtype']}")
    if (seen := protocol["calibration"]) is not None:
        windows = f"{seen['n_samples']} windows of {seen['seq_len']} tokens of {seen['source']}"
        products = ", products in bfloat16" if seen["bfloat16"] else ""
        text = f"{seen['distinct_tokens']:,} distinct tokens of {seen['documents']:,} documents"
        console.note(f"calibration  {windows}: {text}, behind {seen['propagate']} blocks{products}")
    if (training := protocol["training"]) is not None:
        console.note(f"training  {training['tokens']:,} tokens of text, {training['passes']:.2g} passes over it")
    chosen = summary.choices
    console.note("run       " + ", ".join(f"{g} {chosen.get(g)}" for g in ("method", "schedule", "recovery", "post")))


def show(summary: Summary, console: Console) -> None:
    """Prints the outcome of a finished run."""
    m = summary.metrics
    for table in tables(m, summary.protocol.get("tasks", [])):
        console.result(table)
    removed = f"amount    {m['amount/realized']:.4f} of the pruned scope ({m['amount/requested']:g} requested)"
    console.result(removed)
    for warning in summary.warnings:
        console.result(f"note      {warning}")
    if summary.reused_from:
        console.result(
            f"note      finished before, not computed again ({summary.folder}); resume=false computes it anew"
        )


def tables(m: dict[str, float], tasks: list[dict[str, Any]]) -> list[Table]:
    """The figures as tables: dense -> compressed, and by batch and prompt length where that was timed."""
    shapes = _shapes(m)
    return [_table(m, tasks)] + ([_grid(m, shapes)] if shapes else [])


def _table(m: dict[str, float], tasks: list[dict[str, Any]]) -> Table:
    table = Table(title="dense -> compressed", title_justify="left", box=SIMPLE_HEAD)
    for name in ("", "dense", "compressed", "change"):
        table.add_column(name, justify="left" if not name else "right")
    dense_model = of_dense(m)
    for title, name, form in _ROWS:
        if name in m and name in dense_model:
            before, after = dense_model[name], m[name]
            change = f"{after / before - 1:+.1%}" if before else "-"
            table.add_row(title, format(before, form), format(after, form), change)
    for task in tasks:
        name = f"{task['task']}_{task['metric']}"
        if {f"tasks/{name}", f"tasks/dense_{name}"} <= m.keys():
            title = f"{task['task']}, {task['metric']} of {task['documents']:,}"
            change = f"{m[f'tasks/{name}'] - m[f'tasks/dense_{name}']:+.4f}"
            table.add_row(title, _score(m, f"dense_{name}"), _score(m, name), change)
    for title, stage, unit in _TIMED:
        name = f"latency/{stage}_{unit}_p50"
        if name in m:
            dense = m[f"latency/dense_{stage}_{unit}_p50"]
            table.add_row(title, f"{dense:.2f}", f"{m[name]:.2f}", speedup(m, stage))
    for stage in ("prefill", "decode"):
        if f"latency/aa_{stage}_speedup" in m:
            table.add_row(f"dense against itself, {stage}", "", "", speedup(m, f"aa_{stage}"))
    return table


def _shapes(m: dict[str, float]) -> list[tuple[int, int]]:
    """Rows and tokens of the prompts that were timed beside the headline."""
    found = (re.fullmatch(r"latency/prefill_speedup_b(\d+)_l(\d+)", name) for name in m)
    return sorted((int(match[1]), int(match[2])) for match in found if match)


def _grid(m: dict[str, float], shapes: list[tuple[int, int]]) -> Table:
    """What each shape took: milliseconds dense -> compressed, and the speed-up."""
    table = Table(title="by batch and prompt length", title_justify="left", box=SIMPLE_HEAD)
    for name in ("batch", "tokens", "prefill, ms", "speed-up", "decode, ms per step", "speed-up"):
        table.add_column(name, justify="right")
    for batch, tokens in shapes:
        at, cells = f"_b{batch}_l{tokens}", [str(batch), str(tokens)]
        for _, stage, unit in _TIMED:
            name = f"{stage}_{unit}_p50{at}"
            cells += [f"{m[f'latency/dense_{name}']:.2f} -> {m[f'latency/{name}']:.2f}", speedup(m, stage, at)]
        table.add_row(*cells)
    return table


def _score(m: dict[str, float], name: str) -> str:
    """A task's score with its standard error, where it has one."""
    error = m.get(f"tasks/{name}_stderr")
    return f"{m[f'tasks/{name}']:.4f}" + (f" ± {error:.4f}" if error is not None else "")
