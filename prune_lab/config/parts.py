"""From Hydra's configuration to typed, validated objects: where OmegaConf stops.

Every option's YAML names a frozen dataclass of this package under `_target_`; its keys are that
class's fields. `build` resolves the class, checks keys and types, and lets the class check the values.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException, ValidationError

from prune_lab.checks import check_amount
from prune_lab.config.overrides import literal
from prune_lab.errors import Refused
from prune_lab.explain import no_such_key
from prune_lab.results.bounds import read_bounds, texts_of
from prune_lab.results.metrics import axis

if TYPE_CHECKING:  # importing them takes seconds
    from prune_lab.export.base import Export
    from prune_lab.measure.settings import Measure
    from prune_lab.methods.base import Method
    from prune_lab.models.load import ModelSource
    from prune_lab.post.base import Post
    from prune_lab.recovery.base import Recovery
    from prune_lab.schedules import Schedule
    from prune_lab.text.source import TextSource
    from prune_lab.tracking.base import Tracker

_PACKAGE = Path(__file__).parents[1]
CONF_DIR = str(next(p for p in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if p.is_dir()))
# What an option of each group must be a kind of; by name, as `Parts` has them.
_KINDS = {
    "model": "prune_lab.models.load.ModelSource",
    "dataset": "prune_lab.text.source.TextSource",
    "method": "prune_lab.methods.base.Method",
    "schedule": "prune_lab.schedules.Schedule",
    "recovery": "prune_lab.recovery.base.Recovery",
    "post": "prune_lab.post.base.Post",
    "measure": "prune_lab.measure.settings.Measure",
    "tracking": "prune_lab.tracking.base.Tracker",
    "export": "prune_lab.export.base.Export",
}
GROUPS = tuple(_KINDS)
# Packages beside prune_lab whose classes `_target_` may name, separated by commas. Read once, here: a recipe
# can set the environment only later.
_ALLOWED = ("prune_lab", *filter(None, os.environ.get("PRUNE_LAB_ALLOW", "").split(",")))


@dataclass(frozen=True)
class Settings:
    """The root keys of a run."""

    amount: float = 0.5
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    name: str = "prune_lab"
    resume: bool = True
    quiet: bool = False
    objectives: tuple[str, ...] = ("quality/perplexity",)
    bound: Any = ()  # one text or a list of them

    def __post_init__(self) -> None:
        object.__setattr__(self, "bound", texts_of(self.bound))
        read_bounds(self.bound)
        object.__setattr__(self, "objectives", tuple(self.objectives))
        check_amount(self.amount)
        wrong = [name for name in self.objectives if name.count("/") != 1 or axis(name).better is None]
        if wrong or not self.objectives:
            raise ValueError(
                f"objectives={list(self.objectives)} must name metrics that a search can improve, such as "
                "quality/perplexity, size/disk_mb, latency/decode_speedup"
            )
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed} is outside [0, 2^63)")
        if not self.name.strip() or len(self.name) > 250:
            raise ValueError(f"name={self.name[:40]!r} must have 1 to 250 characters: it names the experiment")
        if any(unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in self.name):
            raise ValueError(f"name={self.name[:40]!r} must not hold control characters: it names the experiment")


@dataclass(frozen=True)
class Parts:
    """Parts of a run: built and validated, nothing loaded.

    Each field is the object of its group's chosen option.
    """

    settings: Settings
    model: ModelSource
    dataset: TextSource
    method: Method
    schedule: Schedule
    recovery: Recovery
    post: Post
    measure: Measure
    tracking: Tracker
    export: Export


def build_parts(cfg: DictConfig) -> Parts:
    """Builds all parts of a composed configuration; raises Refused with the full key."""
    names = [f.name for f in dataclasses.fields(Settings)]
    if unknown := [str(key) for key in cfg if key not in (*names, *GROUPS)]:
        raise Refused(f"{', '.join(unknown)}: no such key; allowed here are {', '.join((*names, *GROUPS))}")
    try:
        values = {name: MISSING if OmegaConf.is_missing(cfg, name) else cfg[name] for name in names}
    except OmegaConfBaseException as error:
        raise Refused(f"{error.full_key}: {_first_line(error)}") from error
    settings = _construct(Settings, values, "")
    for group in GROUPS:
        if OmegaConf.is_missing(cfg, group):
            raise Refused(f"{group} is required: choose an option with {group}=..., see --help")
    return Parts(settings, **{group: build(cfg[group], group) for group in GROUPS})


def build(node: Any, group: str) -> Any:
    """Builds the object that a group's node describes; raises Refused with the full key."""
    if not isinstance(node, DictConfig):
        raise Refused(
            f"{group}={node!r} is not an option of the group {group}: see --help for its options; a recipe chooses one "
            f"in its defaults, as 'override {group}: OPTION'"
        )
    try:
        values = OmegaConf.to_container(node, resolve=True)
    except OmegaConfBaseException as error:
        raise Refused(f"{group}: {_first_line(error)}") from error
    assert isinstance(values, dict)
    target = values.pop("_target_", None)
    cls, kind = _resolve(target, f"{group}._target_"), _named(_KINDS[group])
    if not issubclass(cls, kind):
        raise Refused(f"{group}._target_={target!r} is no option of the group {group}: allowed is a {_KINDS[group]}")
    return _construct(cls, {str(k): v for k, v in values.items()}, f"{group}.")


def fields_of(node: DictConfig) -> set[str]:
    """The dotted keys that the class which an option names has fields for; empty where it names none of ours."""
    try:
        return set(_fields(_resolve(OmegaConf.select(node, "_target_"), "_target_")))
    except (Refused, OmegaConfBaseException):  # building the part says so
        return set()


