"""Where calibration text comes from: the dataset's own calibration split, or another dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prune_lab.errors import Refused
from prune_lab.text.corpus import Corpus
from prune_lab.text.files import TextFiles
from prune_lab.text.hub import C4, Wikitext2
from prune_lab.text.source import Calibration, TextSource
from prune_lab.text.stdlib import Stdlib


def calibration_corpus(calibration: Calibration) -> Corpus | None:
    """The corpus of another dataset that `calibration` names, or None where it is the dataset's own."""
    if calibration.source == "own":
        return None
    try:
        return _source(calibration).corpus()
    except Refused as error:  # that dataset speaks of its own keys
        text = str(error).replace("dataset.name", "dataset.calibration.name")
        raise Refused(text.replace("dataset.path", "dataset.calibration.name")) from error


def calibration_files(calibration: Calibration) -> list[Path]:
    """The files on this machine that `calibration` names, as far as they may be edited while a process runs."""
    return [] if calibration.source == "own" else _source(calibration).files()


def _source(calibration: Calibration) -> TextSource:
    if calibration.source == "text":
        return TextFiles(path=calibration.name or "")
    place: dict[str, Any] = {} if calibration.name is None else {"name": calibration.name}
    if calibration.source == "wikitext2":
        return Wikitext2(**place)
    if calibration.source == "c4":
        return C4(train_documents=1, test_documents=1, **place)  # only its calibration documents are wanted
    return Stdlib()
