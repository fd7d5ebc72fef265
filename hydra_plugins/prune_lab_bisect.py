"""hydra/sweeper=bisect: the most that can be removed at a quality, or the best quality at a cost, in few runs.

    bound: ["quality/perplexity_ratio<=1.1"]         # or size/disk_mb<=12, latency/decode_ms_per_token_p50<=3
    hydra:
      mode: MULTIRUN
      sweeper:
        best: params/reduction                       # how candidates within it are compared
        candidates:                                  # each a set of overrides
          - {method: sparsegpt}
          - {method: structured, method.score: wanda}
        low: 0.1                                     # amounts that are tried: multiples of step between low and high
        high: 0.8
        step: 0.05
        params: {seed: 0}                            # in every run

Each round launches one run for every candidate whose bracket is open, so a launcher may run them side by side. The
answer stands above the sweep's leaderboard. The module lies here since Hydra finds sweepers in hydra_plugins alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf


@dataclass
class BisectConf:
    """The keys of hydra.sweeper."""

    _target_: str = "hydra_plugins.prune_lab_bisect.BisectSweeper"
    best: str = ""
    candidates: list[dict[str, Any]] = field(default_factory=list)
    low: float = 0.1
    high: float = 0.8
    step: float = 0.05
    params: dict[str, Any] | None = None


ConfigStore.instance().store(group="hydra/sweeper", name="bisect", node=BisectConf, provider="prune_lab")


class BisectSweeper(Sweeper):
    """Bisects the amount of every candidate, a round of runs at a time."""

    def __init__(
        self,
        best: str,
        candidates: Sequence[Mapping[str, Any]],
        low: float,
        high: float,
        step: float,
        params: Mapping[str, Any] | None = None,
    ) -> None:
        from prune_lab.sweeps.bisection import read_candidates

        self.best, self.overrides = best, read_candidates(candidates)
        self.low, self.high, self.step = low, high, step
        self.params = [f"{key}={value}" for key, value in (params or {}).items()]

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Makes the launcher that the configuration names."""
        from prune_lab.results.bounds import check_measured, read_bounds, texts_of
        from prune_lab.sweeps.bisection import Budget, Candidate

        self.hydra_context, self.config = hydra_context, config
        self.budget = Budget(read_bounds(texts_of(config.bound)), self.best)
        if not any(word.startswith("measure") for words in (self.params, *self.overrides) for word in words):
            for bound in self.budget.bounds:
                check_measured(bound.metric, config.measure)
        self.candidates = [
            Candidate(overrides, self.low, self.high, self.step, self.budget.on_quality) for overrides in self.overrides
        ]
        self.launcher: Launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        """Runs rounds until every bracket is closed; `arguments` are the command line's, which come last."""
        from prune_lab.sweeps.bisection import answer
        from prune_lab.sweeps.comparison import ANSWER

        assert self.config is not None
        self._refuse_sweeps(arguments)
        folder = Path(self.config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, folder / "multirun.yaml")
        returns: list[Sequence[JobReturn]] = []
        number = 0
        while asked := [(c, amount) for c in self.candidates if (amount := c.next_amount()) is not None]:
            batch = [[*self.params, *c.overrides, *arguments, f"amount={amount:g}"] for c, amount in asked]
            self.validate_batch_is_legal(batch)
            done = self.launcher.launch(batch, initial_job_idx=number)
            for (candidate, amount), result in zip(asked, done, strict=True):
                _ = result.return_value  # raises what the job raised
                self._take_in(candidate, amount, result)
            number += len(batch)
            returns.append(done)
        (folder / ANSWER).write_text(answer(self.budget, self.candidates), encoding="utf-8")
        return returns

    def _take_in(self, candidate: Any, amount: float, result: JobReturn) -> None:
        from prune_lab.results.summary import read_summary

        assert result.hydra_cfg is not None
        summary = read_summary(Path(result.hydra_cfg.hydra.runtime.output_dir))
        if summary is None or summary.status != "FINISHED":
            candidate.refused = (summary and summary.reason) or "its process ended without saying so"
        else:
            candidate.tell(amount, summary.metrics, self.budget)

    def _refuse_sweeps(self, arguments: list[str]) -> None:
        assert self.hydra_context is not None
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        for override in parser.parse_overrides(arguments):
            if override.is_sweep_override() or override.get_key_element() in ("amount", "method.amount"):
                raise ValueError(
                    f"{override.input_line}: the amount is what is looked for, and other keys have one value each; "
                    "candidates are listed in the recipe"
                )
