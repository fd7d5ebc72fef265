"""export=onnx: an ONNX graph for ONNX Runtime and what is built on it."""

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

TYPES = ("f32", "f16")
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
DECODED = 16


@dataclass(frozen=True)
class Onnx(Export):
    """model.onnx with its weights in model.onnx.data, and the config and tokenizer of transformers beside them.

    type: of weights and activations.
    """

    type: str = "f32"

    exact: ClassVar[bool] = False
    library: ClassVar[str] = "onnx"
    measured_in: ClassVar[tuple[str, ...]] = ("onnxruntime",)
    readers: ClassVar[tuple[str, ...]] = ("onnxruntime", "prune_lab.models.onnx.session")

    def __post_init__(self) -> None:
        if self.type not in TYPES:
            raise ValueError(f"type={self.type!r} is not one of {', '.join(TYPES)}")
        if missing := [name for name in PACKAGES if find_spec(name) is None]:
            raise ValueError(
                f"export=onnx needs packages that are not installed ({', '.join(missing)}): "
                'pip install "prune-lab[onnx]"'
            )

    def check_config(self, config: Any, cuts: Collection[str]) -> None:
        """Raises Refused for a model type whose graph was never compared with PyTorch."""
        from prune_lab.models.onnx.types import check_type

        check_type(config)

    def write(self, loaded: Loaded, folder: Path) -> None:
        """Writes the graph, config and tokenizer."""
        from prune_lab.models.export import write_beside_weights
        from prune_lab.models.onnx import graph

        graph.write(loaded.model, folder, self._dtype)
        write_beside_weights(loaded, folder)

    @property
    def _dtype(self) -> Any:
        import torch

        return {"f32": torch.float32, "f16": torch.float16}[self.type]

    def files(self, folder: Path) -> list[Path]:
        """The graph and its weights."""
        return sorted(folder.glob("*.onnx*"))

    def read(self, folder: Path, like: Any = None) -> Any:
        """The graph in ONNX Runtime on the CPU, called as a model is."""
        from prune_lab.models.onnx.session import OnnxModel

        return OnnxModel(folder)

    def loads_in(self, loaded: Loaded, cuts: Collection[str] = ()) -> list[Verdict]:
        """ONNX Runtime alone."""
        from prune_lab.export.loads_in import of_onnx

        return of_onnx(self.type)

    def check(self, model: Any, folder: Path, tokens: Tensor, own_kernels: bool = False) -> None:
        """Compares logits of `tokens`, shape (1, tokens), and of tokens decoded one by one, with the model's.

        The model is computed in float32, so that the graph's own rounding is all that may differ. Raises RuntimeError
        where the logits differ by more.
        """
        from prune_lab.models.onnx.compare import compare

        compare(model, self.read(folder), tokens.cpu(), DECODED, self._dtype)

    def reading(self, loaded: Loaded) -> str:
        """ONNX Runtime."""
        return (
            "ONNX Runtime: `onnxruntime.InferenceSession('model.onnx')` in this folder, or "
            "`transformers.exporters.ExportedModel.from_pretrained(folder)`. Inputs: `input_ids` and `position_ids` "
            "(batch, tokens), and for each block the keys and values of earlier tokens (batch, KV heads, earlier "
            f"tokens, head size), of which a prompt has none; {self.type}"
        )
