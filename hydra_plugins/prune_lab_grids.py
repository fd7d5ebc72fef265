"""hydra/sweeper=grids: a sweep over several grids, for comparisons whose axes differ from method to method.

    hydra:
      mode: MULTIRUN
      sweeper:
        params: {seed: 0}                                           # in every grid
        grids:
          - {method: "magnitude,wanda", amount: "0.4,0.6"}          # 4 jobs
          - {method: "magnitude,wanda", method.pattern: "2:4"}      # 2 jobs

A key on the command line takes the place of that key in every grid; jobs that come out alike run once. The module lies
here since Hydra finds sweepers in the package hydra_plugins alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override


@dataclass
class GridsConf:
    """The keys of hydra.sweeper."""

    _target_: str = "hydra_plugins.prune_lab_grids.GridSweeper"
    max_batch_size: int | None = None
    params: dict[str, Any] | None = None
    grids: list[dict[str, Any]] = field(default_factory=list)


ConfigStore.instance().store(group="hydra/sweeper", name="grids", node=GridsConf, provider="prune_lab")


class GridSweeper(BasicSweeper):
    """Hydra's own sweeper, with the union of several products in place of one."""

    def __init__(
        self,
        max_batch_size: int | None = None,
        params: dict[str, str] | None = None,
        grids: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        super().__init__(max_batch_size, params)
        self.grids = grids

    def split_arguments(  # type: ignore[override] # it is called as a method
        self, overrides: list[Override], max_batch_size: int | None
    ) -> list[list[list[str]]]:
        """The jobs in batches, each a list of overrides. `overrides`: those of `params`, then the command line's."""
        from prune_lab.config.composing import Loader

        assert self.hydra_context is not None
        assert self.config is not None
        loader = self.hydra_context.config_loader
        parser = OverridesParser.create(config_loader=loader)
        common, given = overrides[: len(self.params)], overrides[len(self.params) :]
        jobs: list[list[str]] = []
        known: list[list[str]] = []
        for grid in self.grids or [{}]:
            own = parser.parse_overrides([f"{key}={value}" for key, value in grid.items()])
            for job in BasicSweeper.split_arguments([*common, *own, *given], None)[0]:
                applicable = loader.applicable(self.config, job) if isinstance(loader, Loader) else job
                if applicable not in known:
                    known.append(applicable)
                    jobs.append(job)
        return [list(batch) for batch in BasicSweeper.split_overrides_to_chunks(jobs, max_batch_size)]
