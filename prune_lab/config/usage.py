"""--help: how the command line is used, each group with its options, and every key with its value now."""

from __future__ import annotations

from pathlib import Path

from hydra._internal.utils import get_args_parser

from prune_lab.config.parts import CONF_DIR, GROUPS

_HEADER = """\
prune_lab compresses language models and measures what it costs.

Use:   python -m prune_lab [group=option ...] [key=value ...] [-m]
Sweep: python -m prune_lab method=structured amount=0.2,0.4 -m
Recipe: python -m prune_lab -cd experiments -cn train_tiny
Show the composed configuration: python -m prune_lab --cfg job
Other commands: prune-lab cache | suggest | sync | --version, python -m prune_lab.report
Completion in bash: eval "$(prune-lab -sc install=bash)"
Hydra's own flags: python -m prune_lab --hydra-help

== Groups (group=option) =="""
_KEYS = "\n== Keys and their values now (key=value) =="


def answer(arguments: list[str]) -> list[str]:
    """Prints the help if it is asked for; returns the arguments left for Hydra, which prints the keys itself.

    Hydra's own help copies all it knows for each group that it lists, which takes longer than all the rest.
    """
    known, unknown = get_args_parser().parse_known_args(arguments)
    if not known.help or unknown:
        return arguments
    folders = [Path(folder) for folder in (CONF_DIR, known.config_dir) if folder is not None]
    print(_HEADER)  # noqa: T201
    for group in sorted(GROUPS):
        options = {path.stem for folder in folders for path in (folder / group).glob("*.yaml")}
        print(f"{group}: {', '.join(sorted(options))}")  # noqa: T201
    print(_KEYS, flush=True)  # noqa: T201
    given = {"--config-dir": known.config_dir, "--config-name": known.config_name}
    flags = [word for flag, value in given.items() if value is not None for word in (flag, value)]
    return [*known.overrides, "--cfg", "job", *(["--resolve"] if known.resolve else []), *flags]
