"""recovery=finetune: training on the next token of the dataset's training text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prune_lab.recovery.recipe import TrainingRecipe

if TYPE_CHECKING:
    from prune_lab.recovery.context import TrainingContext
    from prune_lab.recovery.losses import Loss


@dataclass(frozen=True)
class Finetune(TrainingRecipe):
    """Training of all weights on the mean cross-entropy of the next token, and on the load balance of experts."""

    def loss(self, training: TrainingContext) -> Loss:
        """Cross-entropy of the next token, with the load-balance loss of a mixture of experts."""
        from prune_lab.recovery.losses import coefficient_of_balance, next_token_loss

        return next_token_loss(training.bos.length, coefficient_of_balance(self.router_aux_loss, training))

    def recover(self, model: Any, training: TrainingContext) -> None:
        """Trains on its loss."""
        from prune_lab.recovery.train import train

        train(model, self, training)
