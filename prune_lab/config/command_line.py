"""The command line in one order: Hydra takes overrides that stand together only, and people write -m between them."""

from __future__ import annotations

import argparse
import re
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn

from hydra._internal.utils import get_args_parser
from hydra.errors import OverrideParseException

from prune_lab import __version__, explain
from prune_lab.config import overrides
from prune_lab.errors import Refused

# What has to be installed for a launcher or a sweeper.
_EXTRAS = {
    "joblib": "parallel", "submitit_slurm": "slurm", "submitit_local": "slurm", "ray": "ray", "ray_aws": "ray",
    "optuna": "search",
}  # fmt: skip


def in_order(arguments: list[str]) -> list[str]:
    """Command line with flags first, then all overrides as they came. Raises Refused for an unknown flag."""
    parser = get_args_parser()
    parser.error = _refuse  # type: ignore[method-assign] # argparse would print its own usage and leave
    flags = [action for action in parser._actions if action.option_strings]
    for action in parser._actions:
        if action.dest == "version":  # Hydra would tell its own
            action.version = f"prune_lab {__version__}"  # type: ignore[attr-defined]
        if not action.option_strings:  # the overrides, which argparse takes from one place alone
            action.nargs, action.default = argparse.SUPPRESS, argparse.SUPPRESS
    known, words = parser.parse_known_args([word for word in arguments if word != "--"])
    if unknown := [word for word in words if word.startswith("-")]:
        raise Refused(_unknown(unknown[0], [name for flag in flags for name in flag.option_strings]))
    given: list[str] = []
    for flag in flags:
        value, names = getattr(known, flag.dest, None), sorted(flag.option_strings, key=len)
        if value is True:
            given.append(names[-1])
        elif isinstance(value, str):
            given.append(f"{names[-1]}={value}")
    return [*given, *words]


def check_overrides(arguments: list[str]) -> None:
    """Raises Refused for an override that Hydra cannot read as it was meant (overrides.py)."""
    known, _ = get_args_parser().parse_known_args(arguments)
    if not (known.shell_completion or known.help or known.hydra_help):
        overrides.check(known.overrides, known.multirun or "hydra.mode=MULTIRUN" in known.overrides)


def said_of(error: Exception) -> str:
    """Message about what ended the program before a job did, in one line."""
    if isinstance(error, OverrideParseException):  # of a recipe's sweep
        return overrides.unreadable(error.override, str(error))
    if found := re.match(r"Ambiguous value for argument '(.*)'\n1\. ", str(error), re.DOTALL):
        return overrides.ambiguous(found[1])
    if (found := re.search(r"Could not find 'hydra/(\w+)/([\w/]+)'", str(error))) and found[2] in _EXTRAS:
        return f'hydra/{found[1]}={found[2]} is not installed: pip install "prune-lab[{_EXTRAS[found[2]]}]"'
    if isinstance(error, OSError) and error.filename is not None:  # the folder or the log of a run
        name = str(error.filename)
        return (
            f"{name if len(name) <= 200 else f'{name[:200]}...'}: {error.strerror}: results go below the working "
            "folder: work in one that can be written, or give hydra.run.dir=FOLDER (a sweep: hydra.sweep.dir=FOLDER)"
        )
    return explain.one_line(error)


def check_folder() -> None:
    """Raises Refused for a working folder in which Hydra cannot work."""
    try:
        here = str(Path.cwd())
    except OSError as error:
        raise Refused(f"the working folder cannot be read ({error.strerror}): cd to a folder that is there") from error
    if "${" in here:
        raise Refused(
            f"the working folder {here!r} has ${{ in its name, which Hydra takes for a reference: give the command in "
            "another folder"
        )


def _refuse(message: str) -> NoReturn:
    raise Refused(f"{message}; see --help")


def _unknown(word: str, flags: list[str]) -> str:
    name = word.partition("=")[0]
    close = get_close_matches(name, flags, n=1)
    if close:
        return f"{word}: no such flag; did you mean {close[0]}? See --hydra-help"
    if "=" in word:
        return f"{word}: no such flag; an override has no dash: {word.lstrip('-')}"
    return f"{word}: no such flag; see --help and --hydra-help"
