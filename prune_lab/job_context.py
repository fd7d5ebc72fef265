"""Where a job stands: its folder, its sweep, and the words that started it."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class JobContext:
    """A job's context; `sweep` is the sweep's folder, None for a single run."""

    folder: Path
    sweep: Path | None = None
    job: str = ""
    choices: dict[str, str] = field(default_factory=dict)  # the option chosen in each group
    overrides: list[str] = field(default_factory=list)
    recipe: str = "config"
    recipes: str | None = None  # the folder given with -cd, from the working folder
    not_applicable: dict[str, list[str]] = field(default_factory=dict)  # keys of a group that its option lacks
    removed: list[str] = field(default_factory=list)  # those of them that the recipe itself gives

    @property
    def command(self) -> str:
        """The line for a shell in the working folder that repeats this job by itself."""
        folder = (
            [] if self.recipes is None else ["-cd", self.recipes if self.recipes[0] != "-" else f"./{self.recipes}"]
        )
        recipe = [] if self.recipe == "config" else ["-cn", self.recipe]
        alone = ["hydra.mode=RUN"] if self.sweep is not None and folder else []  # a recipe may say that it is a sweep
        without = [f"~{key}" for key in self.removed]
        return shlex.join(["python", "-m", "prune_lab", *folder, *recipe, *self.overrides, *without, *alone])
