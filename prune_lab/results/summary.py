"""The summary of a run (summary.json): its configuration, protocol, environment and metrics."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from prune_lab.results.metrics import check_known
from prune_lab.system.files import write_text

SCHEMA_VERSION = 1
EXPORT = "export"  # folder of the export in that of its run
FILE, RESULTS = "summary.json", "results.json"  # of a run; of a sweep, the summaries of its jobs
_DIVERGED = " diverged: it is not a finite number"  # what a warning says of a metric


@dataclass
class Summary:
    """Summary of one run. `status` is FINISHED, FAILED or KILLED; `reason` says why, where it did not finish."""

    status: str
    fingerprint: str = ""
    choices: dict[str, str] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)  # the dense one: name, family, parameters, the Hub's commit
    environment: dict[str, Any] = field(default_factory=dict)
    protocol: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    samples: list[dict[str, str]] = field(default_factory=list)  # continuations, each what Sample of samples.py has
    diverged: list[str] = field(default_factory=list)  # metrics that came out as no finite number
    warnings: list[str] = field(default_factory=list)
    not_applicable: dict[str, list[str]] = field(default_factory=dict)  # keys of a group that its option ignores
    reason: str | None = None
    loads_in: list[dict[str, Any]] = field(default_factory=list)  # of a kept export: Verdicts of export/loads_in.py
    folder: str = ""  # where the run that computed this wrote its files
    unlogged: str | None = None  # why the tracker does not have this result, which is finished all the same
    reused_from: str | None = None  # the MLflow run or the folder that held this result, where it was not computed anew
    schema_version: int = SCHEMA_VERSION

    def set_metrics(self, values: dict[str, float]) -> None:
        """Adds the finite values; the others have diverged, which is a warning each.

        Raises ValueError where a name is not in the table of metrics.
        """
        check_known(values)
        diverged = [name for name, value in values.items() if not math.isfinite(value)]
        self.metrics.update({name: float(v) for name, v in values.items() if name not in diverged})
        self.diverged += diverged
        self.warnings += [f"{name}{_DIVERGED}" for name in diverged]

    def write(self, folder: Path) -> Path:
        """Writes summary.json whole or not at all and returns its path."""
        ordered = {"schema_version": self.schema_version, **asdict(self)}
        return write_json(folder / FILE, ordered)


def read_summary(folder: Path) -> Summary | None:
    """Summary in `folder`, or None where there is none that can be read."""
    try:
        values = json.loads((folder / FILE).read_text(encoding="utf-8"))
        return from_dict(values)
    except (OSError, ValueError, TypeError):
        return None


def from_dict(values: dict[str, Any]) -> Summary:
    """Summary from the contents of a summary.json; unknown keys of later versions are left out."""
    known = {f.name for f in fields(Summary)}
    summary = Summary(**{key: value for key, value in values.items() if key in known})
    if "diverged" not in values:  # it was written when the warnings alone said so
        summary.diverged = [said.removesuffix(_DIVERGED) for said in summary.warnings if said.endswith(_DIVERGED)]
    return summary


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted leaves of nested dictionaries, such as a run's configuration, without `_target_`."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            leaves.update(flatten(value, f"{prefix}{key}."))
        elif key != "_target_":
            leaves[prefix + key] = value
    return leaves


def write_json(path: Path, value: Any) -> Path:
    """Writes JSON whole or not at all and returns the path; what JSON has no number for becomes text."""
    return write_text(path, json.dumps(_finite(value), indent=2, allow_nan=False, default=str) + "\n")


def _finite(node: Any) -> Any:
    """Containers with NaN and infinities, such as a refused amount=nan, as text."""
    if isinstance(node, dict):
        return {key: _finite(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [_finite(value) for value in node]
    return str(node) if isinstance(node, float) and not math.isfinite(node) else node
