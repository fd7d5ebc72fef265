"""Validation during training: perplexity on the validation text, the best weights, and early stopping."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from prune_lab.errors import Refused
from prune_lab.models.loss import window_losses
from prune_lab.recovery.context import TrainingContext
from prune_lab.recovery.recipe import TrainingRecipe
from prune_lab.recovery.sharding import Unsharded, full


class Validation:
    """Measures a model on the first windows of the validation split, and remembers the best.

    The best counts from the last pruning on: before it the model is not yet what was asked for.
    """

    def __init__(self, recipe: TrainingRecipe, training: TrainingContext) -> None:
        self.every, self._recipe, self._training = recipe.validate_every, recipe, training
        self._patience, self._keeps = recipe.patience, recipe.keep_best or recipe.patience > 0
        self.best, self.best_step, self.worse = math.inf, -1, 0  # worse: measurements since the best
        self.kept: dict[str, Tensor] = {}
        self._windows = self._read_windows() if self.every else torch.empty(0, 0)

    def _read_windows(self) -> Tensor:
        training = self._training
        try:
            windows = training.tokens.windows("validation", training.seq_len)
        except Refused as error:
            if self._keeps:
                raise
            self.every = 0
            training.warn(f"no validation perplexity while it trained: {error}")
            return torch.empty(0, 0)
        return training.bos.before(windows[: self._recipe.validate_windows])

    def is_due(self, step: int) -> bool:
        """True where validation is due after `step` steps."""
        return self.every > 0 and (step % self.every == 0 or step == self._recipe.steps)

    @torch.no_grad()
    def measure(self, trained: Unsharded, step: int, autocast: Any, share: Callable[[float], float]) -> None:
        """Perplexity after `step` steps, logged; the weights are kept if it is the best so far.

        The model is in eval mode meanwhile. `share` has every process of a training go by the same figure.
        """
        trained.model.eval()
        losses, place, prefix = [], self._training.device.torch_device, self._training.bos.length
        with autocast:
            for batch in self._windows.split(self._recipe.batch_size):
                losses.append(trained.call(window_losses, batch.to(place, torch.int64), prefix).cpu())
        trained.model.train()
        mean = share(float(torch.cat(losses).double().mean()))
        perplexity = math.exp(mean) if mean < 700 else math.inf
        if math.isfinite(perplexity):
            self._training.log(step, {"validation/perplexity": perplexity})
        if self._keeps and step > self._training.last_event:
            self._compare(trained.model, step, perplexity)

    @property
    def remembered(self) -> dict[str, float | None]:
        """State for a checkpoint, beside the best weights."""
        best = self.best if self.kept else None  # JSON has no infinity
        return {"best": best, "best_step": self.best_step, "worse": self.worse}

    def go_on(self, remembered: dict[str, Any], kept: dict[str, Tensor]) -> None:
        """Takes up what a checkpoint has."""
        self.kept, self.best = kept, remembered["best"] if kept else math.inf
        self.best_step, self.worse = remembered["best_step"], remembered["worse"]

    def _compare(self, model: Any, step: int, perplexity: float) -> None:
        if perplexity < self.best:
            self.best, self.best_step, self.worse = perplexity, step, 0
            self.kept = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        else:
            self.worse += 1

    @property
    def says_stop(self) -> bool:
        """True where it has not improved for `patience` measurements."""
        return 0 < self._patience <= self.worse

    @torch.no_grad()
    def restore_best(self, model: Any, step: int) -> None:
        """Puts the best weights back, where the last ones, after `step` steps, are not the best, and says so."""
        if not self.kept or self.best_step == step:
            return
        for name, weight in model.named_parameters():
            weight.copy_(full(self.kept[name]))
        self._training.warn(
            f"trained {step} of {self._recipe.steps} steps; kept are the weights of step {self.best_step}, where the "
            f"validation perplexity was lowest: {self.best:.4g}"
        )
