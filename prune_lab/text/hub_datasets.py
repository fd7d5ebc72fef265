"""dataset=wikitext2 and dataset=c4: the corpora that pruning papers measure on, from the Hugging Face Hub.

A file is read from a local folder in the repository's layout, else from the Hub's cache on this machine, else from the
Hub, through `datasets` where it is streamed from there: rows with a column `text`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import ClassVar

from prune_lab.errors import Refused
from prune_lab.system.hub import as_folder, cached_file, check_reachable, commit_of, is_hub_id, why_not
from prune_lab.text.corpus import JOIN, Documents
from prune_lab.text.rows import read_rows
from prune_lab.text.source import TextSource
from prune_lab.text.splits import by_hash
from prune_lab.text.unsplit import UnsplitCorpus

_HEADING = re.compile(r" = [^=].*[^=] = \n?")  # of an article; a section's has more signs


@dataclass(frozen=True)
class HubText(TextSource):
    """A corpus on the Hub. `name` may be a local folder in the repository's layout instead."""

    seq_len: int = 2048
    name: str = ""
    revision: str | None = None

    def files(self) -> list[Path]:
        """Files of a local folder; those from the Hub are identified by their commit."""
        folder = as_folder(self.name)
        return [] if folder is None else [path for path in folder.rglob("*") if path.is_file()]

    def rows(self, file: str, keep: bool) -> tuple[Iterator[str], str]:
        """The texts of a file's rows in order, and the commit it comes from ("local folder" where it has none).

        `keep` downloads the file into the Hub's cache; else its rows are streamed. Raises Refused where the file is
        not to be had.
        """
        source, commit = self._locate(file, keep)
        return self._read(source), commit

    def _locate(self, file: str, keep: bool) -> tuple[str, str]:
        folder = as_folder(self.name)
        if folder is not None:
            if not (folder / file).is_file():
                raise Refused(f"dataset.name={self.name!r} has no file {file}: give a folder in the Hub's layout")
            return str(folder / file), "local folder"
        if not is_hub_id(self.name):
            raise Refused(f"dataset.name={self.name[:200]!r} is neither a folder here nor a Hub id such as allenai/c4")
        if (path := cached_file(self.name, file, self.revision, "dataset")) is not None:
            return str(path), commit_of(path, file)
        check_reachable("dataset.name", self.name)
        from huggingface_hub import HfApi, hf_hub_download

        try:
            if not keep:
                commit = str(HfApi().dataset_info(self.name, revision=self.revision).sha)
                return f"hf://datasets/{self.name}@{commit}/{file}", commit
            path = Path(hf_hub_download(self.name, file, repo_type="dataset", revision=self.revision))
        except Exception as error:  # the client has many errors of its own: gated, not found, no network ...
            raise Refused(f"dataset.name={self.name!r}: {file} cannot be had: {why_not(self.name, error)}") from error
        return str(path), commit_of(path, file)

    def _read(self, source: str) -> Iterator[str]:
        try:
            if source.startswith("hf://"):
                yield from _streamed(source)
            else:
                yield from (text or "" for _, text, _ in read_rows(Path(source), "text"))
        except Exception as error:  # the readers' own errors
            why = why_not(self.name, error)
            raise Refused(f"dataset.name={self.name!r}: {source} cannot be read: {why}") from error


@dataclass(frozen=True)
class Wikitext2(HubText):
    """WikiText-2, raw (Merity et al., 1609.07843).

    Every row of the test split is a document, the empty ones too: joined by a blank line they are the text on which
    the published perplexities are taken. Training text is cut into its articles.
    """

    name: str = "Salesforce/wikitext"
    FILE: ClassVar[str] = "wikitext-2-raw-v1/{split}-00000-of-00001.parquet"

    def corpus(self) -> Documents:
        """Reads all three splits; articles of the training split are set aside for calibration."""
        rows = {}
        for split in ("train", "validation", "test"):
            found, commit = self.rows(self.FILE.format(split=split), keep=True)
            rows[split] = list(found)
        articles = by_hash(_articles(rows["train"]))
        rest = tuple(text for part in ("train", "validation", "test") for text in articles[part])
        return Documents(
            "wikitext2",
            train=rest,
            calibration=tuple(articles["calibration"]),
            validation=tuple(rows["validation"]),
            test=tuple(rows["test"]),
            provenance={"repository": self.name, "config": "wikitext-2-raw-v1", "revision": commit},
        )

    def unsplit(self, key: str = "dataset.calibration") -> UnsplitCorpus:
        """The articles of the training split: all of those, and nothing that the published figures are taken on."""
        rows, commit = self.rows(self.FILE.format(split="train"), keep=True)
        provenance = {"repository": self.name, "config": "wikitext-2-raw-v1", "revision": commit}
        return UnsplitCorpus("wikitext2", Documents("wikitext2", tuple(_articles(rows)), (), (), ()), provenance)


@dataclass(frozen=True)
class C4(HubText):
    """C4, English (Raffel et al., 1910.10683): the first documents of the first training and validation shards.

    Streamed: nothing but these documents is downloaded. Calibration takes the first `calibration_documents` of the
    training shard, training the `train_documents` after them.
    """

    name: str = "allenai/c4"
    train_documents: int = 20_000
    calibration_documents: int = 2_000
    test_documents: int = 1_100
    TRAIN: ClassVar[str] = "en/c4-train.00000-of-01024.json.gz"
    VALIDATION: ClassVar[str] = "en/c4-validation.00000-of-00008.json.gz"

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("train_documents", "calibration_documents", "test_documents"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)} must be at least 1")

    def corpus(self) -> Documents:
        """Streams as many documents of both shards as are asked for."""
        train_rows, commit = self.rows(self.TRAIN, keep=False)
        held_out, _ = self.rows(self.VALIDATION, keep=False)
        return Documents(
            "c4",
            calibration=tuple(islice(train_rows, self.calibration_documents)),
            train=tuple(islice(train_rows, self.train_documents)),
            test=tuple(islice(held_out, self.test_documents)),
            validation=tuple(islice(held_out, self.test_documents)),
            provenance={"repository": self.name, "config": "en", "revision": commit},
        )

    def unsplit(self, key: str = "dataset.calibration") -> UnsplitCorpus:
        """The calibration documents: of 356,317 in the training shard, the first `calibration_documents`."""
        rows, commit = self.rows(self.TRAIN, keep=False)
        provenance = {"repository": self.name, "config": "en", "revision": commit}
        documents = tuple(islice(rows, self.calibration_documents))
        return UnsplitCorpus("c4", Documents("c4", (), documents, (), ()), provenance)


def _streamed(source: str) -> Iterator[str]:
    """The texts of a file on the Hub, nothing of which is copied into a cache."""
    import datasets

    tell_nobody()
    kind = "parquet" if source.endswith(".parquet") else "json"
    for row in datasets.load_dataset(kind, data_files=source, split="train", streaming=True):
        yield row["text"]


def tell_nobody() -> None:
    """Keeps `datasets` to itself: it would report each use to its makers' server, and wait for it without a network."""
    import datasets
    from datasets.utils import logging

    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    logging.set_verbosity(logging.CRITICAL)  # it logs the errors that it raises


def _articles(rows: Iterable[str]) -> Iterator[str]:
    """Rows put together again, an article each, with the blank line between them that the test split's rows get."""
    article: list[str] = []
    for row in rows:
        if _HEADING.fullmatch(row) and any(part.strip() for part in article):
            yield JOIN.join(article)
            article = []
        article.append(row)
    if any(part.strip() for part in article):
        yield JOIN.join(article)
