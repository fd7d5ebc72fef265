"""Guards against recipes: a shared YAML file is untrusted input, and Hydra acts on it before our code runs.

Hydra instantiates the callbacks, launchers and sweepers that a configuration names, and sets the environment from it.
So when a command line brings a folder of its own (-cd), its files are read first, with Hydra's own YAML reader, and
refused where they hold more than data: the recipe, the recipes it builds on, and every option it could choose.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from hydra._internal.utils import get_args_parser
from hydra.errors import HydraException

from prune_lab.config import moved
from prune_lab.config.overrides import parse
from prune_lab.config.parts import GROUPS
from prune_lab.config.recipe_files import check_grid, read
from prune_lab.errors import Refused

# Keys of `hydra` that are data. A launcher's `setup` or `python`, a callback or the environment would be commands.
_DATA = re.compile(
    r"mode|verbose"
    r"|sweeper\.(best|low|high|step|shapes|round_to|held_out|(axes|amounts)\.\d+)"
    r"|sweeper\.(max_batch_size|n_trials|n_jobs|direction(\.\d+)?|study_name|sampler\.(seed|n_startup_trials|population_size))"
    r"|launcher\.(n_jobs|timeout_min|cpus_per_task|gpus_per_node|gpus_per_task|mem_gb|nodes|tasks_per_node"
    r"|array_parallelism|partition|max_num_timeout|ray\.(init|remote)\.(num_cpus|num_gpus|max_calls))"
)
_FOLDER = re.compile(r"run\.dir|sweep\.(dir|subdir)|launcher\.submitit_folder")
_GRID = re.compile(r"sweeper\.(params|(grids|candidates)\.\d+)\.")
_GRID_KEY = re.compile(r"\+{0,2}(?!hydra\b)[A-Za-z_]\w*(\.\w+)*")
_NAME = re.compile(r"[\w-]+")  # of a recipe or an option: no path, no package
_CHOICE = re.compile(rf"(override )?({'|'.join(GROUPS)})|override hydra/(launcher|sweeper(/sampler)?)")
_REFERENCE = re.compile(r"\$\{\s*\.*[A-Za-z_][\w.]*\s*\}")  # to another key; anything else is a resolver
_CLOCK = re.compile(r"\$\{now:([^{}]*)\}")
_ROOT_KEY = re.compile(r"\$\{([A-Za-z_]\w*)\}")


def check(arguments: list[str]) -> None:
    """Raises Refused where the command line's recipe reaches for more than a recipe may."""
    known, _ = get_args_parser().parse_known_args(arguments)
    if known.config_path is not None:
        raise Refused("-cp would replace the package's own configuration: keep recipes in a folder and give -cd FOLDER")
    if known.experimental_rerun is not None:
        raise Refused("--experimental-rerun reads a pickle, which could run code: give the run's own command again")
    name = (known.config_name or "config").removesuffix(".yaml")
    if not _NAME.fullmatch(name):
        raise Refused(f"-cn {known.config_name}: give the name of a recipe alone, and its folder with -cd FOLDER")
    if known.config_dir is None:
        return
    folder = Path(known.config_dir)
    if not folder.is_dir():
        raise Refused(f"-cd {known.config_dir}: there is no such folder")
    if os.path.lexists(folder / "hydra"):
        raise Refused(f"recipe folder {folder}: hydra: a recipe's folder may not bring options of Hydra itself")
    recipe = {path: read(path, f"recipe {path.stem}") for path in _recipe_and_its_bases(folder, name)}
    for path, tree in recipe.items():
        _check_recipe(path, tree, list(recipe.values()))
    for path in _options(folder):
        _check_option(path, path.relative_to(folder).as_posix())


def _recipe_and_its_bases(folder: Path, name: str) -> Iterator[Path]:
    """The files of `folder` that choosing the recipe would load, beside its groups' options."""
    # The package's defaults name these two, and a file of the folder may come before the package's own.
    waiting, seen = [name, "config", "root_schema"], set()
    while waiting:
        path = folder / f"{waiting.pop()}.yaml"
        if path in seen or not path.is_file():
            continue
        seen.add(path)
        yield path
        tree = read(path, f"recipe {path.stem}")
        waiting += [entry for entry in _defaults(tree, f"recipe {path.stem}") if isinstance(entry, str)]


def _options(folder: Path) -> Iterator[Path]:
    """Every option that the folder adds to our groups; other folders are out of reach of a checked recipe."""
    for group in GROUPS:
        for place, folders, files in os.walk(folder / group):
            for linked in (name for name in folders if (Path(place) / name).is_symlink()):
                shown = (Path(place) / linked).relative_to(folder)
                raise Refused(f"recipe folder {folder}: {shown} is a link to a folder, which is not followed: copy it")
            yield from (Path(place) / file for file in sorted(files) if file.endswith(".yaml"))


