"""Composition by Hydra of the jobs of a sweep whose options do not all have the same keys.

`-m recovery=none,distill recovery.temperature=3`: Hydra would refuse the key, since none has no temperature. Here a key
that one of the sweep's options has is kept from the jobs whose option lacks it, and put on record as not applicable to
them; a key that none of the options has is refused as before. So is every such key in a single run.

Every sweeper and launcher composes its jobs with Hydra's configuration loader: this one takes its place.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from hydra._internal import hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl, get_overrides_dirname
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from prune_lab.config.overrides import parse, readable
from prune_lab.config.parts import CONF_DIR, GROUPS, fields_of
from prune_lab.errors import Refused
from prune_lab.explain import no_such_key

Options = dict[str, tuple[str, ...]]  # those of each group
_NAME = re.compile(r"\$\{\s*name\s*\}")
Grid = dict[str, Override]  # what each key is to be, in one of a sweep's products


def install() -> None:
    """Has Hydra compose with this loader."""
    hydra.ConfigLoaderImpl = Loader  # type: ignore[misc]


class Loader(ConfigLoaderImpl):
    """Hydra's loader, for which a key of a group that is swept need not be one of all its options."""

    def load_configuration(
        self,
        config_name: str | None,
        overrides: list[str],
        run_mode: RunMode,
        from_shell: bool = True,
        validate_sweep_overrides: bool = True,
    ) -> DictConfig:
        """The configuration of a single run, a job, or a sweep as a whole. Raises Refused, or Hydra's errors."""
        if not validate_sweep_overrides and self._has_no_mode(config_name, overrides):
            return OmegaConf.create({"hydra": {"mode": None}})
        return _with_safe_folders(self._load(config_name, overrides, run_mode, from_shell, validate_sweep_overrides))

    def _load(
        self, config_name: str | None, overrides: list[str], run_mode: RunMode, from_shell: bool, validates: bool
    ) -> DictConfig:
        rest = from_shell, validates
        if run_mode != RunMode.MULTIRUN:
            return super().load_configuration(config_name, overrides, run_mode, *rest)
        try:
            config = super().load_configuration(config_name, overrides, run_mode, *rest)
        except HydraException:  # perhaps for a key that the option lacks which would be chosen without the sweep
            config = super().load_configuration(
                config_name, [word for word in overrides if _key(word) is None], run_mode, *rest
            )
            fitting = [word for word in overrides if (key := _key(word)) is None or _is_in(config, key)]
            config = super().load_configuration(config_name, fitting, run_mode, *rest)
            _record_overrides(config, overrides)
        if validates:  # Hydra makes a single run of what is refused while it looks for the mode
            self._check(config)
        return config

    def _has_no_mode(self, config_name: str | None, overrides: list[str]) -> bool:
        """True where nothing gives hydra.mode, for which alone Hydra composes everything once more before each run.

        No option of prune_lab gives it; a recipe, an option in somebody else's folder or an override may.
        """
        ours = {("hydra", "pkg://hydra.conf"), ("main", CONF_DIR), ("schema", "structured://")}
        places = {(place.provider, place.path) for place in self.config_search_path.get_path()}
        keys = {word.lstrip("+~").partition("=")[0] for word in overrides}
        return config_name == "config" and places == ours and not keys & {"hydra", "hydra.mode", "hydra.searchpath"}

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        """The configuration of a job without what its options lack, which hydra.job.not_applicable names."""
        words, lacking, swept = self._split(master_config, sweep_overrides)
        config = super().load_sweep_config(master_config, words)
        removed = list(self._remove(config, swept))
        not_applicable: dict[str, list[str]] = {}
        for group, key in [*filter(None, map(_key, lacking)), *removed]:
            not_applicable[group] = sorted({*not_applicable.get(group, ()), key})
        with read_write(config.hydra), open_dict(config.hydra.job):
            config.hydra.job.not_applicable = not_applicable
            config.hydra.job.removed = [".".join(key) for key in removed]
        return config

    def applicable(self, master_config: DictConfig, sweep_overrides: list[str]) -> list[str]:
        """The overrides of a job without those whose key its option lacks."""
        return self._split(master_config, sweep_overrides)[0]

    def _split(self, master_config: DictConfig, sweep_overrides: list[str]) -> tuple[list[str], list[str], Options]:
        """A job's overrides that apply, those whose key only other options of the sweep have, and these options."""
        words = [readable(word) for word in sweep_overrides]
        swept = {group: options for group, options in self._options(_grids(master_config)).items() if len(options) > 1}
        choices: dict[str, Any] = dict(master_config.hydra.runtime.choices)
        choices |= {found.key_or_group: found.value() for found in map(parse, words) if found.key_or_group in GROUPS}
        lacking = [
            word
            for word in words
            if (key := _key(word)) and key[0] in swept and not self._has(key[0], choices[key[0]], key[1])
            and self._is_known(key[0], swept[key[0]], key[1])
        ]  # fmt: skip
        return [word for word in words if word not in lacking], lacking, swept

    def _check(self, config: DictConfig) -> None:
        """Raises Refused for a key that no option of the sweep has, or of the grid that names it."""
        grids = _grids(config)
        everywhere = self._options(grids)
        shared = {word for word, override in grids[0].items() if all(grid.get(word) is override for grid in grids)}
        for number, grid in enumerate(grids):
            for word, override in grid.items():
                key = _key_of(override)
                options = everywhere if word in shared else self._options([grid])
                if key is None or (number and word in shared):
                    continue
                is_base = options[key[0]] == (config.hydra.runtime.choices.get(key[0]),)
                if not (is_base and _is_in(config, key)):
                    self._check_key(key, options[key[0]])

    def _check_key(self, key: tuple[str, str], options: tuple[str, ...]) -> None:
        group, name = key
        if self._is_known(group, options, name):
            return
        holders: dict[str, list[str]] = {}
        for option in options:
            for one in self._keys(group, option) or ():
                holders.setdefault(one, []).append(option)
        of_all = ", ".join(one for one, having in holders.items() if len(having) == len(options))
        others: dict[str, list[str]] = {}
        for one, having in holders.items():
            if len(having) < len(options):
                others.setdefault(", ".join(having), []).append(one)
        of_some = "".join(f"; in {having} also {', '.join(keys)}" for having, keys in others.items())
        raise Refused(no_such_key(".".join(key), of_all + of_some, f"{group}={','.join(options)}"))

    def _options(self, grids: list[Grid]) -> Options:
        """The options that the jobs of some grids choose in each group."""
        found: dict[str, dict[str, None]] = {group: {} for group in GROUPS}
        for grid in grids:
            for group in GROUPS:
                found[group] |= dict.fromkeys(self._values(grid[group]) if group in grid else ())
        return {group: tuple(options) for group, options in found.items()}

    def _values(self, override: Override) -> Iterable[str]:
        override.config_loader = self
        if override.is_discrete_sweep():
            return [str(value).strip("'\"") for value in override.sweep_string_iterator()]
        return [] if override.is_sweep_override() else [str(override.value())]

    def _is_known(self, group: str, options: tuple[str, ...], key: str) -> bool:
        return any(self._has(group, option, key) for option in options)

    def _has(self, group: str, option: Any, key: str) -> bool:
        """True where an option has a key, or is no option, which Hydra refuses itself."""
        keys = self._keys(group, str(option))
        return keys is None or key in keys

    def _keys(self, group: str, option: str) -> tuple[str, ...] | None:
        """The dotted keys of an option by itself, inner ones too; None where there is no such option."""
        found = self.__dict__.setdefault("_found", {})
        if (group, option) not in found:
            try:
                config = super().load_configuration("config", [f"{group}={option}"], RunMode.RUN)
                found[group, option] = tuple(_dotted(config[group]))
            except HydraException:
                found[group, option] = None
        keys: tuple[str, ...] | None = found[group, option]
        return keys

    def _remove(self, config: DictConfig, swept: Options) -> Iterator[tuple[str, str]]:
        """Takes out of a job's configuration what a recipe gives to another of the sweep's options; yields what."""
        for group, options in swept.items():
            node = config.get(group)
            if not isinstance(node, DictConfig):
                continue
            for key in [key for key in _dotted(node) if key not in fields_of(node)]:
                above, _, name = key.rpartition(".")
                parent = OmegaConf.select(node, above) if above else node
                if parent is not None and name in parent and self._is_known(group, options, key):
                    with open_dict(parent):
                        del parent[name]
                    yield group, key


