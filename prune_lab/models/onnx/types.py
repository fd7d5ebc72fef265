"""Model types that export=onnx writes."""

from __future__ import annotations

from typing import Any

from prune_lab.errors import Refused
from prune_lab.models.families import FAMILIES

# Those whose graph was compared with PyTorch, a prompt and decoding, also beyond a sliding window
# (tests/test_onnx_export.py). The exporter traces others too; what it makes of them was not compared.
TYPES = (*sorted(FAMILIES), "mixtral", "olmoe", "qwen3_moe")


def check_type(config: Any) -> None:
    """Raises Refused for a model type whose graph was not compared."""
    if config.model_type not in TYPES:
        raise Refused(
            f"export=onnx writes {', '.join(TYPES)}; graphs of the type {config.model_type!r} were not compared with "
            "PyTorch. Give export=hf, and try transformers.exporters on its folder"
        )
