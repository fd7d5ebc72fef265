"""`prune-lab suggest [group=option] [key=value]`: a measure.batch_size for this model, text and machine."""

from __future__ import annotations

import sys

from hydra import compose, initialize_config_dir

from prune_lab.config import overrides
from prune_lab.config import parts as config
from prune_lab.errors import OK, Refused

USAGE = """usage: prune-lab suggest [group=option ...] [key=value ...]

Times the perplexity's passes over the dense model in batches of several sizes, and names the smallest
measure.batch_size that is nearly as fast as the fastest. The keys are those of a run.
"""


def main(arguments: list[str]) -> int:
    """Tries batch sizes on the dense model, prints their speeds and the override to give; returns the exit code.

    Raises Refused, or Hydra's own errors, for what cannot be tried.
    """
    if {"-h", "--help"} & set(arguments):
        sys.stdout.write(USAGE)
        return OK
    overrides.check(arguments, sweeps=False)
    config.register_schema()
    with initialize_config_dir(config.CONF_DIR, version_base="1.3"):
        parts = config.build_parts(compose("config", overrides=arguments))
    if parts.model.stream:
        raise Refused("model.stream=true: a model that is read while it runs cannot be timed; give model.stream=false")
    _try(parts)
    return OK


def _try(parts: config.Parts) -> None:
    from prune_lab.evaluator import open_evaluator
    from prune_lab.measure.batch_size import suggest, try_batch_sizes
    from prune_lab.system import device as devices
    from prune_lab.system.console import Console

    settings, console = parts.settings, Console()
    device = devices.resolve(settings.device, settings.dtype)
    evaluator = open_evaluator(parts.model, parts.dataset, parts.measure, device, settings.seed, console)
    trials = try_batch_sizes(evaluator.dense.model, evaluator.bos.before(evaluator.windows), device)
    for trial in trials:
        console.result(f"batch of {trial.batch_size:3}: {trial.tokens_per_s:10,.0f} tokens/s")
    chosen = suggest(trials)
    console.result(f"measure.batch_size={chosen} is enough here (now {parts.measure.batch_size})")
