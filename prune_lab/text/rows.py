"""Rows of text, JSON and parquet files, read through `datasets` as they are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_rows(kind: str, files: str | list[str], **options: Any) -> Iterator[dict[str, Any]]:
    """The rows of files of one kind (text, json, parquet) in order; raises what the readers of `datasets` raise.

    Nothing is copied into a cache.
    """
    import datasets

    if not files:
        return
    tell_nobody()
    yield from datasets.load_dataset(kind, data_files=files, split="train", streaming=True, **options)


def has_rows(file: str) -> bool:
    """Whether there is anything to read in a file: the readers of `datasets` fail on one without rows."""
    import pyarrow.parquet

    if file.endswith(".parquet"):
        return bool(pyarrow.parquet.read_metadata(file).num_rows)
    return Path(file).stat().st_size > 0


def tell_nobody() -> None:
    """Keeps `datasets` to itself: it would report each use to its makers' server, and wait for it without a network."""
    import datasets
    from datasets.utils import logging

    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    logging.set_verbosity(logging.CRITICAL)  # it logs the errors that it raises
