"""Composition of a configuration inside somebody else's Python process, who may use Hydra himself.

Hydra keeps what it knows in singletons, and OmegaConf its resolvers in a table of the process: both are as they were
when the work is done.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra._internal.utils import create_config_search_path, get_args_parser
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.singleton import Singleton
from hydra.core.utils import setup_globals
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.basecontainer import BaseContainer
from omegaconf.errors import OmegaConfBaseException

from prune_lab import explain
from prune_lab.config import command_line, overrides, recipes
from prune_lab.config.composing import Loader
from prune_lab.config.parts import CONF_DIR, register_schema
from prune_lab.errors import Refused


@contextmanager
def own_hydra() -> Iterator[None]:
    """Context in which Hydra's state is this package's own, as far as it could be seen afterwards."""
    Plugins.instance()  # looks for plugins once in a process; they put options into the store that is kept
    singletons: dict[Any, Any] = dict(Singleton._instances)
    resolvers = dict(BaseContainer._resolvers)
    own = {kind: one for kind, one in singletons.items() if kind not in (GlobalHydra, HydraConfig)}
    Singleton._instances = own | {ConfigStore: copy.deepcopy(ConfigStore.instance())}
    try:
        setup_globals()
        register_schema()
        yield
    finally:
        Singleton._instances = singletons
        BaseContainer._resolvers = resolvers


def composed(words: Sequence[str], recipe: str | None = None, recipes_folder: str | Path | None = None) -> DictConfig:
    """The configuration of one run, with Hydra's own part, by overrides and perhaps a recipe; inside `own_hydra`.

    Raises Refused for whatever a command line would be refused for before its run, with the same words.
    """
    arguments = [*(["-cd", str(recipes_folder)] if recipes_folder is not None else [])]
    arguments += ["-cn", recipe] if recipe is not None else []
    try:
        explain.check_text([*arguments, *words])
        if flags := [word for word in words if word.startswith("-")]:
            raise Refused(
                f"{flags[0]}: flags are for the command line: from Python give overrides, and loop for a sweep"
            )
        command_line.check_folder()
        arguments = command_line.in_order([*arguments, *words])
        recipes.check(arguments)
        command_line.check_overrides(arguments)
        return _loaded(arguments)
    except (HydraException, OmegaConfBaseException, OSError) as error:
        raise Refused(command_line.said_of(error)) from error


def _loaded(arguments: list[str]) -> DictConfig:
    known, _ = get_args_parser().parse_known_args(arguments)
    search_path = create_config_search_path(CONF_DIR)
    if known.config_dir is not None:
        place, before = f"file://{os.path.abspath(known.config_dir)}", SearchPathQuery(provider="schema")  # noqa: PTH100
        search_path.prepend(provider="command-line", path=place, anchor=before)
    config = Loader(search_path).load_configuration(known.config_name or "config", known.overrides, RunMode.RUN)
    if config.hydra.mode == RunMode.MULTIRUN:
        raise Refused(
            "hydra.mode=MULTIRUN makes a sweep, which is for the command line: from Python give overrides for one run "
            "(hydra.mode=RUN with a recipe that is a sweep), and loop over them"
        )
    folder = Path(str(OmegaConf.to_container(config.hydra.run, resolve=True)["dir"])).absolute()  # type: ignore[index,call-overload]
    with read_write(config.hydra), open_dict(config.hydra):
        config.hydra.runtime.output_dir = str(folder)
    HydraConfig.instance().set_config(config)
    return config


def without_hydra(config: DictConfig) -> tuple[DictConfig, Any]:
    """The configuration of the run itself, and Hydra's part of it."""
    task = copy.deepcopy(config)
    with read_write(task), open_dict(task):
        del task["hydra"]
    return task, config.hydra


def as_words(key: str, value: Any) -> str:
    """The override that gives a key a value of Python; raises Refused where Hydra's grammar has none for it."""
    value = _plain(value)
    if isinstance(value, str | Path):
        word = overrides.as_override(key, str(value))
        if word is not None:
            return word
    elif value is None or isinstance(value, bool | int | float | list | tuple | dict):
        return f"{key}={_literal(key, value)}"
    raise Refused(f"{key}={value!r}: no override can say this value")


def _plain(value: Any) -> Any:
    """A number of NumPy or PyTorch as one of Python; anything else as it is."""
    is_number = type(value).__module__.partition(".")[0] in ("numpy", "torch") and getattr(value, "ndim", None) == 0
    return value.item() if is_number else value


def _literal(key: str, value: Any) -> str:
    value = _plain(value)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{','.join(_literal(key, one) for one in value)}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{name}:{_literal(key, one)}" for name, one in value.items()) + "}"
    return as_words(key, str(value)).partition("=")[2]
