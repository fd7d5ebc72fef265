"""Calibration text: the dataset's own calibration split, or another text, used whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prune_lab.errors import Refused
from prune_lab.text.corpus import Corpus
from prune_lab.text.hub_datasets import C4, Wikitext2
from prune_lab.text.source import Calibration, TextSource
from prune_lab.text.stdlib import Stdlib
from prune_lab.text.text_files import TextFiles
from prune_lab.text.unsplit import UnsplitCorpus


def calibration_corpus(calibration: Calibration, run: Corpus, tokenizer: Any) -> UnsplitCorpus | None:
    """The text that `calibration` names, or None where it is the dataset's own calibration split.

    A text that is named is named for this: it is used whole, less the documents that are also in the training,
    validation or test text of the run. Raises Refused where that leaves nothing.
    """
    if calibration.source == "own":
        return None
    try:
        whole = _source(calibration).unsplit()
    except Refused as error:  # a corpus of the Hub speaks of its own keys
        raise Refused(str(error).replace("dataset.name", "dataset.calibration.name")) from error
    return whole.for_tokenizer(tokenizer).apart_from(run)


def calibration_files(calibration: Calibration) -> list[Path]:
    """The files on this machine that `calibration` names, as far as they may be edited while a process runs."""
    if calibration.source == "own":
        return []
    try:
        return _source(calibration).files()
    except Refused:  # calibration_corpus says why, where it is needed
        return []


def _source(calibration: Calibration) -> TextSource:
    if calibration.source == "text":
        return TextFiles(path=calibration.name or "", column=calibration.column)
    place: dict[str, Any] = {} if calibration.name is None else {"name": calibration.name}
    if calibration.source == "wikitext2":
        return Wikitext2(**place)
    return C4(**place) if calibration.source == "c4" else Stdlib()
