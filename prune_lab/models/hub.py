"""Whether a Hub id can be had at all: asked first, since the Hub's client retries for half a minute offline."""

from __future__ import annotations

import socket
from urllib.parse import urlparse

from prune_lab.errors import Refused


def check_available(name: str, revision: str | None) -> None:
    """Refuses a Hub id that is neither in the Hub's cache on this machine nor within reach."""
    from huggingface_hub import constants, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
        return
    host = urlparse(constants.ENDPOINT).hostname or "huggingface.co"
    if constants.is_offline_mode():
        reason = "HF_HUB_OFFLINE is set"
    elif not _resolves(host):
        reason = f"{host} cannot be reached"
    else:
        return
    raise Refused(
        f"model.name={name!r} is no folder here and is not in the Hub's cache, and {reason}: give a folder with "
        "config.json and *.safetensors, or a network"
    )


def _resolves(host: str) -> bool:
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True
