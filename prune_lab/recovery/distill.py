"""recovery=distill: training on a teacher's predictions and on the text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from prune_lab.errors import Refused
from prune_lab.models.load import HubModel, Loaded
from prune_lab.recovery.base import Training
from prune_lab.recovery.finetune import Finetune
from prune_lab.recovery.train import train
from prune_lab.system.device import Device
from prune_lab.text.encode import tokenizer_sha256


@dataclass(frozen=True)
class Distill(Finetune):
    """Knowledge distillation (Hinton et al., 1503.02531) from the dense model, or from another one.

    The loss is alpha * T^2 * KL(teacher || student), both at temperature T, per token, + (1 - alpha) * cross-entropy.
    teacher: a folder or Hub id of another model with the same tokenizer.
    """

    temperature: float = 2.0
    alpha: float = 0.5
    teacher: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.temperature < 1000:
            raise ValueError(f"temperature={self.temperature} is outside (0, 1000)")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha} is outside [0, 1]")
        if self.teacher is not None:
            try:
                HubModel(name=self.teacher)
            except Refused:
                raise
            except ValueError as error:  # it speaks of its own key
                raise ValueError(str(error).replace("name=", "teacher=", 1)) from error

    def hashes(self, dense: Loaded, device: Device) -> dict[str, str]:
        """sha256 of the teacher, where it is not the dense model; raises Refused where its tokenizer is another."""
        if self.teacher is None:
            return {}
        teacher = _load(self.teacher, device)
        other, mine = (loaded.model.config.vocab_size for loaded in (teacher, dense))
        if other != mine or tokenizer_sha256(teacher.tokenizer) != tokenizer_sha256(dense.tokenizer):
            raise Refused(
                f"recovery.teacher={self.teacher!r} has another tokenizer (vocabulary of {other}) than the model "
                f"(vocabulary of {mine}): predictions of the same tokens are compared"
            )
        if teacher.name not in _fingerprints:
            _fingerprints[teacher.name] = teacher.fingerprint()
        return {f"teacher_{key}": value for key, value in _fingerprints[teacher.name].items()}

    def recover(self, model: Any, training: Training) -> None:
        """Trains on the mixed loss; the teacher is in eval mode, has no gradients and is not changed."""
        teacher = training.dense if self.teacher is None else _load(self.teacher, training.device)

        def loss_of(student: Any, batch: Tensor) -> Tensor:
            with torch.no_grad():
                wanted = teacher.model(input_ids=batch, use_cache=False).logits[:, :-1]
            found = student(input_ids=batch, use_cache=False).logits[:, :-1]
            soft = soft_loss(found.flatten(0, 1), wanted.flatten(0, 1), self.temperature)
            hard = cross_entropy(found.flatten(0, 1).float(), batch[:, 1:].flatten())
            return self.alpha * soft + (1 - self.alpha) * hard

        train(model, self, training, loss_of)


def soft_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(teacher || student) at temperature T, averaged over tokens; both of shape (tokens, vocabulary).

    T^2 keeps the gradient's size as T changes, since it shrinks as 1 / T^2.
    """
    found = log_softmax(student.float() / temperature, dim=-1)
    wanted = log_softmax(teacher.float() / temperature, dim=-1)
    return kl_div(found, wanted, reduction="batchmean", log_target=True) * temperature**2


_teachers: dict[tuple[str, Device], Loaded] = {}
_fingerprints: dict[str, dict[str, str]] = {}  # of the teacher that is kept


def _load(name: str, device: Device) -> Loaded:
    """The teacher of that name: loaded once for the jobs of a sweep; one is kept at a time."""
    if (name, device) not in _teachers:
        _teachers.clear()
        _fingerprints.clear()
        _teachers[name, device] = HubModel(name=name).load(device, seed=0)
    return _teachers[name, device]
