"""The command line: python -m prune_lab.report SOURCE [SOURCE ...] [-x METRIC] [-y METRIC] [-o FOLDER]."""

from __future__ import annotations

import sys
from difflib import get_close_matches
from pathlib import Path

from prune_lab import explain
from prune_lab.errors import INTERRUPTED, OK, REFUSED, Refused

PAGE, PICTURE = "report.html", "report.png"


def main() -> None:
    """Runs a command line and leaves with its exit code."""
    sys.exit(_run(sys.argv[1:]))


def _run(arguments: list[str]) -> int:
    try:
        asked = _parser().parse_args(arguments)
        _report(asked.sources, asked.x, asked.y, asked.output)
    except Refused as error:
        explain.to_stderr(str(error))
        return REFUSED
    except OSError as error:  # a full disk, a folder that may not be read
        explain.to_stderr(f"{error.filename or 'report'}: {error.strerror or error}")
        return REFUSED
    except KeyboardInterrupt:
        explain.to_stderr("interrupted")
        return INTERRUPTED
    return OK


def _parser() -> explain.Parser:
    parser = explain.Parser(
        prog="python -m prune_lab.report",
        description=f"Compares runs by any two metrics: {PAGE} (interactive, needs no network) and {PICTURE}.",
        epilog="The MLflow store is sqlite:///mlflow.db here, or MLFLOW_TRACKING_URI.",
    )
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="a sweep's folder, or an MLflow experiment's name")
    parser.add_argument("-x", metavar="METRIC", help="the metric on x to begin with (params/nonzero)")
    parser.add_argument("-y", metavar="METRIC", help="the metric on y to begin with (quality/perplexity)")
    where = "where to write (the sweep's folder; for several sources or an experiment the working folder)"
    parser.add_argument("-o", dest="output", metavar="FOLDER", type=Path, help=where)
    return parser


def _report(sources: list[str], x: str | None, y: str | None, output: Path | None) -> None:
    from prune_lab.report import page
    from prune_lab.report.runs import report_of
    from prune_lab.report.sources import read
    from prune_lab.results.pareto import draw
    from prune_lab.system.hub import as_folder

    report = report_of(read(sources))
    for key, metric in (("-x", x), ("-y", y)):
        if metric is not None and metric not in report.metrics:
            held = sum(metric in summary.metrics for summary in report.summaries)
            known = report.metrics
            partly = f"only {held} of {len(report.points)} runs have it" if held else ""
            raise Refused(f"{key} {metric}: " + (_about_dense(metric) or partly or _no_such_metric(metric, known)))
    if report.warnings:
        explain.to_stderr(f"warning: runs measured differently must not be compared: {'; '.join(report.warnings)}")
    one = as_folder(sources[0]) if len(report.sources) == 1 else None
    folder = output or one or Path()
    folder.mkdir(parents=True, exist_ok=True)
    page.write(report, folder / PAGE, x, y)
    caption = page.about(report) + (" WARNING: not measured alike, do not compare." if report.warnings else "")
    draw(report.points, report.dense, folder / PICTURE, [report.pair(x, y)], caption)
    print(f"Report: {folder / PAGE}  {folder / PICTURE}")  # noqa: T201


def _about_dense(metric: str) -> str:
    if "/dense_" not in metric:
        return ""
    return "figures of the dense model are no axis; it is the star on the plot of every other metric"


def _no_such_metric(metric: str, known: list[str]) -> str:
    close = get_close_matches(metric, known, n=3, cutoff=0.5)
    close = close or [name for name in known if metric.lower() in name][:3]
    hint = f"did you mean {', '.join(close)}?" if close else f"there are {', '.join(known)}"
    return f"no such metric; {hint}"


if __name__ == "__main__":
    main()
