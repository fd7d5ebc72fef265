"""Base class of the export options."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from torch import Tensor

    from prune_lab.export.loads_in import Verdict
    from prune_lab.models.load import Loaded


@dataclass(frozen=True)
class Export:
    """An export option: a folder that holds a model, in one format.

    Every run writes it and reads it back, to measure size and memory; `is_kept` says whether it stays afterwards. Such
    a folder has config.json and the tokenizer's files whatever its weights are stored as.

    `is_plain`: its files are those of a Hugging Face folder, which is what a run measures that keeps none. Runs that
    differ in plain exports alone are one run.
    `exact`: what is read back computes equal logits; otherwise they may differ as another order of additions makes
    them.
    `takes_low_bits`: it can hold quantized weights, those of a post-compression. `takes_streamed`: it can be written
    of a model whose weights are on disk (model.stream=true). `library`: the Hub's name of what loads it. `readers`:
    modules that `read` imports, whose memory is not the model's. `measured_in`: engines of measure.engine that load it.
    """

    not_applicable: ClassVar[tuple[str, ...]] = ()
    is_kept: ClassVar[bool] = True
    is_plain: ClassVar[bool] = False
    exact: ClassVar[bool] = True
    takes_low_bits: ClassVar[bool] = False
    takes_streamed: ClassVar[bool] = False
    library: ClassVar[str] = "transformers"
    readers: ClassVar[tuple[str, ...]] = ("prune_lab.models.export",)
    measured_in: ClassVar[tuple[str, ...]] = ()

    def check_config(self, config: Any, cuts: Collection[str]) -> None:
        """Raises Refused for a model that it cannot hold, by its config, before the model is loaded.

        cuts: kinds of units that will be removed from it.
        """

    def check_model(self, loaded: Loaded) -> None:
        """Raises Refused for a model that it cannot hold, before anything is done to it."""

    def notes(self, loaded: Loaded) -> list[str]:
        """Warnings for the run's record, of the model that was written."""
        return []

    def write(self, loaded: Loaded, folder: Path) -> None:
        """Writes the model into an empty folder, which takes its place when this returns."""
        raise NotImplementedError

    def files(self, folder: Path) -> list[Path]:
        """The files of a written folder that hold weights: their bytes are the model's size on disk."""
        raise NotImplementedError

    def read(self, folder: Path, like: Any = None) -> Any:
        """The model of a written folder, as transformers has it, in eval mode.

        like: the model that it was written from, whose number type and device it gets, and whose weights' place, in
        memory or on disk; without one it is read as it is stored, into memory.
        """
        raise NotImplementedError

    def reading(self, loaded: Loaded) -> str:
        """Instructions for loading the export of a model, for the model card."""
        raise NotImplementedError

    def loads_in(self, loaded: Loaded, cuts: Collection[str] = ()) -> list[Verdict]:
        """Answers of engines to the export of a model, as far as there are rules; cuts: what pruning took out of it."""
        return []

    def check(self, model: Any, folder: Path, tokens: Tensor, own_kernels: bool = False) -> None:
        """Reads a written folder back and compares logits of `tokens`, shape (1, tokens), with the model's.

        own_kernels: the model computes with kernels that what is read back does not have. Raises RuntimeError where
        the logits differ by more than that and `exact` allow: such an export must not be used.
        """
        from prune_lab.models.export import check_logits

        check_logits(model, self.read(folder, model), folder, tokens, self.exact and not own_kernels)

    @property
    def identity(self) -> dict[str, Any] | None:
        """Part of the fingerprint: what a run's figures owe to the export; None for plain ones."""
        return None if self.is_plain else {"class": f"{type(self).__module__}.{type(self).__qualname__}"} | asdict(self)
