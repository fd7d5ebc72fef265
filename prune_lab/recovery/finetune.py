"""recovery=finetune: training on the next token of the dataset's training text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prune_lab.errors import Refused
from prune_lab.models.anatomy import routers_of
from prune_lab.recovery.recipe import TrainingRecipe

if TYPE_CHECKING:
    from prune_lab.models.load import Loaded
    from prune_lab.recovery.context import TrainingContext
    from prune_lab.recovery.losses import Balance, Loss
    from prune_lab.system.device import Device


@dataclass(frozen=True)
class Finetune(TrainingRecipe):
    """Training of all weights on the mean cross-entropy of the next token, and on the load balance of experts."""

    def balance(self, training: TrainingContext) -> Balance:
        """Load-balance loss of what is trained."""
        from prune_lab.recovery.losses import balance_of

        return balance_of(self.router_aux_loss, self.router_aux_loss_by == "block", training)

    def hashes(self, dense: Loaded, device: Device) -> dict[str, str]:
        """None; raises Refused where a load-balance loss or routers are spoken of that the model does not have."""
        if not self.train_router and not routers_of(dense.model):
            raise Refused(
                f"recovery.train_router=false: models of the type {dense.family} have no routers of experts; give true"
            )
        if self.router_aux_loss:
            from prune_lab.recovery.losses import check_balance

            check_balance(self.router_aux_loss, dense)
        return {}

    def loss(self, training: TrainingContext) -> Loss:
        """Cross-entropy of the next token, with the load-balance loss of a mixture of experts."""
        from prune_lab.recovery.losses import next_token_loss

        return next_token_loss(training.bos.length, self.balance(training))

    def recover(self, model: Any, training: TrainingContext) -> None:
        """Trains on its loss."""
        from prune_lab.recovery.train import train

        train(model, self, training)
