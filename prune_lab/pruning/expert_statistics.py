"""Statistics of the experts of each block while calibration text passes the dense model as a whole."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from prune_lab.models.blocks import ReachedError
from prune_lab.models.watched_experts import Mixture, by_block, first_of, outputs_of, watched, without_experts
from prune_lab.pruning.calibration import Calibrator
from prune_lab.pruning.expert_scores import ExpertSums, sums_of
from prune_lab.system.world import World

MOST = 32  # experts that are left out one by one: as many passes through each mixture


@torch.no_grad()
def expert_statistics(
    model: Any, mixtures: list[Mixture], experts: int, calibrator: Calibrator, needs: str
) -> dict[int, ExpertSums]:
    """Sums over the calibration text by block, on the CPU; needs: "orders", "losses", or the sums alone.

    Orders of the tokens are in the order of the windows.
    """
    watch, world = _Watch(model, mixtures, experts, needs), calibrator.sharing
    calibrator.pass_whole(model, "experts", watch.watching)
    return {block: _of_all(world, watch.sums[block]) for block in sorted(watch.sums)}


def _of_all(world: World, sums: ExpertSums) -> ExpertSums:
    """Sums over the text of all processes."""
    world.sum(getattr(sums, name) for name in _SUMS)
    if sums.losses is not None:
        world.sum([sums.losses])
    if sums.orders is None:
        return sums
    return replace(sums, orders=world.gather(sums.orders.int()).to(sums.orders.dtype))  # gloo moves no 16-bit integers


class _Watch:
    def __init__(self, model: Any, mixtures: list[Mixture], experts: int, needs: str) -> None:
        self._model, self._experts, self._needs = model, experts, needs
        self._mixtures = {mixture.block: mixture for mixture in mixtures}
        self._inside = False  # a call that this class makes
        self._calls = dict[int, tuple[Any, Any]]()
        self.sums: dict[int, ExpertSums] = {}

    def watching(self) -> Any:
        """Context in which the calls of all mixtures are added up."""
        stack = ExitStack()
        stack.enter_context(watched(self._model, by_block(self._mixtures.values()), self._look))
        if self._needs in ("orders", "losses"):
            for mixture in self._mixtures.values():
                whole = self._model.get_submodule(mixture.whole)
                hook = whole.register_forward_pre_hook(
                    lambda _, args, kwargs, block=mixture.block: self._note(block, args, kwargs), with_kwargs=True
                )
                stack.callback(hook.remove)
                hook = whole.register_forward_hook(lambda _, args, out, block=mixture.block: self._whole(block, out))
                stack.callback(hook.remove)
        return stack

    def _note(self, block: int, args: Any, kwargs: Any) -> None:
        if not self._inside:
            self._calls[block] = args, kwargs

    def _look(self, block: int, states: Tensor, chosen: Tensor, gates: Tensor) -> None:
        if self._inside:
            self._routed = chosen, gates
            if self._needs == "orders":
                raise ReachedError
            return
        self._routed_before = chosen
        found = sums_of(chosen, gates, outputs_of(self._model, self._mixtures[block], states, chosen), self._experts)
        self._add(block, ExpertSums(*(getattr(found, name).cpu() for name in _SUMS)))

    def _add(self, block: int, found: ExpertSums) -> None:
        before = self.sums.get(block)
        if before is not None:
            totals = {name: getattr(before, name) + getattr(found, name) for name in _SUMS}
            found = replace(before, **totals)
        self.sums[block] = found

    def _whole(self, block: int, out: Any) -> None:
        if self._inside or block not in self._calls:
            return
        self._inside = True
        try:
            if self._needs == "orders":
                self._look_at_orders(block, self._routed_before)
            else:
                self._look_at_losses(block, self._routed_before, first_of(out))
        finally:
            self._inside = False
            del self._calls[block]

    def _again(self, block: int, gone: Tensor) -> Any:
        mixture = self._mixtures[block]
        args, kwargs = self._calls[block]
        with without_experts(self._model, [mixture], {block: gone}):
            return self._model.get_submodule(mixture.whole).forward(*args, **kwargs)

    def _look_at_orders(self, block: int, chosen: Tensor) -> None:
        """The experts of each token from the best to the last, by routing without those that were chosen before."""
        tokens = len(chosen)
        gone = torch.zeros(tokens, self._experts, dtype=torch.bool, device=chosen.device).scatter_(1, chosen, True)
        orders = [chosen]
        while (missing := self._experts - sum(part.shape[1] for part in orders)) > 0:
            with suppress(ReachedError):
                self._again(block, gone)
            following = self._routed[0]
            fresh = ~gone.gather(1, following)  # the last choice may be filled up with experts that are gone
            count = int(fresh.sum(1).min())
            if count == 0:  # a router of groups sees no others: the rest by their numbers
                orders.append(gone.to(torch.int8).argsort(dim=1, stable=True)[:, :missing])
                break
            order = (~fresh).to(torch.int8).argsort(dim=1, stable=True)[:, : min(count, missing)]
            orders.append(following.gather(1, order))
            gone = gone.scatter(1, orders[-1], True)
        found, before = torch.cat(orders, 1).to(torch.int16).cpu(), self.sums[block].orders
        self.sums[block] = replace(self.sums[block], orders=found if before is None else torch.cat([before, found]))

    def _look_at_losses(self, block: int, chosen: Tensor, wanted: Tensor) -> None:
        """Mean squared change of the mixture's output at an expert's tokens without it, times their number."""
        losses = torch.zeros(self._experts, dtype=torch.float64)
        for expert in range(self._experts):
            rows = (chosen == expert).any(1)
            if not rows.any():
                continue
            gone = torch.zeros(self._experts, dtype=torch.bool)
            gone[expert] = True
            found = first_of(self._again(block, gone))
            difference = (found.flatten(0, -2) - wanted.flatten(0, -2))[rows].double()
            losses[expert] = float(difference.square().mean()) * int(rows.sum())
        before = self.sums[block].losses
        self.sums[block] = replace(self.sums[block], losses=losses if before is None else before + losses)


_SUMS = ("tokens", "gates", "norms", "squares", "weighted")
