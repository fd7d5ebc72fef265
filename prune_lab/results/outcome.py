"""Console output of one run: its header, its table dense -> compressed -> change, and its notes."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from prune_lab.results.metrics import METRICS, dense_name, formatted, interval, members, of_dense, speedup
from prune_lab.results.summary import Summary
from prune_lab.system.console import Console

_ROWS = [metric for metric in METRICS if metric.row and not metric.stage]
_TIMED = [metric for metric in METRICS if metric.stage]
_HEADLINE = [metric for metric in _TIMED if metric.name.startswith("latency/")]


def header(summary: Summary, console: Console) -> None:
    """Prints model, text, device, calibration, training and options of a run before it starts, a line each."""
    model, protocol = summary.model, summary.protocol
    at = f" at {model['revision'][:12]}" if model["revision"] else ""
    console.note(f"model     {model['name']}{at} ({model['family']}), {model['parameters']:,} parameters")
    if (scope := model["scope"]) is not None:
        left = ", ".join(f"{reason} ({len(names)})" for reason, names in scope["left_alone"].items())
        beside = f"; left alone: {left}" if left else ""
        console.note(f"scope     {scope['matrices']:,} matrices, {scope['share']:.1%} of the blocks' weights{beside}")
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
    groups = ("method", "schedule", "recovery", "post", "export")
    console.note("run       " + ", ".join(f"{group} {summary.choices.get(group)}" for group in groups))


def removed(m: dict[str, float]) -> str:
    """Line on the amount; a method that is given counts, such as shape, was asked for none."""
    realized, requested = m["amount/realized"], m["amount/requested"]
    asked = "" if realized and not requested else f" ({requested:g} requested)"
    return f"amount    {realized:.4f} of the pruned scope{asked}"


def show(summary: Summary, console: Console) -> None:
    """Prints tables, amount and warnings of a finished run."""
    m = summary.metrics
    for table in tables(m, summary.protocol.get("tasks", [])):
        console.result(table)
    console.result(removed(m))
    if divergence := beside_dense(m):
        console.result(f"quality   {divergence}")
    for line in _engines(summary.loads_in):
        console.result(line)
    for warning in summary.warnings:
        console.result(f"note      {warning}")
    if summary.reused_from:
        console.result(
            f"note      finished before, not computed again ({summary.folder}); resume=false computes it anew"
        )


def _engines(verdicts: list[dict[str, Any]]) -> list[str]:
    """Engines that load the export, and the keys that would change it, a line each; none where no export was kept."""
    by_answer: dict[str, list[str]] = {}
    for found in verdicts:
        by_answer.setdefault(found["loads"], []).append(found["engine"])
    words = {"yes": "", "no": "not in ", "not known": "not known of "}
    parts = [f"{said}{', '.join(by_answer[answer])}" for answer, said in words.items() if answer in by_answer]
    lines = [f"loads in  {'; '.join(parts)} by rules, not tried in this run (README.md of the export)"] if parts else []
    keys: dict[str, list[str]] = {}
    for found in verdicts:
        for key in found["keys"]:
            keys.setdefault(key, []).append(found["engine"])
    if keys:
        lines.append("          changed by " + "; ".join(f"{key} ({', '.join(of)})" for key, of in keys.items()))
    return lines


def beside_dense(m: dict[str, float]) -> str:
    """Quality of a run relative to the dense model in a line: ratio of perplexities, KL divergence, likeliest tokens.

    Empty where none of it was measured.
    """
    parts = []
    if ratio := interval(m, "quality/perplexity_ratio"):
        parts.append(f"{ratio:.3f} times the dense perplexity")
    if "quality/kl" in m:
        parts.append(f"KL {formatted(m, 'quality/kl')} nats")
    if "quality/same_top" in m:
        parts.append(f"same top token {m['quality/same_top']:.1%}")
    return ", ".join(parts)


def tables(m: dict[str, float], tasks: list[dict[str, Any]]) -> list[Table]:
    """Tables of a run's metrics: dense -> compressed, and by batch and prompt length where that was timed."""
    shapes = _shapes(m)
    return [_table(m, tasks)] + ([_grid(m, shapes)] if shapes else [])


def _table(m: dict[str, float], tasks: list[dict[str, Any]]) -> Table:
    table = Table(title="dense -> compressed", title_justify="left", box=SIMPLE_HEAD)
    for name in ("", "dense", "compressed", "change"):
        table.add_column(name, justify="left" if not name else "right")
    dense_model = of_dense(m)
    for metric in _ROWS:
        if metric.name in m and metric.name in dense_model:
            before, after = dense_model[metric.name], m[metric.name]
            change = f"{after / before - 1:+.1%}" if before else "-"
            table.add_row(metric.row, format(before, metric.form), format(after, metric.form), change)
    for task in tasks:
        name = f"tasks/{task['task']}_{task['metric']}"
        if {name, dense_name(name)} <= m.keys():
            title = f"{task['task']}, {task['metric']} of {task['documents']:,}"
            change = f"{m[name] - m[dense_name(name)]:+.4f}"
            if (flipped := m.get(f"tasks/{task['task']}_flips")) is not None:
                change += f", {flipped:.1%} flipped"
            table.add_row(title, _score(m, dense_name(name)), _score(m, name), change)
    for metric in _TIMED:
        if metric.name in m:
            dense, compressed = (format(m[of], metric.form) for of in (dense_name(metric.name), metric.name))
            table.add_row(metric.row, dense, compressed, speedup(m, metric.stage, of=metric.name.split("/")[0]))
    for words, _ in members("latency/aa_{stage}_speedup", m):
        table.add_row(f"dense against itself, {words['stage']}", "", "", speedup(m, f"aa_{words['stage']}"))
    return table


def _shapes(m: dict[str, float]) -> list[tuple[int, int]]:
    """Batch and length of the prompts that were timed beside the headline, in order."""
    timed = members("latency/{stage}_speedup_b{batch}_l{length}", m)
    return sorted({(int(words["batch"]), int(words["length"])) for words, _ in timed})


def _grid(m: dict[str, float], shapes: list[tuple[int, int]]) -> Table:
    """Table of the shapes: milliseconds dense -> compressed, and the speed-up."""
    table = Table(title="by batch and prompt length", title_justify="left", box=SIMPLE_HEAD)
    for name in ("batch", "tokens", "prefill, ms", "speed-up", "decode, ms per step", "speed-up"):
        table.add_column(name, justify="right")
    for batch, tokens in shapes:
        at, cells = f"_b{batch}_l{tokens}", [str(batch), str(tokens)]
        for metric in _HEADLINE:
            dense, compressed = (format(m[of + at], metric.form) for of in (dense_name(metric.name), metric.name))
            cells += [f"{dense} -> {compressed}", speedup(m, metric.stage, at)]
        table.add_row(*cells)
    return table


def _score(m: dict[str, float], name: str) -> str:
    """Score of a task with its standard error, where it has one."""
    error = m.get(f"{name}_stderr")
    return f"{m[name]:.4f}" + (f" ± {error:.4f}" if error is not None else "")
