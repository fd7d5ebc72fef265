"""Errors of Hydra and OmegaConf in one line: key, value, what is allowed."""

from __future__ import annotations

import sys

from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException


def one_line(error: BaseException) -> str:
    """The message of `error` as one line, with the allowed keys where a key is unknown."""
    cause = error.__cause__
    if isinstance(cause, ConfigKeyError | ConfigAttributeError) and isinstance(cause.parent_node, DictConfig):
        allowed = ", ".join(str(key) for key in cause.parent_node if key not in ("_target_", "hydra"))
        return f"{cause.full_key}: no such key; allowed here are {allowed}"
    if isinstance(cause, OmegaConfBaseException):
        return f"{cause.full_key}: {str(cause).splitlines()[0]}"
    return " ".join(str(error).split()) or type(error).__name__


def to_stderr(message: str) -> None:
    """Prints one message of the program to standard error."""
    print(f"prune_lab: {message}", file=sys.stderr)  # noqa: T201
