"""export=gguf: one file that llama.cpp loads, with the tokenizer in it.

Of every family and type, a file was compared with that of llama.cpp's own converter (tests/test_gguf_export.py).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from prune_lab.export.base import Export

if TYPE_CHECKING:
    from torch import Tensor

    from prune_lab.export.loads_in import Verdict
    from prune_lab.models.load import Loaded

FILE = "model.gguf"
TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0")


@dataclass(frozen=True)
class Gguf(Export):
    """A GGUF file, with the config and the tokenizer of transformers beside it.

    type: of the matrices; vectors, norms and routers are float32.
    """

    type: str = "f16"

    exact: ClassVar[bool] = False
    library: ClassVar[str] = "gguf"
    measured_in: ClassVar[tuple[str, ...]] = ("llama_cpp",)

    def __post_init__(self) -> None:
        if self.type not in TYPES:
            raise ValueError(f"type={self.type!r} is not one of {', '.join(TYPES)}")
        if find_spec("gguf") is None:
            raise ValueError(
                'export=gguf is written by the package gguf, which is not installed: pip install "prune-lab[gguf]"'
            )

    def check_config(self, config: Any, cuts: Collection[str]) -> None:
        """Raises Refused for a family, or a setting of it, that llama.cpp does not compute."""
        from prune_lab.models.gguf.families import check_config

        check_config(config, cuts)

    def check_model(self, loaded: Loaded) -> None:
        """Raises Refused for a tokenizer that llama.cpp does not have."""
        from prune_lab.models.gguf.vocabulary import vocabulary_of

        vocabulary_of(loaded.tokenizer, loaded.model.config)

    def write(self, loaded: Loaded, folder: Path) -> None:
        """Writes the file, config and tokenizer."""
        from prune_lab.models.export import write_beside_weights
        from prune_lab.models.gguf import file
        from prune_lab.models.gguf.families import check_config
        from prune_lab.models.gguf.vocabulary import vocabulary_of

        check_config(loaded.model.config)  # what pruning made of it
        write_beside_weights(loaded, folder)
        general = {"name": Path(loaded.name).name.removesuffix(".gguf")}
        general |= {"license": loaded.licence} if loaded.licence else {}
        vocabulary = vocabulary_of(loaded.tokenizer, loaded.model.config)
        file.write(folder / FILE, loaded.model, vocabulary, self.type, general)

    def files(self, folder: Path) -> list[Path]:
        """The file."""
        return sorted(folder.glob("*.gguf"))

    def read(self, folder: Path, like: Any = None) -> Any:
        """The dequantised weights, in the model that the config beside them is of."""
        from transformers import AutoConfig

        from prune_lab.models.gguf import file

        config = AutoConfig.from_pretrained(folder)
        found = file.read(folder / FILE, config, config.dtype if like is None else like.dtype)
        return found if like is None else found.to(like.device)

    def check(self, model: Any, folder: Path, tokens: Tensor, own_kernels: bool = False) -> None:
        """Compares metadata and values of the file with the model's, and of type=f32 the logits of stock transformers.

        Of families that it reads. Raises RuntimeError where they differ by more than the type's rounding.
        """
        from transformers import AutoTokenizer

        from prune_lab.models.export import check_logits
        from prune_lab.models.gguf import file
        from prune_lab.models.gguf.families import architecture_of
        from prune_lab.models.gguf.vocabulary import vocabulary_of

        vocabulary = vocabulary_of(AutoTokenizer.from_pretrained(folder), model.config)
        file.check(folder / FILE, model, vocabulary, self.type)
        if self.type == "f32" and architecture_of(model.config).read_again:
            again = file.read_by_transformers(folder / FILE, model)
            check_logits(model, again.to(model.device), folder, tokens, exact=False)

    def notes(self, loaded: Loaded) -> list[str]:
        """Types of the weights, the rule for cutting text, and what llama.cpp does otherwise."""
        from prune_lab.models.gguf.families import notes_of
        from prune_lab.models.gguf.file import notes_of_types
        from prune_lab.models.gguf.vocabulary import vocabulary_of

        vocabulary = vocabulary_of(loaded.tokenizer, loaded.model.config)
        return [
            *notes_of_types(loaded.model, self.type),
            *vocabulary.notes,
            *notes_of(loaded.model.config),
        ]

    def reading(self, loaded: Loaded) -> str:
        """llama.cpp's programs, and prune_lab."""
        return (
            f"llama.cpp: `llama-cli -m {FILE}`. {FILE} holds the tokenizer, the chat template and all weights, the "
            f"matrices in {self.type}"
        )

    def loads_in(self, loaded: Loaded, cuts: Collection[str] = ()) -> list[Verdict]:
        """llama.cpp, and what reads its files."""
        from prune_lab.export.loads_in import of_gguf, shapes_of

        return of_gguf(shapes_of(loaded, cuts), self.type)
