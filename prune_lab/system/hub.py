"""The Hugging Face Hub: whether something can be had from it, and its refusals in plain words."""

from __future__ import annotations

import socket
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import getproxies, proxy_bypass

from prune_lab.errors import Refused
from prune_lab.system.files import as_path

_PATIENCE = 15.0  # seconds that a proxy has to answer


def as_folder(name: str) -> Path | None:
    """The folder of that name on this machine, if there is one; ~ is the home folder."""
    try:
        folder = as_path(name)
        return folder if name and folder.is_dir() else None
    except (OSError, ValueError):  # no path at all: too long, with a NUL
        return None


def as_place(name: str) -> Path | None:
    """The folder or regular file of that name on this machine, if there is one."""
    if (folder := as_folder(name)) is not None:
        return folder
    try:
        file = as_path(name)
        return file if name and file.is_file() else None
    except (OSError, ValueError):
        return None


def is_hub_id(name: str) -> bool:
    """True where a repository on the Hub could have that name."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return bool(name)


def cached_file(name: str, file: str, revision: str | None, repo_type: str = "model") -> Path | None:
    """Path of a repository's file in the Hub's cache on this machine, or None."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, file, revision=revision, repo_type=repo_type)
    return Path(found) if isinstance(found, str) else None


def commit_of(path: Path, file: str) -> str:
    """The commit of a cached file, which lies in snapshots/COMMIT/file."""
    return path.parents[file.count("/")].name


def check_reachable(key: str, name: str) -> None:
    """Refuses what is not in the cache where there is no way to the Hub.

    Asked first, since the Hub's client retries for half a minute without a network.
    """
    if (reason := why_unreachable()) is not None:
        raise Refused(
            f"{key}={name!r} is no folder here and is not in the Hub's cache, and {reason}: give a local folder in the "
            "Hub's layout, or a network"
        )


def download(name: str, revision: str | None) -> str:
    """The folder in the Hub's cache with all of a model's files, fetched where they are missing; raises Refused."""
    from huggingface_hub import snapshot_download

    files = ["*.json", "*.jinja", "model*.safetensors", "tokenizer*", "*.model", "*.txt", "README.md"]
    try:
        return str(snapshot_download(name, revision=revision, allow_patterns=files))
    except Exception as error:  # the client has many
        raise Refused(f"model.name={name!r} cannot be loaded: {why_not(name, error)}") from error


def why_unreachable() -> str | None:
    """Reason that there is no way to the Hub; None where there may be one."""
    from huggingface_hub import constants

    host = urlparse(constants.ENDPOINT).hostname or "huggingface.co"
    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    if (proxy := proxy_for(constants.ENDPOINT)) is not None:  # it looks names up; this machine need not be able to
        failed = _why_not_through(proxy, constants.ENDPOINT)
        return None if failed is None else f"the proxy {shown_proxy(proxy)} does not lead to {host} ({failed})"
    return None if _resolves(host) else f"{host} cannot be reached"


def proxy_for(address: str) -> str | None:
    """The proxy that the environment names for an address, as the Hub's client finds it; None where there is none."""
    parts = urlparse(address)
    if not parts.hostname or proxy_bypass(parts.netloc):
        return None
    proxies = getproxies()
    return proxies.get(parts.scheme) or proxies.get("all")


def shown_proxy(proxy: str) -> str:
    """A proxy's address without its user and password."""
    head, at, place = proxy.rpartition("@")
    return f"{head.partition('://')[0]}://***@{place}" if at and "://" in head else place


def _why_not_through(proxy: str, address: str) -> str | None:
    """Reason that the Hub's client gets no answer through a proxy; None where it gets one, whatever it is.

    Asked once and for seconds: a download would be tried again and again, for minutes where the proxy says nothing.
    """
    from huggingface_hub.utils import get_session

    try:
        get_session().head(address, timeout=_PATIENCE)
    except Exception as error:  # the client has many; one for a proxy that needs a package
        said = " ".join(str(error).split())[:150] or type(error).__name__
        return said.replace(proxy, shown_proxy(proxy))
    return None


def why_not(name: str, error: BaseException) -> str:
    """Reason that a repository could not be read, short, with what to do where the Hub itself refused."""
    chain = [error]
    while (inner := chain[-1].__cause__ or chain[-1].__context__) is not None and inner not in chain:
        chain.append(inner)
    kinds = {type(link).__name__ for link in chain}
    if "GatedRepoError" in kinds:
        return "it is gated: accept its licence on its page on the Hub, log in with 'hf auth login', then try again"
    if "RevisionNotFoundError" in kinds:
        return "there is no such revision on the Hub"
    if "RepositoryNotFoundError" in kinds:
        return f"there is no {name} on the Hub, or it is private: log in with 'hf auth login' if it is yours"
    return " ".join(str(error).split())[:200] or type(error).__name__


def _resolves(host: str) -> bool:
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True
