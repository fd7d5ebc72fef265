"""report.html: the points of a report by any two of its metrics, in one file that needs no network."""

from __future__ import annotations

import json
import textwrap
from html import escape
from itertools import combinations
from pathlib import Path
from typing import Any

from prune_lab.report.runs import Report
from prune_lab.results.metrics import ENGINES, axis
from prune_lab.results.pareto import Point, front, lines, steps
from prune_lab.results.samples import printable
from prune_lab.results.summary import Summary
from prune_lab.system.files import write_text

TEMPLATE = Path(__file__).parent / "page.html"
_SHOWN = (  # in the box beside a point, where the run has them; the two axes come in addition
    "quality/perplexity", "quality/perplexity_ratio", "quality/kl", "quality/same_top", "quality/bits_per_byte",
    "generation/repetition", "generation/loops",
    "amount/realized", "params/nonzero", "params/total", "size/disk_mb", "memory/peak_mb", "latency/prefill_speedup",
    "latency/decode_speedup",
    *(f"{engine}/{of}" for engine in ENGINES for of in ("prefill_speedup", "decode_speedup", "perplexity")),
)  # fmt: skip


def write(report: Report, path: Path, x: str | None = None, y: str | None = None) -> None:
    """Writes the page, whole or not at all; x and y are the axes it opens with. Imports plotly."""
    from plotly.offline import get_plotlyjs

    page = TEMPLATE.read_text(encoding="utf-8")
    parts = {
        "TITLE": escape(f"Pareto report: {', '.join(report.sources)}"),
        "WARNINGS": _warnings(report),
        "ABOUT": escape(about(report)),
        "MISSING": _missing(report),
        "SAMPLES": _samples(report),
        "DATA": _json({**_data(report), "start": report.pair(x, y)}),
        "PLOTLY": get_plotlyjs(),  # the last one: it is long, and not ours
    }
    for name, text in parts.items():
        page = page.replace(f"<!--{name}-->", text)
    write_text(path, page)


def about(report: Report) -> str:
    """Summary of the runs and of how they were measured, in a line or two."""
    count = len(report.points)
    said = f"{count} finished run{'s' * (count != 1)} of {', '.join(report.sources)}"
    if report.unfinished:
        said += f"; {report.unfinished} did not finish"
    if report.repeated:
        said += f"; {report.repeated} that stand in more than one place are shown once"
    protocol = report.summaries[0].protocol
    if not report.warnings and {"windows", "seq_len"} <= set(protocol):
        said += f". Measured on {protocol['windows']} windows of {protocol['seq_len']} tokens of {protocol['dataset']}"
        said += f", {protocol['dtype']}, {protocol['device']}"
    return said + "."


def _warnings(report: Report) -> str:
    if not report.warnings:
        return ""
    items = "".join(f"<li>{escape(warning)}</li>" for warning in report.warnings)
    return f'<div id="warning"><b>These runs were not measured alike: do not compare them.</b><ul>{items}</ul></div>'


def _missing(report: Report) -> str:
    if not report.missing:
        return ""
    rows = "".join(
        f"<tr><td>{escape(one.label)}</td><td>{escape(one.status)}</td><td>{escape(one.reason)}</td></tr>"
        for one in report.missing
    )
    head = "<tr><th>run</th><th>status</th><th>reason</th></tr>"
    return f'<h2>Not on the plot, or not on every axis</h2><table id="missing">{head}{rows}</table>'


def _samples(report: Report) -> str:
    """Continuations of each prompt: of the dense models, each text once, and of each run."""
    rows: dict[str, dict[str, list[str]]] = {}  # names of those that wrote a text, by prompt and text
    for point, summary in zip(report.points, report.summaries, strict=True):
        name = f"{point.position.series} {point.position.step}".strip()
        for sample in summary.samples:
            texts = rows.setdefault(sample["prompt"], {})
            of_dense = texts.setdefault(f"{sample['dense']}\n({sample['dense_length']})", [])
            of_dense += ["dense"] if "dense" not in of_dense else []
            texts.setdefault(f"{sample['compressed']}\n({sample['compressed_length']})", []).append(
                f"{name} ({point.job})"
            )
    if not rows:
        return ""
    shown = []
    for prompt, texts in rows.items():
        shown.append(f"<tr><th>prompt</th><th><pre>{_text(prompt)}</pre></th></tr>")
        shown += [
            f"<tr><td>{'<br>'.join(map(_text, names))}</td><td><pre>{_text(text)}</pre></td></tr>"
            for text, names in texts.items()
        ]
    return f'<h2>Greedy continuations</h2><table id="samples">{"".join(shown)}</table>'


def _text(text: str) -> str:
    return escape(printable(text))


def _json(value: Any) -> str:
    """JSON that may stand in a script element: a run may be called </script>."""
    return json.dumps(value, allow_nan=False).replace("<", "\\u003c").replace("&", "\\u0026")


def _data(report: Report) -> dict[str, Any]:
    """Data that the page's script draws.

    Points are told by their place in one list, runs first and then the dense models. `values` holds a metric's
    value of each point (null where it has none) in the unit of its axis; `fronts` holds for each pair of metrics,
    by their places in `axes`, the points on the front.
    """
    points = [*report.points, *report.dense]
    place = {id(point): number for number, point in enumerate(points)}
    axes = [axis(metric) for metric in report.metrics]
    fronts = {
        f"{i},{j}": [place[id(point)] for point in front(points, axes[i].metric, axes[j].metric)]
        for i, j in combinations(range(len(axes)), 2)
    }
    return {
        "axes": [{"metric": a.metric, "title": a.title, "log": a.logarithmic, "better": a.better} for a in axes],
        "values": [[_rounded(point.metrics.get(a.metric), a.unit) for point in points] for a in axes],
        "fronts": fronts,
        "lines": [
            {
                "name": "<br>".join(map(escape, textwrap.wrap(name, 44))),
                "nm": name.endswith(" N:M"),
                "steps": [[place[id(p)] for p in s] for s in steps(runs)],
            }
            for name, runs in lines(report.points).items()
        ],
        "dense": [place[id(point)] for point in report.dense],
        "hover": [_hover(p, s) for p, s in zip(report.points, report.summaries, strict=True)]
        + ["<b>dense</b><br>" + _figures(point) for point in report.dense],
    }


def _rounded(value: float | None, unit: float) -> float | None:
    return None if value is None else float(f"{value / unit:.7g}")


def _hover(point: Point, summary: Summary) -> str:
    """The box beside a run, in the few tags that plotly knows; what a person wrote is escaped."""
    asked = textwrap.wrap(" ".join(summary.overrides), 88) or ["defaults"]
    head = f"<b>{escape(f'{point.position.series} {point.position.step}'.strip())}</b> ({escape(point.job)})"
    return "<br>".join([head, *map(escape, asked), _figures(point)])


def _figures(point: Point) -> str:
    return "<br>".join(f"{name}: {_number(point.metrics[name])}" for name in _SHOWN if name in point.metrics)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1e5 else f"{value:.5g}"
