"""Scores of the experts of a mixture, of which the lowest go; pure functions of what each expert was given and gave.

With R_j the tokens that expert j is chosen for, n_j their number, f_j(t) its output before the gate and g_j(t) the gate
that the model multiplies it by. An expert that no token chose has score 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ExpertSums:
    """Sums over the tokens of each expert of a block, float64, (experts,).

    tokens: n_j. gates: of g. norms: of |f|. squares: of |f|^2. weighted: of g |f|. orders: experts of each token, the
    best one first, (tokens, experts); where a score needs them. losses: mean squared change of the mixture's output
    without it, times tokens.
    """

    tokens: Tensor
    gates: Tensor
    norms: Tensor
    squares: Tensor
    weighted: Tensor
    orders: Tensor | None = None
    losses: Tensor | None = None


def sums_of(chosen: Tensor, gates: Tensor, outputs: Tensor, experts: int) -> ExpertSums:
    """Sums over some tokens. chosen, gates: (tokens, k). outputs: before the gate, (tokens, k, hidden)."""
    index, g = chosen.flatten(), gates.flatten().double()
    norms = outputs.float().norm(dim=-1).flatten().double()

    def total(values: Tensor) -> Tensor:
        return torch.zeros(experts, dtype=torch.float64, device=values.device).index_add_(0, index, values)

    return ExpertSums(total(torch.ones_like(g)), total(g), total(norms), total(norms.square()), total(g * norms))


def _mean(of: Callable[[ExpertSums], Tensor]) -> Callable[[ExpertSums], Tensor]:
    return lambda sums: of(sums) / sums.tokens.clamp(min=1)


# Frequency and sums of gates (SEER-MoE, 2404.05089, and others); mean norms (MAN, MSAN: 2606.15716); EAN, and REAP
# (Lasby et al., 2510.13999), which is the mean of what an expert adds to the states.
OF_SUMS: dict[str, Callable[[ExpertSums], Tensor]] = {
    "frequency": lambda sums: sums.tokens,
    "gate_sum": lambda sums: sums.gates,
    "ean": lambda sums: sums.norms,
    "man": _mean(lambda sums: sums.norms),
    "msan": _mean(lambda sums: sums.squares),
    "reap": _mean(lambda sums: sums.weighted),
}


def aimer(weights: list[Tensor]) -> Tensor:
    """Mean of |w| over root mean square of all weights of each expert, negative: the flattest go (AIMER, 2603.18492).

    weights: of each matrix, (experts, ...).
    """

    def of_expert(parts: tuple[Tensor, ...]) -> Tensor:  # of one expert they are held in float64 at a time
        flat = torch.cat([part.flatten().double() for part in parts])
        return -flat.abs().mean() / flat.square().mean().sqrt().clamp(min=torch.finfo(torch.float64).tiny)

    return torch.stack([of_expert(parts) for parts in zip(*weights, strict=True)])


def ranked_choice(orders: Tensor, k: int) -> Tensor:
    """Round in which each expert goes: the one least often among the first k of a token's experts that are left.

    orders: experts of each token, the best one first, (tokens, experts). Ties: the lower index goes first.
    """
    orders, experts = orders.long(), orders.shape[1]
    left, rounds = torch.ones(experts, dtype=torch.bool), torch.zeros(experts, dtype=torch.float64)
    for number in range(experts):
        stands = left[orders]
        counted = stands & (stands.cumsum(1) <= k)
        counts = torch.bincount(orders[counted], minlength=experts).double().masked_fill(~left, torch.inf)
        last = int(counts.argmin())
        left[last], rounds[last] = False, number
    return rounds


def keep_best(scores: Tensor, keep: int, groups: int = 1) -> Tensor:
    """The experts of highest score, bools (experts,); the lower index goes first among equals.

    groups: runs of experts that a router chooses among first, each of which keeps as many.
    """
    by_group = scores.view(groups, -1)
    remove = by_group.shape[1] - keep // groups
    gone = by_group.argsort(dim=1, stable=True)[:, :remove]
    return torch.ones_like(by_group, dtype=torch.bool).scatter_(1, gone, False).flatten()
