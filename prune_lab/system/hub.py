"""The Hugging Face Hub: whether something can be had from it, and its refusals in plain words."""

from __future__ import annotations

import socket
from pathlib import Path
from urllib.parse import urlparse

from prune_lab.errors import Refused


def as_folder(name: str) -> Path | None:
    """The folder of that name on this machine, if there is one; ~ is the home folder."""
    try:
        folder = Path(name).expanduser()
        return folder if name and folder.is_dir() else None
    except (OSError, ValueError, RuntimeError):  # no path at all: too long, with a NUL, ~ of nobody
        return None


def is_hub_id(name: str) -> bool:
    """Whether a repository on the Hub could have that name."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return bool(name)


def cached_file(name: str, file: str, revision: str | None, repo_type: str = "model") -> Path | None:
    """Where a file of a repository lies in the Hub's cache on this machine, if it does."""
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
    """Why there is no way to the Hub; None where there may be one."""
    from huggingface_hub import constants

    host = urlparse(constants.ENDPOINT).hostname or "huggingface.co"
    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    return None if _resolves(host) else f"{host} cannot be reached"


def why_not(name: str, error: BaseException) -> str:
    """What went wrong with a repository, short, with what to do where the Hub itself refused."""
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
