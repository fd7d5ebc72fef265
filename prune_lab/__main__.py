"""The command line: python -m prune_lab [group=option] [key=value] [-m]."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from contextlib import suppress

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from prune_lab import explain
from prune_lab.config import command_line, composing, recipes, usage
from prune_lab.config import parts as config
from prune_lab.errors import FAILED, INTERRUPTED, OK, REFUSED
from prune_lab.sweeps import remote, sweep
from prune_lab.system import interrupt, launch

SUBCOMMANDS = {  # first word: who answers, main(arguments)
    "cache": "prune_lab.commands.cache",
    "suggest": "prune_lab.commands.suggest",
    "sync": "prune_lab.commands.sync",
}


@hydra.main(version_base="1.3", config_path=config.CONF_DIR, config_name="config")
def _job(cfg: DictConfig) -> float | tuple[float, ...] | None:
    remote.unpack(HydraConfig.get())
    from prune_lab import job  # not before there is a job to run

    place = sweep.place_of_job(HydraConfig.get())
    return job.run(lambda: config.build_parts(cfg), config.plain(cfg), place)


def main() -> None:
    """Runs a command line and leaves with its exit code (README, "Exit codes")."""
    code = _run(sys.argv[1:])
    interrupt.leave_to_system()
    sys.exit(code)


def _run(arguments: list[str]) -> int:
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra's refusals reach us as exceptions, to be shown in one line
    interrupt.end_on_signals()
    try:
        if arguments and arguments[0] in SUBCOMMANDS:
            command: Callable[[list[str]], int] = importlib.import_module(SUBCOMMANDS[arguments[0]]).main
            return command(arguments[1:])
        explain.check_text(arguments)
        arguments = command_line.in_order(arguments)
        command_line.check_folder()
        config.register_schema()
        recipes.check(arguments)
        command_line.check_overrides(arguments)
        composing.install()
        sys.argv[1:] = launch.for_this_process(usage.answer(arguments))
        _job()
    except KeyboardInterrupt:
        explain.to_stderr("interrupted")
        return INTERRUPTED
    except SystemExit as end:  # a refused single run (job.py), a signal, or argparse
        return end.code if isinstance(end.code, int) else REFUSED
    except Exception as error:
        explain.to_stderr(command_line.said_of(error))
        return FAILED if sweep.close_broken_sweep() else REFUSED
    finally:
        with suppress(KeyboardInterrupt, SystemExit):  # asked for again
            sweep.close_open_sweep()
    return FAILED if sweep.any_job_failed() else OK


if __name__ == "__main__":
    main()
