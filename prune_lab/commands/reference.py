"""Pages of docs/ that are generated: every key (docs/keys.md), and the tables of metrics in docs/metrics.md.

`python -m prune_lab.commands.reference` prints docs/keys.md: defaults and meanings from the lines of conf/, types from
the dataclasses. `python -m prune_lab.commands.reference docs/metrics.md` writes the tables of that file anew, between
its markers, from METRICS in results/metrics.py.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from prune_lab.config.parts import CONF_DIR, GROUPS, Settings
from prune_lab.results.metrics import MEASURED, METRICS, Metric
from prune_lab.system.files import write_text

_KEY = re.compile(r"(?P<indent> *)(?P<key>\w+):(?: +(?P<value>\"[^\"]*\"|[^#\s][^#]*?)?)?(?:\s+# (?P<meaning>.*))?")
DEFAULT, MEANING = 0, 1  # of what an option says of a key
_DEFAULTS = re.compile(r"^defaults: \[(\w+)\]$", re.MULTILINE)

_HEAD = """# Every key

What the files under `conf/` say, with the types of the dataclasses that check them. Written by
`python -m prune_lab.commands.reference > docs/keys.md`; a test compares. Give any of them on the command line
(`recovery.steps=400`) or in a recipe; `python -m prune_lab --cfg job` shows what a run would use. `???` must be given.
"""


@dataclass
class Option:
    """One YAML file of a group: its first comment, the class it names, its keys as (default, meaning)."""

    name: str
    says: str
    target: str
    keys: dict[str, tuple[str, str]] = field(default_factory=dict)

    def hint(self, key: str) -> Any:
        """The type of a dotted key."""
        cls: Any = _class(self.target)
        *sections, leaf = key.split(".")
        for section in sections:
            cls = get_type_hints(cls)[section]
        return get_type_hints(cls)[leaf]


def write_reference() -> str:
    """docs/keys.md, whole."""
    return "\n".join([_HEAD, *_root(), *(line for group in GROUPS for line in _group(group))])


def read_option(path: Path) -> Option:
    """Option of a YAML file; one that builds on another (`defaults: [hf]`) has the other's keys, changed."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    says = [line[2:] for line in lines[: next(i for i, line in enumerate(lines) if not line.startswith("# "))]]
    based = _DEFAULTS.search(text)
    option = read_option(path.with_name(f"{based[1]}.yaml")) if based else Option("", "", "")
    option.name, option.says = path.stem, " ".join(says)
    for key, value, meaning in _lines(lines):
        if key == "_target_":
            option.target = value
        elif key != "defaults":
            option.keys[key] = value, meaning or option.keys.get(key, ("", ""))[1]
    return option


def _lines(lines: Iterable[str]) -> Iterable[tuple[str, str, str]]:
    """(dotted key, default, meaning) of each line that gives a value."""
    section = ""
    for line in lines:
        found = _KEY.fullmatch(line)
        if found is None:
            continue
        if not found["indent"]:
            section = "" if found["value"] else f"{found['key']}."
        if found["value"]:
            yield (section if found["indent"] else "") + found["key"], found["value"], found["meaning"] or ""


def _root() -> list[str]:
    told = {key: (value, meaning) for key, value, meaning in _lines(_config())}
    hints = get_type_hints(Settings)
    rows = [
        f"| `{f.name}` | {_type_name(hints[f.name])} | `{told[f.name][0]}` | {_cell(told[f.name][1])} |"
        for f in dataclasses.fields(Settings)
    ]
    return ["## Root keys", "", "| key | type | default | meaning |", "|---|---|---|---|", *rows, ""]


def _group(group: str) -> list[str]:
    """Section of a group: its options, then the keys that they have between them."""
    options = [read_option(path) for path in sorted(Path(CONF_DIR, group).glob("*.yaml"))]
    options.sort(key=lambda option: option.name != _default_option(group))
    lines = [
        f"## {group}",
        "",
        "| option | |",
        "|---|---|",
        *(f"| `{o.name}` | {_cell(o.says)} |" for o in options),
        "",
    ]
    keys = list(dict.fromkeys(key for option in options for key in option.keys))
    if not keys:
        return [*lines, "It has no keys.", ""]
    lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key in keys:
        having = [option for option in options if key in option.keys]
        default, meaning = (_by_option(having, key, part) for part in (DEFAULT, MEANING))
        kind = _type_name(having[0].hint(key))
        lines.append(f"| `{group}.{key}` | {kind} | {default} | {meaning}{_of(having, options)} |")
    return [*lines, ""]


def _by_option(having: list[Option], key: str, part: int) -> str:
    """Default or meaning that most options give a key, and those that give another."""
    values = Counter(option.keys[key][part] for option in having if option.keys[key][part])
    told = []
    for number, (value, _) in enumerate(values.most_common()):
        shown = f"`{value}`" if part == DEFAULT else value
        names = ", ".join(option.name for option in having if option.keys[key][part] == value)
        told.append(shown if number == 0 else f"{names}: {shown}")
    return _cell("; ".join(told))


def _of(having: list[Option], options: list[Option]) -> str:
    """Options that have a key, where not all do."""
    without = [option.name for option in options if option not in having]
    if not without:
        return ""
    return (
        f" (not in {', '.join(without)})" if len(without) < len(having) else f" ({', '.join(o.name for o in having)})"
    )


def _default_option(group: str) -> str:
    return next(line.split()[-1] for line in _config() if line.startswith(f"  - {group}: "))


def _config() -> list[str]:
    return Path(CONF_DIR, "config.yaml").read_text(encoding="utf-8").splitlines()


def _class(target: str) -> type:
    module, _, name = target.rpartition(".")
    found: type = getattr(importlib.import_module(module), name)
    return found


def _type_name(hint: Any) -> str:
    is_plain = isinstance(hint, type) and not hasattr(hint, "__args__")
    return _cell(hint.__name__ if is_plain else re.sub(r"\bprune_lab\.[\w.]*\.", "", str(hint)))


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def write_metrics(page: str) -> str:
    """docs/metrics.md with its tables written anew: metrics of a run, and those logged by step of a training.

    Raises ValueError where the page lacks the markers of a table.
    """
    for name, by_step in (("run", False), ("training", True)):
        rows = [_metric_row(metric) for metric in METRICS if metric.by_step == by_step]
        table = ["| metric | unit | better | dense | how it is measured |", "|---|---|---|---|---|", *rows]
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        if page.count(begin) != 1 or page.count(end) != 1 or page.index(begin) > page.index(end):
            raise ValueError(f"the tables of metrics stand between {begin} and {end}, once each; here they do not")
        page = "\n".join([page[: page.index(begin)] + begin, *table, page[page.index(end) :]])
    return page


def _metric_row(metric: Metric) -> str:
    names = ", ".join(f"`{name}`" for name in metric.names)
    cells = (names, metric.unit, metric.better or "", "yes" if metric.dense == MEASURED else "", metric.measured)
    return "".join(f"| {_cell(cell)} " if cell else "| " for cell in cells) + "|"


if __name__ == "__main__":
    if sys.argv[1:]:
        try:
            write_text(Path(sys.argv[1]), write_metrics(Path(sys.argv[1]).read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            sys.exit(f"{sys.argv[1]}: {error}")
    else:
        sys.stdout.write(write_reference())
