"""dataset=stdlib: the source text of the running Python's standard library."""

from __future__ import annotations

import os
import platform
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from prune_lab.errors import Refused
from prune_lab.text.corpus import Documents
from prune_lab.text.source import TextSource
from prune_lab.text.splits import SPLITS, split_of
from prune_lab.text.unsplit import UnsplitCorpus

_LEFT_OUT = {
    "site-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data", "ensurepip",
    "turtledemo", "__pycache__",
}  # fmt: skip


@dataclass(frozen=True)
class Stdlib(TextSource):
    """A module is a document; its split is decided by the hash of its path below the library's folder."""

    def corpus(self) -> Documents:
        """Reads every module that has text, in the order of their paths."""
        library = Path(sysconfig.get_paths()["stdlib"])
        texts = {path: text for path in _modules(library) if (text := _read(library / path)).strip()}
        if not texts:
            raise Refused(f"dataset=stdlib: no Python source in {library}: use dataset=text dataset.path=...")
        train, calibration, validation, test = (
            tuple(text for path, text in texts.items() if split_of(path) == name) for name in SPLITS
        )
        return Documents("stdlib", train, calibration, validation, test, {"python": platform.python_version()})

    def unsplit(self, key: str = "dataset.calibration") -> UnsplitCorpus:
        """All modules."""
        corpus = self.corpus()
        return UnsplitCorpus(corpus.name, corpus, corpus.provenance)


def _modules(library: Path) -> list[str]:
    """Paths of the modules relative to the library, with /, sorted."""
    found = []
    for place, folders, files in os.walk(library):
        folders[:] = [name for name in folders if name not in _LEFT_OUT]  # never entered: site-packages is large
        found += [(Path(place) / name).relative_to(library).as_posix() for name in files if name.endswith(".py")]
    return sorted(found)


def _read(path: Path) -> str:
    """The module's text; line ends become \\n, so that the text is the same on every system."""
    return path.read_text(encoding="utf-8", errors="replace")
