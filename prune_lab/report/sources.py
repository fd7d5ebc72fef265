"""Sources of a report: sweep folders and MLflow experiments."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from prune_lab.errors import Refused
from prune_lab.report.runs import Run
from prune_lab.results.samples import Sample
from prune_lab.results.summary import RESULTS, Summary, from_dict
from prune_lab.system.hub import as_folder
from prune_lab.tracking.mlflow_reader import read_experiment


def read(sources: list[str]) -> dict[str, list[Run]]:
    """The runs of each source by its name, each source once. Raises Refused for what is no source."""
    places = {folder.resolve() if (folder := as_folder(source)) else source: source for source in sources}
    short = [_short(place) for place in places]
    found = {}
    for place, source in places.items():
        name = _short(place) if short.count(_short(place)) == 1 else source
        found[name] = _sweep(name, place) if isinstance(place, Path) else _experiment(place)
    return found


def _short(place: Path | str) -> str:
    """A sweep's folder as DATE/TIME, an experiment by its name."""
    return "/".join(place.parts[-2:]) if isinstance(place, Path) else place


def _sweep(name: str, folder: Path) -> list[Run]:
    path = folder / RESULTS
    if not path.is_file():
        raise Refused(f"{folder}: this folder has no {RESULTS}; name a sweep's folder, such as multirun/DATE/TIME")
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        return [Run(name, str(entry["job"]), _summary(entry)) for entry in entries]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise Refused(f"{path}: it is not the {RESULTS} of a sweep ({type(error).__name__})") from error


def _summary(entry: dict[str, Any]) -> Summary:
    """A summary whose metrics are finite numbers, and whose samples are texts."""
    summary = from_dict(entry)
    for metric, value in list(summary.metrics.items()):
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{metric}={value}")
    for sample in summary.samples:
        Sample(**sample)
        if not all(isinstance(text, str) for text in sample.values()):
            raise ValueError(f"samples={sample}")
    return summary


def _experiment(name: str) -> list[Run]:
    return [Run(name, run.name, run.summary, tracked=True) for run in read_experiment(name)]