def _fields(cls: Any, prefix: str = "") -> Iterator[str]:
    for name, kind in get_type_hints(cls).items():
        yield prefix + name
        if dataclasses.is_dataclass(kind):
            yield from _fields(kind, f"{prefix}{name}.")


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The composed configuration as plain Python containers, resolved where it can be."""
    try:
        container = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException:  # building the parts says what is wrong with it
        container = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(container, dict)
    return {str(k): v for k, v in container.items()}


def register_schema() -> None:
    """Gives Hydra the types of the root keys, under the name `root_schema`."""
    keys = [(f.name, get_type_hints(Settings)[f.name], f.default) for f in dataclasses.fields(Settings)]
    groups = [(group, Any, MISSING) for group in GROUPS]
    # Built, not derived: a frozen dataclass would make the whole configuration read-only.
    ConfigStore.instance().store(name="root_schema", node=dataclasses.make_dataclass("Root", [*keys, *groups]))


def _resolve(target: Any, key: str) -> type:
    """The class that `target` names, if it is one of ours.

    The name alone proves nothing (`prune_lab.x.os.system` starts well and is os.system): the object found must
    be a dataclass that was defined in an allowed package. Nothing outside those packages is imported.
    """
    allowed = f"allowed are the dataclasses of {', '.join(_ALLOWED)}"
    if str(target).rpartition(".")[0].split(".")[0] not in _ALLOWED:
        raise Refused(f"{key}={target!r} is not allowed: {allowed}")
    try:
        found = _named(str(target))
    except (ImportError, AttributeError) as error:
        raise Refused(f"{key}={target!r} does not exist: {allowed}") from error
    if not (isinstance(found, type) and dataclasses.is_dataclass(found)) or (
        found.__module__.split(".")[0] not in _ALLOWED
    ):
        raise Refused(f"{key}={target!r} is not allowed: {allowed}")
    return found


def _named(path: str) -> Any:
    """The object with a dotted name."""
    module_name, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module_name), name)


def _construct(cls: type, values: dict[str, Any], prefix: str) -> Any:
    """An instance of `cls`, its fields' names and types checked by OmegaConf, its values by the class."""
    names = [f.name for f in dataclasses.fields(cls)]
    hints = get_type_hints(cls)
    parts = {name: kind for name, kind in hints.items() if dataclasses.is_dataclass(kind)}
    lists = {name: kind for name, hint in hints.items() if (kind := _kind_in_list(hint)) is not None}
    for name, value in values.items():
        if name in names and value == MISSING:
            raise Refused(f"{prefix}{name} is required: give {prefix}{name}=...")
    try:
        schema = OmegaConf.structured(cls)
        _make_writable(schema)
        if parts:  # its own keys first, then each part for the full key in its refusals, then the whole
            own = {name: value for name, value in values.items() if name not in parts}
            OmegaConf.to_object(OmegaConf.merge(schema, _literal(own)))
        for name in parts.keys() & values.keys():
            _construct_part(parts[name], values[name], f"{prefix}{name}")
        for name in lists.keys() & values.keys():
            _construct_list(lists[name], values[name], f"{prefix}{name}")
        return OmegaConf.to_object(OmegaConf.merge(schema, _literal(values)))
    except Refused:
        raise
    except ConfigKeyError as error:
        wrong = sorted(str(name) for name in values.keys() - set(names))
        raise Refused(no_such_key(f"{prefix}{', '.join(wrong)}", ", ".join(names))) from error
    except ValidationError as error:
        raise Refused(f"{prefix}{error.full_key or error.key}: {_first_line(error)}") from error
    except ValueError as error:
        raise Refused(f"{prefix}{error}") from error


def _literal(value: Any) -> Any:
    """Resolved values, which OmegaConf is not to resolve once more: a path may hold ${."""
    if isinstance(value, dict):
        return {key: _literal(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_literal(one) for one in value]
    return literal(value) if isinstance(value, str) else value


def _construct_part(cls: Any, value: Any, key: str) -> None:
    if not isinstance(value, dict):
        keys = ", ".join(f.name for f in dataclasses.fields(cls))
        raise Refused(f"{key}={value!r} is not one value: give {key}.KEY, where KEY is one of {keys}")
    _construct(cls, value, f"{key}.")


def _kind_in_list(hint: Any) -> Any:
    """The dataclass that a field holds a list of (tuple[Kind, ...]), or None."""
    kind = next(iter(get_args(hint)), None) if get_origin(hint) is tuple else None
    return kind if dataclasses.is_dataclass(kind) else None


def _construct_list(cls: Any, values: Any, key: str) -> None:
    """Checks each element of a list by itself, for its number in refusals."""
    fields = dataclasses.fields(cls)
    shape = f"a list of {{{', '.join(f.name for f in fields)}}}"
    if not isinstance(values, list):
        raise Refused(f"{key}={values!r} must be {shape}")
    for index, value in enumerate(values):
        if not isinstance(value, dict):
            raise Refused(f"{key}[{index}]={value!r}: {key} must be {shape}")
        for f in fields:
            if f.default is dataclasses.MISSING and value.get(f.name, MISSING) == MISSING:
                raise Refused(f"{key}[{index}].{f.name} is required: {key} must be {shape}")
        _construct(cls, value, f"{key}[{index}].")


def _make_writable(node: DictConfig) -> None:
    """Lifts the read-only flag that frozen dataclasses give their nodes."""
    OmegaConf.set_readonly(node, False)
    for name in node:
        if not OmegaConf.is_missing(node, name) and isinstance(node[name], DictConfig):
            _make_writable(node[name])


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
