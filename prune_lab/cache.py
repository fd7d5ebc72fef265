"""Where what outlives a run is kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """The folder of PRUNE_LAB_CACHE, or prune_lab in the user's cache directory."""
    named = os.environ.get("PRUNE_LAB_CACHE")
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "prune_lab"