def _with_safe_folders(config: DictConfig) -> DictConfig:
    """Has a folder that is named after the experiment stay where it is: `name` may hold slashes, and be `..`."""
    for part, key in (("run", "dir"), ("sweep", "dir"), ("sweep", "subdir")):
        node = config.hydra[part]
        value = OmegaConf.to_container(node, resolve=False)[key]  # type: ignore[index,call-overload]
        if isinstance(value, str) and _NAME.search(value):
            name = re.sub(r"[/\\]+|\$(?=\{)|^[.~ ]+|[. ]+$", "_", str(config.name)).strip("_")[:100] or "_"
            with read_write(node):
                node[key] = _NAME.sub(name.replace("\\", ""), value)
    return config


def _record_overrides(config: DictConfig, words: list[str]) -> None:
    """Puts the command line on record as a whole: a sweeper makes its jobs of it."""
    task = [override for override in map(parse, words) if not override.is_hydra_override()]
    with read_write(config.hydra), open_dict(config.hydra):
        config.hydra.overrides.task = [override.input_line for override in task]
        named = config.hydra.job.config.override_dirname
        config.hydra.job.override_dirname = get_overrides_dirname(
            task, kv_sep=named.kv_sep, item_sep=named.item_sep, exclude_keys=named.exclude_keys
        )


