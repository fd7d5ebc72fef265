"""Last states of the dense model on the test text, kept for all runs on it, which then need its head alone.

Logits would take more place: of SmolLM2-135M 85 times as much.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from prune_lab.dense_cache import DenseCache, Part
from prune_lab.measure.perplexity import losses_from, states_at_targets, steps_of
from prune_lab.models.anatomy import Anatomy
from prune_lab.models.loss import has_whole_logits
from prune_lab.models.watched_experts import modules_of_experts
from prune_lab.system.console import Console
from prune_lab.system.device import Device
from prune_lab.text.bos import Bos
from prune_lab.text.tokens import sha256

KIND = "dense_states"
MOST = 2**30  # bytes; beyond it the dense model passes the windows again for each compressed one


def can_keep_states(model: Any, windows: Tensor) -> bool:
    """True where a run on these windows needs no more of the dense model than its last states, and they are few.

    Not of a type that does more to its logits than the head does, nor of a mixture, whose choices of experts are
    compared while it runs.
    """
    layout = Anatomy(model).found
    if has_whole_logits(model) or (layout is not None and modules_of_experts(model, layout)):
        return False
    head = model.get_output_embeddings().weight
    return windows.numel() * head.shape[1] * head.element_size() <= MOST


class DenseStates:
    """Last states of the dense model at the targets of some windows, batch by batch, from the cache."""

    def __init__(
        self, model: Any, windows: Tensor, batch_size: int, device: Device, bos: Bos, cache: DenseCache
    ) -> None:
        self.windows, self._model, self._batch_size = windows, model, batch_size
        self._device, self._bos, self._cache = device, bos, cache

    def batches(self, console: Console) -> Iterator[Tensor]:
        """States of each batch: (windows, seq_len - 1, hidden), on the device."""
        of = {"tokens_sha256": sha256(self.windows), "batch_size": self._batch_size, "bos": self._bos.stamp}
        count = -(-len(self.windows) // self._batch_size)
        for part in self._cache.parts(self._cache.key(KIND, of), KIND, count, lambda: self._computed(console)):
            yield part["states"]

    def losses(self, console: Console) -> Tensor:
        """Losses of the dense model on the windows, as `measure_losses` has them."""
        return losses_from(self._model, self.batches(console), self.windows, self._batch_size, self._device)

    def _computed(self, console: Console) -> Iterator[Part]:
        steps = steps_of(self._model, self._bos.before(self.windows))
        with console.progress(steps, "dense model on the test text", unit="tok") as bar:
            of = (self._model, self.windows, self._batch_size, self._device, self._bos, bar.update)
            for states in states_at_targets(*of):
                yield {"states": states.contiguous()}
