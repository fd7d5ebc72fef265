"""recovery=lora: training low-rank updates of the weights instead of the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from prune_lab.models.anatomy import Anatomy
from prune_lab.recovery.finetune import Finetune

if TYPE_CHECKING:
    from torch import Tensor

    from prune_lab.recovery.context import TrainingContext


@dataclass(frozen=True)
class Lora(Finetune):
    """LoRA (Hu et al., 2106.09685) of every Linear and expert of the blocks, merged through the masks at the end.

    The optimizer's state is that of the adapters alone. Pruned weights stay exactly zero: a merge of unmasked updates
    would fill them. A pruning during the training merges first, and goes on with new adapters.
    rank: of the updates. scale: what they are multiplied by (alpha / rank in the paper's terms).
    """

    lr: float = 3e-3
    rank: int = 8
    scale: float = 2.0
    weight_decay: float = 0.0

    restarts: ClassVar[bool] = True
    not_applicable: ClassVar[tuple[str, ...]] = ("train_router",)  # nothing but the updates is trained

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise ValueError(f"rank={self.rank} must be at least 1")
        if not self.scale > 0:
            raise ValueError(f"scale={self.scale} must be above 0")

    def begin(self, model: Any, training: TrainingContext, step: int) -> None:
        """Attaches new adapters and freezes the weights."""
        from prune_lab.recovery import adapters

        without = adapters.attach(Anatomy(model), training.pruned.masks, self.rank, self.scale, training.seed + step)
        if without:
            training.warn(
                f"{len(without)} Linears are not trained ({', '.join(without[:3])}{', ...' * (len(without) > 3)}): the "
                "model uses their weights without calling them"
            )

    def end(self, model: Any, training: TrainingContext) -> None:
        """Merges them."""
        from prune_lab.recovery import adapters

        adapters.merge(Anatomy(model), training.pruned.masks, self.scale)

    def weights(self, model: Any, training: TrainingContext) -> dict[str, Tensor]:
        """The frozen weights with the updates added, through the masks."""
        from prune_lab.recovery import adapters

        return adapters.merged(Anatomy(model), training.pruned.masks, self.scale)
