"""The training loop: every recovery, and training from scratch, is this one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from prune_lab.errors import Refused
from prune_lab.models.anatomy import Anatomy
from prune_lab.models.resize import dense_name
from prune_lab.recovery import checkpoint
from prune_lab.recovery.context import TrainingContext
from prune_lab.recovery.dropout import residual_dropout
from prune_lab.recovery.losses import Loss
from prune_lab.recovery.optimizer import adamw, follow, lr_factor
from prune_lab.recovery.order import WindowOrder
from prune_lab.recovery.recipe import TrainingRecipe
from prune_lab.recovery.rewinding import Rewinder
from prune_lab.recovery.sharding import Sharded, Unsharded
from prune_lab.recovery.validation import Validation
from prune_lab.system.device import uses_bfloat16

LOG_EVERY = 10  # steps


def train(model: Any, recipe: TrainingRecipe, training: TrainingContext) -> None:
    """Trains `model` in place for recipe.steps steps, pruning as the schedule says, and leaves it in eval mode.

    The weights are float32 while they train, whatever the run's number type: small updates vanish in 16 bits.
    A checkpoint left by an interrupted run is gone on from, and ends in the same weights.
    """
    with _gradient_checkpointing(model, recipe.gradient_checkpointing), residual_dropout(model, recipe.dropout):
        loop = _Loop(model, recipe, training, recipe.loss(training))
        loop.run()
    dense = training.dense.model  # a type may keep some weights in float32, such as its routers
    anatomy = Anatomy(model)
    kept = {name: weight.dtype for name, weight in dense.named_parameters() if weight.dtype != dense.dtype}
    for name, weight in model.named_parameters():
        weight.data = weight.data.to(kept.get(dense_name(anatomy, name), training.device.dtype))
    training.pruned.masks.hold(model)


class _Loop:
    """One training under way."""

    def __init__(self, model: Any, recipe: TrainingRecipe, training: TrainingContext, loss_of: Loss) -> None:
        self.model, self.recipe, self.training, self.loss_of = model, recipe, training, loss_of
        stream = training.tokens.enough("train", training.seq_len)
        batch_size, world = recipe.batch_size, training.world
        if batch_size % world.size or batch_size < world.size * recipe.accumulate:
            raise Refused(
                f"recovery.batch_size={batch_size} cannot be shared equally by {world.size} processes in "
                f"recovery.accumulate={recipe.accumulate} parts: give a multiple of {world.size * recipe.accumulate}"
            )
        self.order = WindowOrder(stream, training.seq_len, batch_size, training.seed)
        self.rewinder = Rewinder(training.rewind, training.events, recipe.steps, training.seed)
        self.bfloat16 = uses_bfloat16(recipe.autocast, training.device.torch_device)
        self.autocast = torch.autocast(training.device.torch_device.type, torch.bfloat16, enabled=self.bfloat16)
        self.start = self._begin()
        model.train()
        self.work = self._spread()

    def _begin(self) -> int:
        """Prepares the model and its optimizer, as they were if there is a checkpoint; returns the first step."""
        model, training = self.model, self.training
        saved = checkpoint.read(training.checkpoint)
        if saved is not None:
            saved.shape_model(model)
            training.pruned = saved.pruned
            training.console.note(f"going on from the checkpoint at step {saved.step}")
        else:
            self.rewinder.look(lambda: dict(model.named_parameters()), 0)
            names = _names(model)
            training.prune_before(0)
            self.rewinder.follow(names, model, training.pruned.cuts)
        self.validation = Validation(self.recipe, training)
        for weight in model.parameters():  # not the buffers: rotary frequencies are float32 anyway
            weight.data = weight.data.float()
        if saved is None and training.is_due(0):
            self.rewinder.go_back(model, 0)
            training.pruned.masks.hold(model)
        start = saved.step if saved is not None else 0
        self.recipe.begin(model, training, start)
        self.optimizer = adamw(model, self.recipe)
        if saved is None:
            return 0
        saved.fill(model, self.optimizer)
        self.rewinder.kept = saved.kept("rewind")
        self.validation.go_on(saved.best, saved.kept("best"))
        return start

    def _spread(self) -> Unsharded:
        """Model and optimizer of the next steps, or this process's shard of them."""
        training = self.training
        whole = Unsharded(self.model, self.optimizer, training.pruned.masks)
        return Sharded(whole, self.recipe, training.world, self.bfloat16) if training.world.sharded else whole

    def run(self) -> None:
        """The steps that are left."""
        model, recipe, training, validation = self.model, self.recipe, self.training, self.validation
        tokens_per_step, step = recipe.batch_size * training.seq_len, self.start
        with training.console.progress(recipe.steps * tokens_per_step, "training", unit="tok") as bar:
            bar.update(step * tokens_per_step)
            if step == 0 and validation.every:
                self._validate(0)
            while step < recipe.steps and not validation.says_stop:
                figures = self._step(step)
                step += 1
                bar.update(tokens_per_step)
                if step % LOG_EVERY == 0 or step == recipe.steps:
                    bar.set_postfix(loss=f"{figures['train/loss']:.3f}")
                    training.log(step, figures)
                if validation.is_due(step):
                    self._validate(step)
                if step % recipe.checkpoint_every == 0:
                    self._save(step)
        self.work.gather()
        validation.restore_best(model, step)
        recipe.end(model, training)
        model.eval()
        training.prune_before(recipe.steps)
        model.requires_grad_(False)

    def _step(self, step: int) -> dict[str, float]:
        """One step of the optimizer, after a pruning if it is time for one; what there is to log of it."""
        model, recipe, training = self.model, self.recipe, self.training
        if step > 0 and (training.is_due(step) or self.rewinder.looks_at(step)):
            self.work.gather()
            self.rewinder.look(lambda: recipe.weights(model, training), step)
            if training.is_due(step):
                self._prune(step)
            self.work = self._spread()
        trained, optimizer = self.work.model, self.work.optimizer
        for group in optimizer.param_groups:
            position, steps = self.rewinder.lr_position(step)
            group["lr"] = recipe.lr * lr_factor(position, steps, recipe.warmup, recipe.final_lr)
        losses = self._gradients(training.bos.before(self.order.batch(step)))
        torch.nn.utils.clip_grad_norm_(trained.parameters(), recipe.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.work.masks.hold(trained)
        lr = optimizer.param_groups[0]["lr"]
        return losses | {"train/lr": lr, "train/sparsity": training.pruned.realized}

    def _gradients(self, batch: Tensor) -> dict[str, float]:
        """Gradients of the mean loss over a batch, computed in parts one after the other; returns what to log of it.

        Load balance is that of each part, and its mean over them: it is no sum over tokens.
        """
        world, place, model = self.training.world, self.training.device.torch_device, self.work.model
        mine, found = world.share(batch), dict[str, float]()
        for part in mine.chunk(self.recipe.accumulate):
            with self.autocast:
                loss = self.work.call(self.loss_of, part.to(place))
            share = len(part) / len(mine)
            (loss.total * share).backward()
            figures = {"train/loss": loss.total.detach(), "train/router_aux_loss": loss.balance}
            for name, figure in figures.items():
                if figure is not None:
                    found[name] = found.get(name, 0.0) + float(figure) * share
        means = torch.tensor([*found.values()], device=place)
        gradients = [w.grad for w in model.parameters() if w.grad is not None]
        world.average([means] if world.sharded else [means, *gradients])  # those of shards are means by now
        return dict(zip(found, means.tolist(), strict=True))

    def _prune(self, step: int) -> None:
        """Prunes, goes back if the schedule has it, and trains what is left; the optimizer keeps its part of it."""
        model, training, rewinder = self.model, self.training, self.rewinder
        self.recipe.end(model, training)
        model.eval()
        names = _names(model)
        training.prune_before(step)
        rewinder.follow(names, model, training.pruned.cuts)
        rewinder.go_back(model, step)
        training.pruned.masks.hold(model)
        self.recipe.begin(model, training, step)
        if self.recipe.restarts or rewinder.moves_weights:
            self.optimizer = adamw(model, self.recipe)
        else:
            follow(self.optimizer, model, training.pruned.cuts)
        model.train()

    def _validate(self, step: int) -> None:
        self.validation.measure(self.work, step, self.autocast, self.training.world.from_main)

    def _save(self, step: int) -> None:
        kept = {"rewind": self.rewinder.kept, "best": self.validation.kept}
        state, best = (self.work.model, self.work.optimizer, self.training.pruned), self.validation.remembered
        writes = self.training.world.is_main
        try:
            checkpoint.save(self.training.checkpoint, step, *state, kept=kept, best=best, writes=writes)
        except (OSError, SafetensorError) as error:  # a full disk, say: the training itself does not need it
            self.training.warn(f"no checkpoint at step {step}: {error}")


@contextmanager
def _gradient_checkpointing(model: Any, wanted: bool) -> Iterator[None]:
    """Has each block computed again in the backward pass, in place of keeping its activations (1604.06174)."""
    if not wanted:
        yield
        return
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # of older transformers
    getattr(model, f"{name}_checkpointing_enable")({"use_reentrant": False})
    try:
        yield
    finally:
        getattr(model, f"{name}_checkpointing_disable")()
        model.disable_input_require_grads()


def _names(model: Any) -> dict[Tensor, str]:
    return {weight: name for name, weight in model.named_parameters()}
