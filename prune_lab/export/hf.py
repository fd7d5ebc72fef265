"""export=hf: a Hugging Face folder, the weights in safetensors."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from prune_lab.export.base import Export

if TYPE_CHECKING:
    from prune_lab.export.loads_in import Verdict
    from prune_lab.models.load import Loaded

LOW_BITS = (
    "prune_lab, or stock transformers with the package compressed-tensors: `from_pretrained(folder, "
    "quantization_config=CompressedTensorsConfig(run_compressed=False))` (of a mixture `dequantize=True` in place of "
    "`run_compressed=False`), unless a note here says otherwise"
)


@dataclass(frozen=True)
class HuggingFace(Export):
    """Dense weights as stock transformers reads them; quantized ones in the layout of compressed-tensors."""

    is_plain: ClassVar[bool] = True
    takes_low_bits: ClassVar[bool] = True
    takes_streamed: ClassVar[bool] = True

    def write(self, loaded: Loaded, folder: Path) -> None:
        """Writes safetensors, config and tokenizer."""
        from prune_lab.models.export import write_folder

        write_folder(loaded, folder)

    def files(self, folder: Path) -> list[Path]:
        """All safetensors."""
        return sorted(folder.glob("*.safetensors"))

    def read(self, folder: Path, like: Any = None) -> Any:
        """Model of a folder: by stock transformers, or by our readers of quantized, bitmask and offloaded weights."""
        from prune_lab.models.export import read_folder

        return read_folder(folder, like)

    def reading(self, loaded: Loaded) -> str:
        """Stock transformers, which needs a package for quantized weights."""
        from prune_lab.models.auto_class import auto_class, names_of

        auto = auto_class(loaded.model.config, names_of(loaded.model))
        stock = f"`{auto.__name__}.from_pretrained(folder)` of stock transformers"
        return LOW_BITS if loaded.is_low_bit else stock

    def loads_in(self, loaded: Loaded, cuts: Collection[str] = ()) -> list[Verdict]:
        """By shapes and number types."""
        from prune_lab.export.loads_in import of_folder, shapes_of

        return of_folder(shapes_of(loaded, cuts))
