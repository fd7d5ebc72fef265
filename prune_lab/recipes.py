"""Guards against recipes: a shared YAML file is untrusted input, and Hydra acts on it before our code runs.

Hydra instantiates the callbacks, launchers and sweepers that a configuration names and sets the environment from
it. So when a command line brings a folder of its own (-cd, -cp), the recipe is composed first, without anything being
instantiated, and refused where it changes a part of `hydra` other than a sweep's parameters or output folders.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hydra import compose, version
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path, get_args_parser
from hydra.core.config_search_path import SearchPathQuery
from hydra.initialize import get_gh_backup, restore_gh_from_backup
from omegaconf import OmegaConf

from prune_lab.config import CONF_DIR
from prune_lab.errors import Refused

_ENGINES = re.compile(r"(hydra\._internal\.core_plugins|hydra_plugins\.hydra_(joblib|submitit|ray|optuna)_\w+)\.[\w.]+")
# Keys of `hydra` that are data. A launcher's `setup` or `python`, a callback or the environment would be commands.
_DATA = re.compile(
    r"mode|sweeper\.params(\..+)?|sweeper\.(max_batch_size|n_trials|n_jobs|direction|study_name|sampler\.(seed|"
    r"n_startup_trials|_target_))|launcher\.(n_jobs|timeout_min|cpus_per_task|gpus_per_node|mem_gb|nodes|"
    r"tasks_per_node|array_parallelism|partition|submitit_folder|max_num_timeout|ray\..+)|overrides\..+|runtime\..+"
    r"|job\.(config_name|override_dirname)|verbose"
)
_FOLDERS = re.compile(r"(run|sweep)\.(dir|subdir)")
_READS_MACHINE = re.compile(r"\$\{\s*(?!now:|hydra:)[\w.]+\s*:")


def check(arguments: list[str]) -> None:
    """Raises Refused where the command line's recipe reaches for more than a recipe may."""
    known, _ = get_args_parser().parse_known_args(arguments)
    if known.config_path is not None:
        raise Refused("-cp would replace the package's own configuration: keep recipes in a folder and give -cd FOLDER")
    if known.config_dir is None:
        return
    folder = Path(known.config_dir).absolute()
    if not folder.is_dir():
        raise Refused(f"-cd {known.config_dir}: there is no such folder")
    _check_groups(folder)
    recipe, stock = _composed(known.config_name or "config", folder), _composed("config", None)
    for key, value in _leaves(recipe).items():
        if isinstance(value, str) and _READS_MACHINE.search(value) and value != _leaves(stock).get(key):
            raise Refused(f"recipe {known.config_name}: {key}={value!r}: a recipe may not read the machine it runs on")
    before, after = _leaves(stock["hydra"]), _leaves(recipe["hydra"])
    for key in sorted(set(before) | set(after)):
        if before.get(key) != after.get(key):
            _check_change(f"recipe {known.config_name}: hydra.{key}", key, after.get(key))


def _check_groups(folder: Path) -> None:
    """A group's file is chosen on the command line, after this check: it must not reach out of its group."""
    for path in folder.rglob("*.y*ml"):
        reaches = re.search(r"^#\s*@package\s+(hydra|_global_)", path.read_text(errors="replace"), re.MULTILINE)
        if path.relative_to(folder).parts[0] == "hydra" or (path.parent != folder and reaches):
            raise Refused(f"{path.relative_to(folder)}: a recipe's folder may not bring options of Hydra itself")


def _composed(name: str, folder: Path | None) -> dict[str, Any]:
    """The configuration as Hydra would compose it, in plain containers; nothing is resolved or instantiated."""
    search_path = create_config_search_path(CONF_DIR)
    if folder is not None:  # the place that hydra.main gives -cd
        search_path.prepend("command-line", f"file://{folder}", anchor=SearchPathQuery(provider="schema"))
    before = get_gh_backup()
    version.setbase("1.3")
    try:
        Hydra.create_main_hydra2("prune_lab", search_path)
        cfg = compose(name, return_hydra_config=True)
    finally:
        restore_gh_from_backup(before)
    container = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def _leaves(node: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted leaves of nested containers."""
    if isinstance(node, list):
        node = dict(enumerate(node))
    if isinstance(node, dict) and node:
        return {key: leaf for name, value in node.items() for key, leaf in _leaves(value, f"{prefix}.{name}").items()}
    return {prefix.lstrip("."): node}


def _check_change(shown: str, key: str, value: Any) -> None:
    if _DATA.fullmatch(key):
        return
    if re.fullmatch(r"(launcher|sweeper)(\.\w+)*\._target_", key) and _ENGINES.fullmatch(str(value)):
        return
    if re.fullmatch(r"(launcher|sweeper)\..+", key) and not str(key).endswith("_target_") and value in (None, [], {}):
        return
    inside = isinstance(value, str) and not Path(value).is_absolute() and ".." not in Path(value).parts
    if _FOLDERS.fullmatch(key) and inside:
        return
    raise Refused(
        f"{shown}={value!r} is not allowed: a recipe may set hydra.mode, hydra.sweeper.params, a stock launcher or "
        "sweeper, and run and sweep folders inside the working folder"
    )
