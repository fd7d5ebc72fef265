"""Callback for the Trainer of transformers, and for trainers made of it (TRL's): the zeros of a pruned model stay.

For training elsewhere; a recovery of this package holds its masks itself.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import TrainerCallback

from prune_lab.models.anatomy import Anatomy
from prune_lab.pruning.masks import clear


class HoldZeros(TrainerCallback):
    """Sets the weights of the blocks' matrices that are zero when a training begins to zero after each step.

    Of a model whose weights are trained themselves: an adapter leaves the zeros of its base alone, and fills them when
    it is merged. Raises ValueError where the model has no such zeros.
    """

    def __init__(self) -> None:
        self._held: list[tuple[Tensor, Tensor]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **others: Any) -> None:
        """Takes down where the zeros are."""
        matrices = [matrix.weight for _, matrix in Anatomy(getattr(model, "module", model)).linears()]
        self._held = [(weight, keep) for weight in matrices if not bool((keep := weight.detach() != 0).all())]
        if not self._held:
            raise ValueError(
                "HoldZeros: no matrix of the blocks has a zero: the model was not pruned in single weights"
            )

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Clears them: momentum and weight decay move every weight."""
        for weight, keep in self._held:
            clear(weight, keep)
