"""Bisection of the amount for each candidate, within bounds. Pure; hydra/sweeper=bisect runs it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import ceil, floor
from typing import Any

from prune_lab.results.bounds import Bound, hold, said
from prune_lab.results.metrics import axis


@dataclass(frozen=True)
class Budget:
    """Upper bounds on metrics, and the metric by which candidates that keep to them are compared.

    Bounds are on quality, which the largest amount that keeps to them is looked for (`quality/perplexity_ratio<=1.1`,
    `quality/kl<=0.05`, `tasks/piqa_flips<=0.1`), or on cost, which the smallest such amount is (`size/disk_mb<=12`,
    `latency/decode_ms_per_token_p50<=3`).
    """

    bounds: tuple[Bound, ...]
    best: str = ""

    def __post_init__(self) -> None:
        if not self.bounds:
            raise ValueError('bound is required: bounds on metrics, such as bound=["quality/perplexity_ratio<=1.1"]')
        if not self.best:
            object.__setattr__(self, "best", "params/reduction" if self.on_quality else "quality/perplexity")
        if len({bound.on_quality for bound in self.bounds}) > 1:
            raise ValueError(
                "bound limits quality and cost at once, which pull the amount both ways: bound one, and name the other "
                "in hydra.sweeper.best"
            )
        if axis(self.best).better is None or "/" not in self.best:
            raise ValueError(
                f"hydra.sweeper.best={self.best!r} is not a metric with a better end, such as size/disk_mb"
            )

    @property
    def on_quality(self) -> bool:
        """True where quality is bounded (and the largest amount wanted) rather than cost (the smallest)."""
        return self.bounds[0].on_quality

    def holds(self, metrics: Mapping[str, float]) -> bool:
        """True where a run keeps to all bounds."""
        return hold(self.bounds, metrics)

    def rank(self, metrics: Mapping[str, float]) -> float:
        """Lower is better."""
        value = metrics.get(self.best, float("inf"))
        return value if axis(self.best).better == "lower" else -value

    @property
    def columns(self) -> list[str]:
        """Metrics that the answer shows."""
        return list(dict.fromkeys([self.best, *(bound.metric for bound in self.bounds)]))

    def __str__(self) -> str:
        return said(self.bounds)


@dataclass
class Candidate:
    """A set of overrides, and the bisection of its amount among the multiples of `step` from `low` to `high`.

    It takes for granted that more pruning costs quality and saves the rest; a metric that noise makes go up and down is
    bracketed somewhere in the noise.
    """

    overrides: tuple[str, ...]
    low: float
    high: float
    step: float
    largest: bool
    best: tuple[float, Mapping[str, float]] | None = None  # amount and metrics of the best run that keeps to the budget
    tried: list[tuple[float, bool]] = field(default_factory=list)  # amount, and whether it does
    refused: str | None = None  # why a run of it did not finish

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high < 1 or not 0 < self.step <= self.high - self.low:
            raise ValueError(
                f"hydra.sweeper.low={self.low:g}, high={self.high:g}, step={self.step:g}: needed is 0 <= low < high < "
                "1 and a step between 0 and high - low"
            )
        # Rounded, so that a multiple that misses an end by its last bits alone counts as that end.
        first, last = ceil(round(self.low / self.step, 9)), floor(round(self.high / self.step, 9))
        # Multiples known to keep to the budget and not to, both just outside at first.
        self._good, self._bad = (first - 1, last + 1) if self.largest else (last + 1, first - 1)

    def next_amount(self) -> float | None:
        """The amount to try next; None when the bracket is closed or a run was refused."""
        if self.refused is not None or abs(self._good - self._bad) <= 1:
            return None
        return round((self._good + self._bad) // 2 * self.step, 10)

    def tell(self, amount: float, metrics: Mapping[str, float], budget: Budget) -> None:
        """Takes in the outcome of the amount that was asked for."""
        holds, multiple = budget.holds(metrics), round(amount / self.step)
        self.tried.append((amount, holds))
        if holds:
            self._good, self.best = multiple, (amount, metrics)
        else:
            self._bad = multiple


def answer(budget: Budget, candidates: Iterable[Candidate]) -> str:
    """The outcome as Markdown: the best candidate within the budget, and what each came to."""
    found = list(candidates)
    within = sorted((c for c in found if c.best), key=lambda c: budget.rank(_best(c)))
    runs = sum(len(c.tried) for c in found)
    lines = [f"**Within {budget}** ({runs} runs): nothing that was tried."]
    if within:
        amount = within[0].best[0] if within[0].best else 0.0
        lines = [
            f"**Within {budget}** ({runs} runs), by {budget.best}: `{' '.join(within[0].overrides)} amount={amount:g}`."
        ]
    rows = [_row(budget, c) for c in [*within, *(c for c in found if c not in within)]]
    names = budget.columns
    lines += ["", f"| candidate | amount | {' | '.join(names)} |", f"| --- | --- |{' --- |' * len(names)}", *rows]
    return "\n".join(lines) + "\n"


def _row(budget: Budget, candidate: Candidate) -> str:
    names = budget.columns
    what = " ".join(candidate.overrides)
    if candidate.best is None:
        why = candidate.refused or "not within the budget at any amount tried"
        return f"| {what} | {why} |{'  |' * len(names)}"
    amount, metrics = candidate.best
    return (
        f"| {what} | {amount:g} | {' | '.join(f'{metrics[name]:.4g}' if name in metrics else '' for name in names)} |"
    )


def _best(candidate: Candidate) -> Mapping[str, float]:
    assert candidate.best is not None
    return candidate.best[1]


def read_candidates(entries: Iterable[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Each candidate's overrides; raises ValueError where one sweeps, or sets the amount that is looked for."""
    candidates = [tuple(f"{key}={value}" for key, value in entry.items()) for entry in entries]
    for overrides in candidates or [("amount",)]:
        if any(override.split("=")[0] in ("amount", "method.amount") for override in overrides):
            raise ValueError("hydra.sweeper.candidates is a list of overrides such as {method: wanda}, without amount")
    return candidates
