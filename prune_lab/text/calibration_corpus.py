"""Calibration text: the dataset's own calibration split, or another text, used whole; or a mix of several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prune_lab.errors import Refused
from prune_lab.text.corpus import Corpus
from prune_lab.text.hub_datasets import C4, Wikitext2
from prune_lab.text.source import Calibration, MixPart, TextSource
from prune_lab.text.stdlib import Stdlib
from prune_lab.text.text_files import TextFiles
from prune_lab.text.unsplit import UnsplitCorpus, content_digest


def calibration_corpora(calibration: Calibration, run: Corpus, tokenizer: Any) -> list[UnsplitCorpus | None]:
    """The text of each part that `calibration` names; None for the dataset's own calibration split.

    A text that is named is named for this: it is used whole, less the documents that are also in the training,
    validation or test text of the run, or in an earlier part or the dataset's own calibration split where that is a
    part. Raises Refused where that leaves nothing.
    """
    taken: set[int] = set()
    if len(calibration.parts) > 1 and any(part.source == "own" for part in calibration.parts):
        taken |= {content_digest([text]) for text in run.split("calibration")}
    found: list[UnsplitCorpus | None] = []
    for key, part in _keyed(calibration):
        if part.source == "own":
            found.append(None)
            continue
        try:
            whole = _source(part).unsplit(key).for_tokenizer(tokenizer)
        except Refused as error:  # a corpus of the Hub speaks of its own keys
            raise Refused(str(error).replace("dataset.name", f"{key}.name")) from error
        found.append(whole.apart_from(run, taken))
        taken |= whole.digests.keys()
    return found


def calibration_files(calibration: Calibration) -> list[Path]:
    """The files on this machine that `calibration` names, as far as they may be edited while a process runs."""
    return [file for _, part in _keyed(calibration) if part.source != "own" for file in _files(part)]


def _keyed(calibration: Calibration) -> list[tuple[str, MixPart]]:
    """The parts, each with its key in refusals."""
    keys = [f"dataset.calibration.mix[{index}]" for index in range(len(calibration.mix))] or ["dataset.calibration"]
    return list(zip(keys, calibration.parts, strict=True))


def _files(part: MixPart) -> list[Path]:
    try:
        return _source(part).files()
    except Refused:  # calibration_corpora says why, where it is needed
        return []


def _source(part: MixPart) -> TextSource:
    if part.source == "text":
        return TextFiles(path=part.name or "", column=part.column)
    place: dict[str, Any] = {} if part.name is None else {"name": part.name}
    if part.source == "wikitext2":
        return Wikitext2(**place)
    return C4(**place) if part.source == "c4" else Stdlib()
