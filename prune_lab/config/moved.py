"""Options of earlier versions that are chosen otherwise now, and what to choose in their place."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from hydra.core.override_parser.types import ChoiceSweep, Override, QuotedString

ON_COMMAND_LINE, IN_DEFAULTS = "{}={}", "'override {}: {}' in the recipe's defaults"
_SWITCH = dict.fromkeys(("true", "yes", "on", "y", "1"), "hf") | dict.fromkeys(("false", "no", "off", "n", "0"), "none")
# By group what an option was, and the group and option that it is now.
_NOW: dict[str, dict[str, tuple[str, str]]] = {
    "export": {was: ("export", option) for was, option in _SWITCH.items()},
    "post": {"sparse_bitmask": ("export", "bitmask")},
}


def instead(group: str, options: Iterable[Any], form: str = ON_COMMAND_LINE) -> str | None:
    """Replacement for options of a group; None where none of them is of an earlier version."""
    earlier = _NOW.get(group, {})
    found = [earlier[name] for option in options if (name := str(option).lower()) in earlier]
    return f"give {' or '.join(form.format(*now) for now in dict.fromkeys(found))}" if found else None


def instead_of(override: Override) -> str | None:
    """Replacement for an override, which may be a sweep; None where it chooses nothing of earlier versions."""
    value = override._value
    entries = value.list if isinstance(value, ChoiceSweep) else [value]
    texts = [entry.text if isinstance(entry, QuotedString) else entry for entry in entries]
    return instead(str(override.key_or_group).lstrip("+"), texts)
