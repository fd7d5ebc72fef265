"""Overrides as they are typed: which of them Hydra cannot read, or reads as something else, and how to write them.

Hydra has a grammar for values: brackets, quotes, commas, = and ${ mean something in it. A path may hold any of them.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from prune_lab.config import moved
from prune_lab.errors import Refused
from prune_lab.system.files import as_path

# Keys whose value is a file or a folder, or may be one.
PATHS = (
    "model.name", "dataset.path", "dataset.test_path", "dataset.name", "dataset.calibration.name", "recovery.teacher",
    "measure.task_path",
)  # fmt: skip
_LONGEST = 120  # characters of an override that is shown
_SPECIAL = re.compile(r"[\"$`!]|\\(?=[\\\n]|$)")  # to a shell, between double quotes


def check(words: Iterable[str], sweeps: bool) -> None:
    """Raises Refused for an override that Hydra cannot read, or reads as something else than the path that is there.

    sweeps: -m was given, so that commas make a sweep.
    """
    for word in words:
        try:
            override = parse(word)
        except HydraException as error:
            raise Refused(unreadable(word, str(error))) from error
        if (now := moved.instead_of(override)) is not None:
            raise Refused(f"{_shown(word)}: there is no such option any more; {now}")
        key, text = _split(word)
        if key in PATHS and _exists(text) and not all(map(_exists, _paths(override))):
            is_sweep = override.is_sweep_override()
            reads = "several values" if is_sweep else f"{_reading(override)!r}"
            sweep = "" if not is_sweep or sweeps else " (for a sweep -m is missing)"
            raise Refused(f"{_shown(word)}: Hydra reads {reads}{sweep}; {_instead(key, text)}")


def unreadable(word: str, reason: str) -> str:
    """Message for an override that Hydra's grammar cannot read."""
    key, text = _split(word)
    said = " ".join(re.sub(r"See https?://\S+.*", "", reason).split())[:100]
    if not key:
        return f"{_shown(word)}: Hydra cannot read it ({said}): an override is KEY=VALUE"
    return f"{_shown(word)}: Hydra cannot read the value ({said}); {_instead(key, text)}"


def ambiguous(word: str) -> str:
    """Message for commas without -m."""
    key, text = _split(word)
    as_list = f"{key}=[{text}]"
    hint = f"for a list {as_shell(as_list)}, " if _parses(as_list) else ""
    return f"{_shown(word)}: commas make a sweep, which needs -m (--multirun); {hint}{_instead(key, text)}"


def as_override(key: str, text: str) -> str | None:
    """The override by which Hydra gives `key` exactly this text; None where its grammar cannot say it."""
    quoted = [QuotedString(literal(text), quote).with_quotes() for quote in (Quote.single, Quote.double)]
    plain = [text] if not re.search(r"[\s'\"\\]", text) else []
    return next((word for value in (*plain, *quoted) if _gives(word := f"{key}={value}", text)), None)


def literal(text: str) -> str:
    """The text as OmegaConf reads it again: ${ in it begins no reference."""
    return re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + "\\${", text)


def readable(word: str) -> str:
    """A job's override as Hydra can read it: Optuna's sweeper takes the quotes off what it hands on."""
    try:
        is_read = not parse(word).is_sweep_override()
    except HydraException:
        is_read = False
    key, text = _split(word)
    return word if is_read or not key else as_override(key, text) or word


def as_shell(word: str) -> str:
    """A word as it is typed into a shell."""
    if not word.isprintable():
        return "$'" + "".join(_escaped(letter) for letter in word) + "'"
    if "'" in word and not _SPECIAL.search(word):
        return f'"{word}"'
    return shlex.quote(word)


def parse(word: str) -> Override:
    """One override; raises HydraException."""
    return _PARSER.parse_override(word)


_PARSER = OverridesParser.create()


def _split(word: str) -> tuple[str, str]:
    """Key and text of an override; no key where there is none."""
    key, equals, text = word.partition("=")
    return (key, text) if equals and re.fullmatch(r"[+~]{0,2}[\w./@:]+", key) else ("", word)


def _instead(key: str, text: str) -> str:
    """Hint: the spelling of an override whose value is meant as text."""
    quotes = text[:1] if len(text) > 1 and text[:1] == text[-1:] and text[0] in "'\"" else ""
    meant = text[1:-1] if quotes and not _exists(text) else text
    word = as_override(key, meant)
    return "no quoting makes a text of it" if word is None else f"for a text write {as_shell(word)}"


def _gives(word: str, text: str) -> bool:
    """True where Hydra gives the key this text, after OmegaConf has resolved references."""
    try:
        override = parse(word)
        value: Any = None if override.is_sweep_override() else override.value()
        return isinstance(value, str) and OmegaConf.create({"x": value})["x"] == text
    except (HydraException, OmegaConfBaseException):
        return False


def _parses(word: str) -> bool:
    try:
        parse(word)
    except HydraException:
        return False
    return True


def _paths(override: Override) -> list[Any]:
    """The values that a job could get from it."""
    value = override._value
    if isinstance(value, ChoiceSweep):
        return [entry.text if isinstance(entry, QuotedString) else entry for entry in value.list]
    return [None if override.is_sweep_override() else _reading(override)]


def _reading(override: Override) -> Any:
    """The value as a job gets it."""
    try:
        return OmegaConf.create({"x": override.value()})["x"]
    except OmegaConfBaseException:
        return override.value()


def _exists(text: Any) -> bool:
    try:
        return isinstance(text, str) and text != "" and as_path(text).exists()
    except (OSError, ValueError, RuntimeError):  # no path at all
        return False


def _shown(word: str) -> str:
    return word if len(word) <= _LONGEST else f"{word[:_LONGEST]}..."


def _escaped(letter: str) -> str:
    if letter in "\\'":
        return f"\\{letter}"
    return letter if letter.isprintable() else "".join(f"\\x{byte:02x}" for byte in letter.encode())
