"""Training recipe: the keys of every option that trains, and the hooks in which options differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from prune_lab.checks import check_autocast
from prune_lab.models.anatomy import routers_of
from prune_lab.recovery.base import Recovery

if TYPE_CHECKING:
    from torch import Tensor

    from prune_lab.recovery.context import TrainingContext
    from prune_lab.recovery.losses import Loss


@dataclass(frozen=True)
class TrainingRecipe(Recovery):
    """Settings of a training: AdamW with warm-up and cosine decay (Loshchilov & Hutter, 1711.05101 and 1608.03983).

    validate_every: steps between measurements of the perplexity on `validate_windows` windows of validation text; 0:
    none. keep_best: ends with the weights of the lowest one. patience: ends the training when that many measurements
    in a row were no better, with the best weights; 0: never. train_router: whether the routers of a mixture of experts
    are trained. router_aux_loss: coefficient of its load-balance loss; None: that of the model's config.
    router_aux_loss_by: model, which adds up all blocks before it compares the experts, as transformers does, or block.
    """

    warmup: float = 0.05
    final_lr: float = 0.1
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip_norm: float = 1.0
    dropout: float = 0.0
    train_router: bool = True
    router_aux_loss: float | None = None
    router_aux_loss_by: str = "model"
    accumulate: int = 1
    autocast: str = "auto"
    gradient_checkpointing: bool = False
    validate_every: int = 50
    validate_windows: int = 32
    keep_best: bool = False
    patience: int = 0
    checkpoint_every: int = 200

    restarts: ClassVar[bool] = False  # whether `begin` makes new parameters, for which an optimizer must begin anew

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("warmup", "final_lr", "weight_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} is outside [0, 1]")
        for name in ("beta1", "beta2", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is outside [0, 1)")
        if not self.clip_norm > 0:
            raise ValueError(f"clip_norm={self.clip_norm} must be above 0")
        if self.router_aux_loss is not None and not 0 <= self.router_aux_loss <= 1:
            raise ValueError(
                f"router_aux_loss={self.router_aux_loss} is outside [0, 1]; null is the model's config's coefficient"
            )
        if self.router_aux_loss_by not in ("model", "block"):
            raise ValueError(f"router_aux_loss_by={self.router_aux_loss_by!r} is not one of model, block")
        check_autocast(self.autocast)
        if self.accumulate < 1 or self.accumulate > self.batch_size:
            raise ValueError(f"accumulate={self.accumulate} must be from 1 to batch_size={self.batch_size}")
        if self.checkpoint_every < 1:
            raise ValueError(f"checkpoint_every={self.checkpoint_every} must be at least 1 step")
        if self.validate_windows < 1:
            raise ValueError(f"validate_windows={self.validate_windows} must be at least 1")
        for name in ("validate_every", "patience"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0")
        if self.validate_every == 0 and (self.patience or self.keep_best):
            raise ValueError(
                f"validate_every=0 measures nothing that patience={self.patience}, keep_best={self.keep_best} could "
                "go by: give a number of steps"
            )

    def begin(self, model: Any, training: TrainingContext, step: int) -> None:
        """Says what is trained from `step` on: here all parameters, or all but those of routers."""
        model.requires_grad_(True)
        if not self.train_router:
            for module in routers_of(model):
                module.requires_grad_(False)

    def end(self, model: Any, training: TrainingContext) -> None:
        """Leaves a model of plain weights, before a pruning and when the training is over."""

    def weights(self, model: Any, training: TrainingContext) -> dict[str, Tensor]:
        """The plain weights that `end` would leave now, by name."""
        return dict(model.named_parameters())

    def loss(self, training: TrainingContext) -> Loss:
        """Training loss: a function of the model and a batch of windows, (windows, seq_len)."""
        raise NotImplementedError
