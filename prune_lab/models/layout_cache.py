"""Layouts and units that were found, kept in the cache by config: another model of it need not be looked at again.

What is found is a matter of shapes and of what multiplies what. Weights can hide it (a pruned head moves nothing), so
what was not found is not kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from prune_lab import cache
from prune_lab.fingerprint import digest_of, libraries, source_sha256

Found = TypeVar("Found")


class _NotKeptError(Exception):
    """Signal that what was found is for this model alone."""


def kept(
    kind: str,
    model: Any,
    find: Callable[[], Found],
    read: Callable[[dict[str, Any]], Found],
    is_whole: Callable[[Found], bool] = lambda found: True,
) -> Found:
    """A dataclass that `find` makes of a model, read from the cache where one of its config was kept.

    read: the dataclass of what asdict and JSON made of it. is_whole: whether it may be kept.
    """
    found: list[Found] = []

    def make(_: Path) -> dict[str, Any]:
        found.append(find())
        if not is_whole(found[0]):
            raise _NotKeptError
        return {"found": asdict(found[0])}  # type: ignore[call-overload]

    try:
        with cache.entry("layout", _key(kind, model), make) as entry:
            return found[0] if found else read(entry.metadata["found"])
    except _NotKeptError:
        return found[0]


def _key(kind: str, model: Any) -> str:
    """Key of what is found of a model of this config, in this number type, on this sort of device."""
    sizes = sorted((name, tuple(parameter.shape)) for name, parameter in model.named_parameters())
    of = {"config": model.config.to_dict(), "class": type(model).__name__, "sizes": sizes}
    place = {"dtype": str(model.dtype), "device": model.device.type}
    return digest_of([kind, of, place, libraries(), source_sha256("models")])
