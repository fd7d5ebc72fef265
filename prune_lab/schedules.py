"""Schedules: they spread a method's amount over the steps of the training that recovery does."""

from __future__ import annotations

from dataclasses import dataclass

from prune_lab.errors import Refused

SPACINGS = ("linear", "geometric")
REWINDS = ("weights", "lr", "random")


@dataclass(frozen=True)
class Event:
    """Prune to a cumulative amount before a step of the training (at its end, where step is the number of steps)."""

    step: int
    amount: float


@dataclass(frozen=True)
class Rewind:
    """Rewinding: the state that is reset, after each pruning, to that before a step of the training."""

    what: str  # one of REWINDS
    step: int


@dataclass(frozen=True)
class Schedule:
    """A schedule option.

    start: when pruning begins, a fraction of the training (up to 1) or a step of it (above 1): 0 prunes what was
    loaded and trains after it, 0.5 trains half of the steps densely.
    """

    start: float = 0.0

    def __post_init__(self) -> None:
        if not self.start >= 0:
            raise ValueError(f"start={self.start} must be at least 0")

    def events(self, final: float, steps: int) -> list[Event]:
        """Cumulative amounts, ascending, the last one `final`, by step of a training of `steps` (0: there is none).

        Raises Refused where they do not fit.
        """
        raise NotImplementedError

    def rewinding(self, steps: int) -> Rewind | None:
        """Rewinding after each pruning of a training of `steps`, or None; raises Refused."""
        return None

    def first(self, steps: int) -> int:
        """The step that `start` names."""
        return _step("start", self.start, steps)


@dataclass(frozen=True)
class OneShot(Schedule):
    """schedule=one_shot: the whole amount at once."""

    def events(self, final: float, steps: int) -> list[Event]:
        """The final amount alone."""
        return [Event(self.first(steps), final)]


@dataclass(frozen=True)
class Iterative(Schedule):
    """schedule=iterative: in rounds, each followed by an equal share of the training (Han et al., 1506.02626).

    spacing: linear, equal steps of the amount; geometric, an equal fraction of what is left in each round.
    rewind: what goes back to an earlier point after each pruning. weights (Frankle et al., 1903.01611): the weights
    that stay and the learning rate, to where both were at rewind_to; lr (Renda et al., 2003.02389): the learning rate
    alone; random: the learning rate to the beginning, and the weights that stay are drawn anew, the control that shows
    whether it is the weights or only their places that matter (Frankle & Carbin, 1803.03635).
    rewind_to: a fraction of the training (up to 1) or a step of it, `start` at the latest.
    """

    rounds: int = 4
    spacing: str = "linear"
    rewind: str | None = None
    rewind_to: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rounds < 1:
            raise ValueError(f"rounds={self.rounds} must be at least 1")
        if self.spacing not in SPACINGS:
            raise ValueError(f"spacing={self.spacing!r} is not one of {', '.join(SPACINGS)}")
        if self.rewind is not None and self.rewind not in REWINDS:
            raise ValueError(f"rewind={self.rewind!r} is not one of null, {', '.join(REWINDS)}")
        if not self.rewind_to >= 0:
            raise ValueError(f"rewind_to={self.rewind_to} must be at least 0")
        if self.rewind_to and self.rewind in (None, "random"):
            raise ValueError(f"rewind_to={self.rewind_to} has no effect with rewind={self.rewind}: give weights or lr")

    def events(self, final: float, steps: int) -> list[Event]:
        """One for each round; without training all of them at once."""
        first = self.first(steps)
        if steps and self.rounds > steps - first:
            raise Refused(
                f"schedule.rounds={self.rounds} is more than the {steps - first} steps of training from "
                f"schedule.start={self.start:g} on: give more recovery.steps or fewer rounds"
            )
        found = []
        for number in range(1, self.rounds + 1):
            share = number / self.rounds
            amount = final * share if self.spacing == "linear" else 1 - (1 - final) ** share
            step = first + (number - 1) * (steps - first) // self.rounds
            found.append(Event(step, final if number == self.rounds else amount))
        return found

    def rewinding(self, steps: int) -> Rewind | None:
        """Rewinding that `rewind` and `rewind_to` name."""
        if self.rewind is None:
            return None
        if steps == 0:
            raise Refused(
                f"schedule.rewind={self.rewind} goes back in a training, and recovery=none trains nothing: choose "
                "recovery=finetune or another training"
            )
        step, first = _step("rewind_to", self.rewind_to, steps), self.first(steps)
        if step > first:
            raise Refused(
                f"schedule.rewind_to={self.rewind_to:g} (step {step}) is after schedule.start={self.start:g} "
                f"(step {first}), the first pruning: it goes back to a point before that"
            )
        return Rewind(self.rewind, step)


@dataclass(frozen=True)
class Gradual(Schedule):
    """schedule=gradual: many small steps while the model trains, fast at first (Zhu & Gupta, 1710.01878).

    s_t = s_f (1 - (1 - (t - t0) / (t1 - t0))^3). start, end, interval: fractions of the training (up to 1) or steps.
    """

    end: float = 0.75
    interval: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.interval > 0:
            raise ValueError(f"interval={self.interval} must be above 0")
        if not self.end > 0:
            raise ValueError(f"end={self.end} must be above 0")

    def events(self, final: float, steps: int) -> list[Event]:
        """One every interval from start on, the last one at `end` with the final amount."""
        if steps == 0:
            raise Refused(
                "schedule=gradual prunes while the model trains, and recovery=none trains nothing: choose "
                "recovery=finetune or another training, or schedule=iterative"
            )
        first, last = self.first(steps), _step("end", self.end, steps)
        every = max(1, _step("interval", self.interval, steps))
        if first >= last:
            raise Refused(
                f"schedule.start={self.start:g} (step {first}) is not before schedule.end={self.end:g} ({last})"
            )
        found = []
        for step in range(first + every, last, every):
            left = 1 - (step - first) / (last - first)
            found.append(Event(step, final * (1 - left**3)))
        return [*found, Event(last, final)]


def _step(name: str, value: float, steps: int) -> int:
    """A key that is a fraction of the training up to 1, and a step above; raises Refused beyond the training."""
    if value <= 1:
        return round(value * steps)
    if value > steps > 0:
        raise Refused(
            f"schedule.{name}={value:g} is beyond the training of {steps} steps: lower it, or give a fraction"
        )
    return int(value) if steps else 0
