"""Going back after a pruning: the lottery-ticket procedures, within one training of a fixed number of steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from prune_lab.models.auto_class import auto_class, names_of
from prune_lab.models.cuts import Cut
from prune_lab.schedules import Event, Rewind


class Rewinder:
    """Keeps the weights of the step to go back to, cuts them as the model is cut, and puts them back.

    Rewinding of weights (Frankle et al., 1903.01611), of the learning rate alone (Renda et al., 2003.02389), or to
    weights drawn anew, the control (Frankle & Carbin, 1803.03635).
    """

    def __init__(self, rewind: Rewind | None, events: list[Event], steps: int, seed: int) -> None:
        self._rewind, self._seed, self._steps = rewind, seed, steps
        self._starts = [event.step for event in events if event.step < steps]
        self.kept: dict[str, Tensor] = {}

    @property
    def moves_weights(self) -> bool:
        """True where weights are replaced after a pruning, so that an optimizer must begin anew."""
        return self._rewind is not None and self._rewind.what != "lr"

    def looks_at(self, step: int) -> bool:
        """True at the step to go back to, whose weights are kept."""
        return self._rewind is not None and self._rewind.what == "weights" and step == self._rewind.step

    def look(self, weights: Callable[[], dict[str, Tensor]], step: int) -> None:
        """Keeps the weights (float32) if this is the step to go back to; called before a pruning at that step."""
        if self.looks_at(step):
            self.kept = {name: weight.detach().float().clone() for name, weight in weights().items()}

    def follow(self, names: dict[Tensor, str], model: Any, cuts: list[Cut]) -> None:
        """Cuts what is kept as a pruning has cut the model; `names` are those of its parameters before that."""
        if not self.kept:
            return
        for cut in cuts:
            name = names[cut.new] = names[cut.old]
            self.kept[name] = cut.of(self.kept[name])
        self.kept = {name: self.kept[names[weight]] for name, weight in model.named_parameters()}

    @torch.no_grad()
    def go_back(self, model: Any, step: int) -> None:
        """Puts the kept weights in, or weights drawn for this step; the caller holds the masks afterwards."""
        if self._rewind is None or step >= self._steps:
            return
        if self._rewind.what == "random":
            drawn = _drawn_anew(model, self._seed + 1_000_003 * (step + 1))  # no seed of model.weights=random
        elif self._rewind.what == "weights":
            drawn = self.kept
        else:
            return
        for name, weight in model.named_parameters():
            weight.copy_(drawn[name])

    def lr_position(self, step: int) -> tuple[int, int]:
        """Position of a step in its learning-rate schedule, and the number of steps of that schedule.

        Without rewinding it is one schedule over the whole training. With it every round has one of its own, which
        goes on from the step that was gone back to: (that step + steps since the pruning, that step + the round's).
        """
        if self._rewind is None:
            return step, self._steps
        starts = [0, *self._starts, self._steps]
        began = max(start for start in starts if start <= step)
        ended = min(start for start in starts if start > step)
        back_to = self._rewind.step if began in self._starts else 0
        return back_to + step - began, back_to + ended - began


def _drawn_anew(model: Any, seed: int) -> dict[str, Tensor]:
    """The parameters of a model of the same shape with random weights, as transformers draws them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % 2**63)
        auto = auto_class(model.config, names_of(model))
        other: Any = auto.from_config(model.config, trust_remote_code=False, dtype=torch.float32)
    return dict(other.named_parameters())
