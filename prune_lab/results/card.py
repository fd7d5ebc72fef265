"""The model card of an export."""

from __future__ import annotations

from pathlib import Path

from prune_lab.results.metrics import dense_figures
from prune_lab.results.summary import Summary

CARD = "README.md"


def model_card(summary: Summary, base_model: str, command: str, reading: str, library: str = "transformers") -> str:
    """Markdown with the base model, what was done and measured, the command that repeats it, and what loads it.

    library: the Hub's name of what loads it.
    """
    dense = set(dense_figures(summary.metrics))
    rows = [f"| {name} | {value:.6g} |" for name, value in sorted(summary.metrics.items()) if name not in dense]
    groups = ("method", "schedule", "recovery", "post", "export")
    choices = ", ".join(f"{group} {summary.choices.get(group)}" for group in groups)
    licence, revision = summary.model.get("licence"), summary.model.get("revision")
    terms = f"its licence, {licence}, applies" if licence else "its licence applies"
    lines = [
        "---",
        *([f"base_model: {base_model}"] if revision else []),  # the Hub's field names repositories only
        *([f"license: {licence}"] if licence else []),
        f"library_name: {library}",
        "pipeline_tag: text-generation",
        "tags: [prune_lab, compressed]",
        "---",
        "",
        f"# {base_model}, compressed with prune_lab",
        "",
        f"- Base model: {base_model}{f' at {revision}' if revision else ''} ({terms})",
        f"- Compression: {choices}; amount removed {summary.metrics.get('amount/realized', 0):.4f}",
        f"- Loads with: {reading}",
        f"- Evaluated on: {summary.protocol.get('dataset')}, {summary.protocol.get('windows')} windows of "
        f"{summary.protocol.get('seq_len')} tokens, {summary.protocol.get('dtype')}",
        f"- prune_lab {summary.environment.get('prune_lab')}, {_of(summary)}",
        *(f"- {note}" for note in summary.warnings),
        "",
        "    " + command,
        "",
        *_engines(summary),
        "| metric | value |",
        "|---|---|",
        *rows,
        "",
    ]
    return "\n".join(lines)


def _engines(summary: Summary) -> list[str]:
    """Table of what the export loads in, as lines."""
    if not summary.loads_in:
        return []
    rows = [
        f"| {found['engine']} | {found['loads']} | {found['note']}"
        + (f". Would change it: {', '.join(f'`{key}`' for key in found['keys'])}" if found["keys"] else "")
        + " |"
        for found in summary.loads_in
    ]
    return ["| engine | loads it | how, or why not |", "|---|---|---|", *rows, ""]


def description(path: Path) -> str:
    """Text of the model card at `path` without its front matter and its metrics, at most 5,000 characters."""
    text = path.read_text(encoding="utf-8").removeprefix("---\n").partition("\n---\n")[2]
    return text.partition("\n| metric |")[0].strip()[:5000]


def is_card_of(path: Path, summary: Summary) -> bool:
    """True where the model card at `path`, and so the export beside it, is of this run."""
    try:
        return f", {_of(summary)}\n" in path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False


def _of(summary: Summary) -> str:
    return f"fingerprint {summary.fingerprint}"
