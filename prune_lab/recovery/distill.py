"""recovery=distill: training on a teacher's predictions and on the text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from prune_lab.errors import Refused
from prune_lab.models.load import HubModel, Loaded
from prune_lab.recovery.finetune import Finetune
from prune_lab.system.files import state_of
from prune_lab.text.encode import tokenizer_sha256

if TYPE_CHECKING:
    from prune_lab.recovery.context import TrainingContext
    from prune_lab.recovery.losses import Loss
    from prune_lab.system.device import Device


@dataclass(frozen=True)
class Distill(Finetune):
    """Knowledge distillation (Hinton et al., 1503.02531) from the dense model, or from another one.

    The loss is alpha * T^2 * KL(teacher || student), both at temperature T, per token, + (1 - alpha) * cross-entropy.
    teacher: a folder or Hub id of another model with the same tokenizer.
    """

    temperature: float = 2.0
    alpha: float = 0.5
    teacher: str | None = None

    forward_passes: ClassVar[float] = 4.0  # the teacher's beside those of finetuning

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
        found = super().hashes(dense, device)
        if self.teacher is None:
            return found
        teacher = _load(self.teacher, device)
        other, mine = (loaded.model.config.get_text_config().vocab_size for loaded in (teacher, dense))
        if other != mine or tokenizer_sha256(teacher.tokenizer) != tokenizer_sha256(dense.tokenizer):
            raise Refused(
                f"recovery.teacher={self.teacher!r} has another tokenizer (vocabulary of {other}) than the model "
                f"(vocabulary of {mine}): predictions of the same tokens are compared"
            )
        if teacher.name not in _fingerprints:
            _fingerprints[teacher.name] = teacher.fingerprint()
        return found | {f"teacher_{key}": value for key, value in _fingerprints[teacher.name].items()}

    def loss(self, training: TrainingContext) -> Loss:
        """The mixed loss; the teacher is in eval mode, has no gradients and is not changed."""
        from prune_lab.recovery.losses import distillation_loss

        teacher = training.dense if self.teacher is None else _load(self.teacher, training.device)
        balance = self.balance(training)
        return distillation_loss(teacher.model, self.temperature, self.alpha, training.bos.length, balance)


_teachers: dict[tuple[Any, ...], Loaded] = {}
_fingerprints: dict[str, dict[str, str]] = {}  # of the teacher that is kept


def _load(name: str, device: Device) -> Loaded:
    """The teacher of that name: loaded once for the jobs of a sweep; one is kept at a time."""
    source = HubModel(name=name)
    key = name, device, state_of(source.files())  # an edited file is read again
    if key not in _teachers:
        _teachers.clear()
        _fingerprints.clear()
        _teachers[key] = source.load(device, seed=0)
    return _teachers[key]
