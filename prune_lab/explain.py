"""Errors of Hydra and OmegaConf in one line: key, value, what is allowed."""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn

from hydra.errors import InstantiationException
from omegaconf import DictConfig, ListConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, ConfigTypeError, OmegaConfBaseException

from prune_lab.errors import Refused

LONGEST, TAIL = 600, 150  # characters of a message, and of its end where the middle is left out
_SINGLE_WEIGHTS = "is for methods that prune single weights; for units a stock config holds one width for all blocks"
_REASONS = {
    "method.allocation": f"an allocation over blocks {_SINGLE_WEIGHTS}",
    "method.scope": f"a ranking over several matrices {_SINGLE_WEIGHTS}",
    "method.pattern": f"an N:M pattern {_SINGLE_WEIGHTS}",
    "method.units": "units are for structured methods: method=structured, taylor, wifv",
    "method.compensate": "it is method.refit now: bias for true, none for false",
    "method.score": "the score is the method; to choose one by name: method=unstructured, structured",
}


def no_such_key(key: str, allowed: str, options: str = "") -> str:
    """Message that an option has no such key, with the keys it has, and the reason where other options have it."""
    reason = f" ({_REASONS[key]})" if key in _REASONS else ""
    has = f"allowed are {allowed}" if allowed.lstrip("; ") == allowed != "" else f"it has none{allowed}"
    return f"{key}: no such key{' in ' * bool(options)}{options}{reason}; {has}"


def one_line(error: BaseException) -> str:
    """The message of `error` as one line, with the allowed keys where a key is unknown."""
    cause = error.__cause__
    if isinstance(cause, ConfigKeyError | ConfigAttributeError) and isinstance(cause.parent_node, DictConfig):
        allowed = ", ".join(str(key) for key in cause.parent_node if key not in ("_target_", "hydra"))
        return no_such_key(str(cause.full_key), allowed)
    if isinstance(cause, ConfigTypeError) and isinstance(cause.parent_node, ListConfig):
        return f"{cause.full_key} must be a list, in brackets: {cause.full_key}=[...]"
    if isinstance(cause, ConfigTypeError) and isinstance(cause.parent_node, DictConfig):
        keys = ", ".join(map(str, cause.parent_node))
        return f"{cause.full_key} is not one value: give {cause.full_key}.KEY, where KEY is one of {keys}"
    if isinstance(error, InstantiationException) and isinstance(cause, ValueError):  # a sweeper's own words
        return " ".join(str(cause).split())
    if isinstance(cause, OmegaConfBaseException):
        return f"{cause.full_key}: {str(cause).splitlines()[0]}"
    return " ".join(str(error).split()) or type(error).__name__


class Parser(argparse.ArgumentParser):
    """A command's arguments; what is wrong with them is one line, as the rest of the program says it."""

    def error(self, message: str) -> NoReturn:
        """Raises Refused for what argparse does not understand."""
        raise Refused(f"{message}; see {self.prog} --help")


def check_text(arguments: list[str]) -> None:
    """Raises Refused for an argument that is not UTF-8, which no file could hold."""
    for word in arguments:
        try:
            word.encode()
        except UnicodeEncodeError as error:
            raise Refused(f"{word[:40]!r} is not UTF-8 text") from error


def to_stderr(message: str) -> None:
    """Prints one message of the program to standard error: one line, however long what it quotes is."""
    shown = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in message)
    if len(shown) > LONGEST:
        shown = f"{shown[: LONGEST - TAIL]} ... {shown[-TAIL:]}"
    print(f"prune_lab: {shown}", file=sys.stderr)  # noqa: T201
