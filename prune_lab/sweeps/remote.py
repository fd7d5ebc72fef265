"""Jobs that a Ray cluster runs, which was there before: its workers know neither our folder nor our environment.

The launchers joblib and submitit start a job's process themselves, and it inherits both. What Ray's workers have to
know goes with Hydra's own singletons, which every launcher hands to its jobs: a configuration would be written to
files, and an address of a store can hold a password.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Quote, QuotedString
from hydra.core.singleton import Singleton
from omegaconf import DictConfig, open_dict, read_write

from prune_lab.errors import Refused
from prune_lab.tracking.links import store_uri

_OURS = ("MLFLOW_", "PRUNE_LAB_", "HF_")


class _Luggage(metaclass=Singleton):
    """Files and settings that a job takes along; empty where it inherits everything."""

    def __init__(self) -> None:
        self.environment: dict[str, str] = {}
        self.mark: Path | None = None


def pack(config: DictConfig, folder: Path) -> None:
    """Has every job of the sweep write into `folder`, an absolute path, and gives Ray's workers what they lack."""
    with read_write(config.hydra), open_dict(config.hydra):
        config.hydra.sweep.dir = str(folder)
        value = QuotedString(str(folder).replace("${", "\\${"), Quote.double).with_quotes()
        config.hydra.overrides.hydra.append(f"hydra.sweep.dir={value}")
    luggage = _Luggage.instance()
    luggage.environment, luggage.mark = {}, None
    if config.hydra.runtime.choices.get("hydra/launcher") != "ray":
        return
    init = config.hydra.launcher.ray.init
    with read_write(init), open_dict(init):
        init.setdefault("log_to_driver", False)  # lines of several jobs, mixed; their outcome is on the leaderboard
        if init.get("address") or "RAY_ADDRESS" in os.environ:
            init.setdefault("object_store_memory", None)  # the launcher's size is refused by a cluster that runs
    luggage.environment = {name: value for name, value in os.environ.items() if name.startswith(_OURS)}
    luggage.environment["MLFLOW_TRACKING_URI"] = store_uri()
    luggage.mark = folder / f".sweep-{secrets.token_hex(8)}"
    folder.mkdir(parents=True, exist_ok=True)
    luggage.mark.touch()


def unpack(hydra_config: Any) -> None:
    """Puts the process of a job where its command was given; raises Refused on a machine that lacks the folders."""
    luggage = _Luggage.instance()
    if luggage.mark is None:
        return
    os.environ.update(luggage.environment)
    working = Path(hydra_config.runtime.cwd)
    if not (working.is_dir() and luggage.mark.exists()):
        raise Refused(
            f"hydra/launcher=ray: {luggage.mark.parent} of the machine that started the sweep is not on "
            f"{os.uname().nodename}: start the sweep in a folder that all nodes share"
        )
    os.chdir(working)


def clear() -> None:
    """Takes the mark away again."""
    mark = _Luggage.instance().mark
    if mark is not None:
        mark.unlink(missing_ok=True)
