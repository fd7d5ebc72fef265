"""The command line in one order: Hydra takes overrides that stand together only, and people write -m between them."""

from __future__ import annotations

import argparse
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn

from hydra._internal.utils import get_args_parser

from prune_lab import __version__
from prune_lab.config import overrides
from prune_lab.errors import Refused


def in_order(arguments: list[str]) -> list[str]:
    """The same command line: flags first, then all overrides as they came. Raises Refused for an unknown flag."""
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