def _check_recipe(path: Path, tree: dict[str, Any], together: list[dict[str, Any]]) -> None:
    where = f"recipe {path.stem}"
    _refuse_package(path, where)
    for entry in _defaults(tree, where):
        choice = next(iter(entry.items())) if isinstance(entry, dict) and len(entry) == 1 else ("", entry)
        if not (_NAME.fullmatch(str(choice[1])) and (_CHOICE.fullmatch(str(choice[0])) or isinstance(entry, str))):
            raise Refused(
                f"{where}: defaults: {entry} is not allowed: name other recipes, or choose options of our groups "
                "such as 'override method: structured'"
            )
        _refuse_earlier(f"{where}: defaults: {entry}", str(choice[0]).removeprefix("override "), choice[1])
    for key, value in _leaves(tree.get("hydra", {})):
        _check_hydra(key, value, where, together)
    for name, grid in _grids(tree):
        check_grid(grid, f"{where}: hydra.sweeper.{name}")
        for key, value in grid.items():
            _refuse_earlier_in_grid(f"{where}: hydra.sweeper.{name}.{key}={value!r}", f"{key}={value}")
    for group in GROUPS:
        if not isinstance(value := tree.get(group), dict):
            _refuse_earlier(f"{where}: {group}: {value}", group, value)
    for key, value in _leaves({key: value for key, value in tree.items() if key not in ("defaults", "hydra")}):
        _refuse_resolvers(f"{where}: {key}", value)


def _check_option(path: Path, shown: str) -> None:
    where = f"recipe option {shown}"
    tree = read(path, where)
    _refuse_package(path, where)
    for entry in _defaults(tree, where):
        if not (isinstance(entry, str) and _NAME.fullmatch(entry)):
            raise Refused(f"{where}: defaults: {entry} is not allowed: name other options of the same group")
    for key, value in _leaves(tree):
        _refuse_resolvers(f"{where}: {key}", value)


def _check_hydra(key: str, value: Any, where: str, together: list[dict[str, Any]]) -> None:
    shown = f"{where}: hydra.{key}"
    if found := _GRID.match(key):
        name = key[found.end() :]
        group_elsewhere = name.lstrip("+") in GROUPS and "/" in str(value)
        if _GRID_KEY.fullmatch(name) and not group_elsewhere:
            _refuse_resolvers(shown, value)
            return
    elif _FOLDER.fullmatch(key):
        if _stays_inside(str(value), together):
            return
    elif _DATA.fullmatch(key):
        _refuse_resolvers(shown, value)
        return
    raise Refused(
        f"{shown}={value!r} is not allowed: a recipe may set hydra.mode, hydra.sweeper.params, .grids and .candidates, "
        "a stock launcher or sweeper by name, and run and sweep folders inside the working folder"
    )


def _stays_inside(folder: str, together: list[dict[str, Any]]) -> bool:
    """True where a folder lies below the working folder, whatever the time, the job's number and the keys it names."""
    path = _CLOCK.sub(r"\1", folder).replace("${hydra.job.num}", "0")
    for key in set(_ROOT_KEY.findall(path)):
        values = [tree[key] for tree in together if key in tree]
        values += [value for tree in together for name, value in _grid_keys(tree) if name == key]
        if any(part in str(value) for value in values for part in ("/", "\\", "..", "~", "${")):
            return False
        path = path.replace(f"${{{key}}}", "x")
    return not ("${" in path or path.startswith(("/", "~", "\\")) or ".." in PurePosixPath(path).parts)


def _grid_keys(tree: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The swept keys of a recipe with their values."""
    for _, grid in _grids(tree):
        yield from grid.items()


def _grids(tree: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The grids of a recipe's sweep by name, each with its keys and values."""
    grids: dict[str, dict[str, Any]] = {}
    for key, value in _leaves(tree.get("hydra", {})):
        if found := _GRID.match(key):
            grids.setdefault(found[1], {})[key[found.end() :]] = value
    return list(grids.items())


def _refuse_earlier(where: str, group: str, option: Any) -> None:
    """Raises Refused for an option of an earlier version."""
    if (now := moved.instead(group, [option], moved.IN_DEFAULTS)) is not None:
        raise Refused(f"{where}: there is no such option any more; {now}")


def _refuse_earlier_in_grid(where: str, word: str) -> None:
    try:
        now = moved.instead_of(parse(word))
    except HydraException:  # Hydra will say what is wrong with it
        return
    if now is not None:
        raise Refused(f"{where}: there is no such option any more; {now}")


def _refuse_resolvers(where: str, value: Any) -> None:
    if isinstance(value, str) and "${" in _REFERENCE.sub("", value):
        raise Refused(f"{where}={value!r}: a recipe may not read the machine it runs on; ${{key}} is allowed")


def _refuse_package(path: Path, where: str) -> None:
    """A @package header would put the file's keys elsewhere, such as into `hydra`."""
    if "@package" in path.read_text(encoding="utf-8", errors="replace"):
        raise Refused(f"{where}: @package: a recipe's folder may not bring options of Hydra itself")


def _defaults(tree: dict[str, Any], where: str) -> list[Any]:
    found = tree.get("defaults") or []
    if not isinstance(found, list):
        raise Refused(f"{where}: defaults={found!r} must be a list")
    return found


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted leaves of nested containers; an empty mapping has none."""
    if isinstance(node, list):
        node = dict(enumerate(node))
    if isinstance(node, dict):
        for name, value in node.items():
            yield from _leaves(value, f"{prefix}.{name}" if prefix else str(name))
    else:
        yield prefix, node