def _key(word: str) -> tuple[str, str] | None:
    """Group and key of an override that sets or removes a key of a group's option; None for any other."""
    return _key_of(parse(word))


def _key_of(override: Override) -> tuple[str, str] | None:
    group, dot, key = str(override.key_or_group).partition(".")
    is_of_key = override.type in (OverrideType.CHANGE, OverrideType.FORCE_ADD, OverrideType.DEL)
    return (group, key) if dot and group in GROUPS and is_of_key else None


def _is_in(config: DictConfig, key: tuple[str, str]) -> bool:
    group, name = key
    return isinstance(config.get(group), DictConfig) and name in _dotted(config[group])


def _dotted(node: DictConfig, prefix: str = "") -> Iterator[str]:
    """The keys of a node and of those in it, without `_target_`."""
    for name in map(str, node):
        if name != "_target_":
            yield prefix + name
        inner = node._get_node(name)
        if isinstance(inner, DictConfig) and not inner._is_none() and not inner._is_missing():
            yield from _dotted(inner, f"{prefix}{name}.")


def _grids(config: DictConfig) -> list[Grid]:
    """Grids of a sweep, whose products its jobs are: the sweeper's params, its grids, and the command line."""
    sweeper, choices = config.hydra.sweeper, config.hydra.runtime.choices
    base = [f"{group}={choices[group]}" for group in GROUPS if choices.get(group) is not None]
    params = [f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()]
    common = _by_key([*base, *params])
    typed = _by_key(config.hydra.overrides.task)
    grids = list(sweeper.get("grids") or sweeper.get("candidates") or [{}])
    return [common | _by_key(f"{key}={value}" for key, value in grid.items()) | typed for grid in grids]


def _by_key(words: Iterable[str]) -> Grid:
    return {str(override.get_key_element()): override for override in map(parse, map(str, words))}
