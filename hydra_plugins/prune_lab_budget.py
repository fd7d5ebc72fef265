"""hydra/sweeper=budget: the best shape of a model within bounds, such as at most so many parameters, bytes or ms.

    bound: ["params/total<=110e6"]
    hydra:
      mode: MULTIRUN
      sweeper:
        axes: [blocks, mlp, heads, experts, hidden]     # of the shape; those that the model has
        shapes: 4                                       # shapes that are measured whole

How it goes about it stands in prune_lab/sweeps/budget.py. The answer stands above the sweep's leaderboard. The module
lies here since Hydra finds sweepers in hydra_plugins alone.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
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

HELD_OUT = 8192  # tokens of the calibration text, at most a quarter of it


@dataclass
class BudgetConf:
    """The keys of hydra.sweeper."""

    _target_: str = "hydra_plugins.prune_lab_budget.BudgetSweeper"
    axes: list[str] = field(default_factory=lambda: ["blocks", "mlp", "heads", "experts", "hidden"])
    amounts: list[float] = field(default_factory=lambda: [0.05, 0.1, 0.2, 0.3, 0.45, 0.7])
    round_to: int = 32
    held_out: int | None = None
    shapes: int = 4
    best: str = "params/total"
    params: dict[str, Any] | None = None


ConfigStore.instance().store(group="hydra/sweeper", name="budget", node=BudgetConf, provider="prune_lab")


class BudgetSweeper(Sweeper):
    """Searches the shapes of a model; runs are launched in batches."""

    def __init__(
        self,
        axes: Sequence[str],
        amounts: Sequence[float],
        round_to: int,
        held_out: int | None,
        shapes: int,
        best: str,
        params: Mapping[str, Any] | None = None,
    ) -> None:
        from prune_lab.methods.damage import Damage
        from prune_lab.results.bounds import check_metric

        check_metric(best, "hydra.sweeper.best")
        held = 1 if held_out is None else held_out
        try:
            Damage(axes=tuple(axes), amounts=tuple(amounts), round_to=round_to, held_out=held)
        except ValueError as error:
            raise ValueError(f"hydra.sweeper.{error}") from error
        if shapes < 1:
            raise ValueError(f"hydra.sweeper.shapes={shapes} must be at least 1: those that are measured whole")
        self.axes, self.amounts, self.round_to, self.held_out = tuple(axes), tuple(amounts), round_to, held_out
        self.shapes, self.best = shapes, best
        self.params = [f"{key}={value}" for key, value in (params or {}).items()]
        self.number = 0
        self.returns: list[Sequence[JobReturn]] = []

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Makes the launcher that the configuration names."""
        self.hydra_context, self.config = hydra_context, config
        self.launcher: Launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        """Runs the search; `arguments` are the command line's."""
        from prune_lab.results.bounds import check_measured, read_bounds, texts_of
        from prune_lab.sweeps.budget import Search, Settings
        from prune_lab.sweeps.budget_answer import answer
        from prune_lab.sweeps.budget_plots import draw
        from prune_lab.sweeps.comparison import ANSWER

        assert self.config is not None
        self._refuse(arguments)
        config, self.arguments = self.config, arguments
        folder = Path(config.hydra.sweep.dir)
        bounds = read_bounds(texts_of(config.bound))
        if not any(word.startswith("measure") for word in self.params):
            on_quality = all(bound.on_quality for bound in bounds)
            for name in (*(bound.metric for bound in bounds), *([self.best] if on_quality else [])):
                check_measured(name, config.measure)
        settings = Settings(
            self._held_out(), self.shapes, self.best, stored_as_is=self._stores_as_is(),
            runs_export=config.measure.engine != "none", left_out=self._left_out(), survey=self._survey(),
        )  # fmt: skip
        search = Search(bounds, settings, self._run)
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(config, folder / "multirun.yaml")
        found = search.search()
        (folder / ANSWER).write_text(answer(found), encoding="utf-8")
        draw(found, folder)
        if found.winner is None:
            raise ValueError(f"bound: no shape was found within it: {found.why_none}")
        return self.returns

    def _run(self, batch: Sequence[Sequence[str]]) -> list[Any]:
        from prune_lab.results.summary import Summary, read_summary

        asked = [[*self._given_with(overrides), *overrides] for overrides in batch]
        self.validate_batch_is_legal(asked)
        done = self.launcher.launch(asked, initial_job_idx=self.number)
        self.number += len(asked)
        self.returns.append(done)
        summaries = []
        for result in done:
            _ = result.return_value  # raises what the job raised
            assert result.hydra_cfg is not None
            summary = read_summary(Path(result.hydra_cfg.hydra.runtime.output_dir))
            summaries.append(summary or Summary("KILLED", reason="its process ended without saying so"))
        return summaries

    def _given_with(self, overrides: Sequence[str]) -> list[str]:
        """The overrides that were given, less the keys of groups that a run leaves out."""
        gone = [word.removesuffix("=none") for word in overrides if word.endswith("=none")]
        given = [*self.params, *self.arguments]
        return [word for word in given if not any(word.startswith((f"{group}=", f"{group}.")) for group in gone)]

    def _left_out(self) -> tuple[str, ...]:
        """Groups that a run may leave out: not those whose keys the recipe itself sets, which none has not."""
        from prune_lab.config.parts import build
        from prune_lab.errors import Refused

        assert self.hydra_context is not None
        assert self.config is not None
        found = []
        for group in ("recovery", "post", "export"):
            none = f"{group}=none"
            if str(self.config.hydra.runtime.choices[group]) == "none":
                continue
            load = self.hydra_context.config_loader.load_sweep_config
            composed = load(self.config, [*self._given_with([none]), none])
            with suppress(Refused):
                build(composed[group], group)
                found.append(group)
        return tuple(found)

    def _survey(self) -> tuple[str, ...]:
        """Overrides of the run that measures the damage: keys with other values than their defaults."""
        from prune_lab.methods.damage import Damage

        assert self.config is not None
        of_method = {
            "axes": list(self.axes), "amounts": [f"{amount:g}" for amount in self.amounts],
            "round_to": self.round_to,
        }  # fmt: skip
        usual = Damage()
        usual_of = {"axes": list(usual.axes), "amounts": [f"{a:g}" for a in usual.amounts], "round_to": usual.round_to}
        changed = {f"method.{key}": value for key, value in of_method.items() if value != usual_of[key]}
        unmeasured = {
            "latency": False, "memory": False, "energy": False, "aa": False, "accelerate": "none", "batch_sizes": [1],
            "lengths": [], "generation_prompts": 0, "tasks": [], "engine": "none",
        }  # fmt: skip
        measure = self.config.measure
        changed |= {f"measure.{key}": value for key, value in unmeasured.items() if measure[key] != value}
        return tuple(f"{key}={_word(value)}" for key, value in changed.items())

    def _held_out(self) -> int:
        """Calibration windows that are held out."""
        assert self.config is not None
        text = self.config.dataset.calibration
        wanted = -(-HELD_OUT // int(text.seq_len)) if self.held_out is None else self.held_out
        if self.held_out is None:
            return max(1, min(wanted, int(text.n_samples) // 4))
        if wanted >= int(text.n_samples):
            raise ValueError(
                f"hydra.sweeper.held_out={wanted} leaves no window of dataset.calibration.n_samples={text.n_samples} "
                f"to calibrate on: give at most {int(text.n_samples) - 1}, such as a quarter"
            )
        return wanted

    def _stores_as_is(self) -> bool:
        """True where the files that a run measures hold the weights in its number type."""
        assert self.config is not None
        chosen = self.config.hydra.runtime.choices
        return str(chosen.post) == "none" and str(chosen.export) in ("none", "hf")

    def _refuse(self, arguments: list[str]) -> None:
        from prune_lab.methods.shape import AXES

        assert self.hydra_context is not None
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        looked_for = ("amount", "method", "method.amount", "method.held_out", *(f"method.{axis}" for axis in AXES))
        for override in parser.parse_overrides([*self.params, *arguments]):
            if override.is_sweep_override() or override.get_key_element() in looked_for:
                raise ValueError(
                    f"{override.input_line}: the shape is what is looked for, and other keys have one value each; "
                    "hydra.sweeper.axes names the axes of the shape"
                )


def _word(value: Any) -> str:
    """A value as an override has it."""
    if isinstance(value, list):
        return f"[{','.join(map(str, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)
