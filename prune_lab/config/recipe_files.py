"""A recipe's file as data: read with Hydra's own YAML reader, once it is known that it will not grow in the reading."""

from __future__ import annotations

from math import inf
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import RangeSweep
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from prune_lab.errors import Refused

MOST_BYTES = 2**18
DEEPEST = 32  # mappings and lists in each other
MOST_JOBS = 10_000  # of a recipe's grid


def read(path: Path, where: str) -> dict[str, Any]:
    """The file as Hydra will read it, with nothing resolved; raises Refused, which calls it `where`."""
    try:
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise Refused(f"{where} has {size} bytes: a recipe has {MOST_BYTES} at most")
        text = path.read_bytes().decode("utf-8")
        _check_shape(text, where)
        tree = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except Refused:
        raise
    except UnicodeDecodeError as error:
        raise Refused(f"{where} is not UTF-8 text: {error}") from error
    except (yaml.YAMLError, OmegaConfBaseException, OSError, ValueError) as error:
        raise Refused(f"{where} cannot be read as YAML: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(tree, dict):
        raise Refused(f"{where} must be a mapping of keys to values")
    return {str(key): value for key, value in tree.items()}


def _check_shape(text: str, where: str) -> None:
    """Refuses, without building anything, what would be built without end: aliases of aliases, endless nesting."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise Refused(f"{where}, line {event.start_mark.line + 1}: a YAML alias is not allowed: use ${{key}}")
        if isinstance(event, yaml.MappingStartEvent | yaml.SequenceStartEvent):
            depth += 1
        elif isinstance(event, yaml.MappingEndEvent | yaml.SequenceEndEvent):
            depth -= 1
        if depth > DEEPEST:
            raise Refused(f"{where}, line {event.start_mark.line + 1}: it is nested more than {DEEPEST} deep")


def check_grid(grid: dict[str, Any], where: str) -> None:
    """Refuses a grid of more jobs than anyone can mean: Hydra would list them all before the first."""
    jobs, parser = 1.0, OverridesParser.create()
    for key, value in grid.items():
        try:
            choices = parser.parse_override(f"{key}={value}").value()
        except HydraException:  # Hydra will say what is wrong with it
            continue
        if isinstance(choices, RangeSweep):
            start, stop, step = float(choices.start or 0), float(choices.stop or 0), float(choices.step)
            jobs *= max(1, (stop - start) / step) if step else inf
        else:
            jobs *= len(getattr(choices, "list", [choices]))
    if not jobs <= MOST_JOBS:  # NaN is no number of jobs either
        raise Refused(f"{where} makes {jobs:g} jobs: a recipe's grid has {MOST_JOBS} jobs at most")
