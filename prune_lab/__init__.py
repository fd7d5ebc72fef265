"""prune_lab: configuration-driven experiments in compressing language models.

From Python: `compress` prunes a model that is loaded, `run` does what a command line does (docs/python.md).
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prune_lab.api import Compression
    from prune_lab.results.summary import Summary

__version__ = "0.1.0"


def compress(
    model: Any,
    tokenizer: Any,
    method: str | Mapping[str, Any] = "structured",
    amount: float | None = None,
    text: Any = None,
    *,
    seed: int = 0,
    calibration: Mapping[str, Any] | None = None,
    in_place: bool = False,
    quiet: bool = True,
    **keys: Any,
) -> Compression:
    """Prunes a model of transformers that is loaded; returns the pruned model and a report.

    method: an option of the group, or {"name": option, key: value ...}. amount: fraction removed, by default as on the
    command line. text: what methods that look at activations or gradients are calibrated on: documents (a list of str),
    one long document (a str), or the path of files (a pathlib.Path, as dataset.calibration.name); None for the included
    text. seed: of what is drawn. calibration: keys of dataset.calibration, such as {"n_samples": 32}. keys: keys of
    the method. in_place: prune the given model itself; else it is left as it is, and a copy is pruned.

    Raises prune_lab.errors.Refused, in the words of the command line, where it cannot be done.
    """
    return _api().compress(model, tokenizer, method, amount, text, seed, calibration or {}, in_place, quiet, keys)


def run(overrides: Sequence[str] = (), recipe: str | None = None, recipes: str | Path | None = None) -> Summary:
    """Does one run, as `python -m prune_lab OVERRIDES`, in this process, and returns its summary.

    recipe, recipes: name of a recipe (-cn) and its folder (-cd). The summary has the metrics by name, the warnings, and
    the folder with all files. Raises prune_lab.errors.Refused where the command line would end with exit code 2, and
    whatever made the run fail where it would end with 1; both are on record.
    """
    return _api().run(overrides, recipe, recipes)


def _api() -> Any:
    """The module behind the calls, loaded when it is needed: with it come PyTorch, Hydra and the rest."""
    numbers = random.getstate()  # a library that is imported draws some
    from prune_lab import api

    random.setstate(numbers)
    return api
