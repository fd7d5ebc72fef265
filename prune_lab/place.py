"""Where a job stands: its folder, its sweep, and the words that started it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Place:
    """A job's place; `sweep` is the sweep's folder, None for a single run."""

    folder: Path
    sweep: Path | None = None
    job: str = ""
    choices: dict[str, str] = field(default_factory=dict)  # the option chosen in each group
    overrides: list[str] = field(default_factory=list)
    recipe: str = "config"

    @property
    def command(self) -> str:
        """The command line that repeats this job by itself."""
        recipe = [] if self.recipe == "config" else ["-cd", "experiments", "-cn", self.recipe]
        return " ".join(["python -m prune_lab", *recipe, *self.overrides])
