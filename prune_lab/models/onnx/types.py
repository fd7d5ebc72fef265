"""Model types that export=onnx writes."""

from __future__ import annotations

from typing import Any

from prune_lab.errors import Refused
from prune_lab.models.families import FAMILIES

# Those whose graph was compared with PyTorch, a prompt and decoding, also beyond a sliding window
# (tests/test_onnx_export.py). The exporter traces others too; what it makes of them was not compared.
TYPES = (*sorted(FAMILIES), "mixtral", "olmoe", "qwen3_moe")


def check_type(config: Any) -> None:
    """Raises Refused for a model type whose graph was not compared, and for positions that are no graph."""
    if config.model_type not in TYPES:
        raise Refused(
            f"export=onnx writes {', '.join(TYPES)}; graphs of the type {config.model_type!r} were not compared with "
            "PyTorch. Give export=hf, and try transformers.exporters on its folder"
        )
    rotary = getattr(config, "rope_parameters", None) or {}
    kinds = [one.get("rope_type") for one in (rotary, *rotary.values()) if isinstance(one, dict)]
    if "dynamic" in kinds:
        raise Refused(
            "export=onnx: this model's rotary frequencies follow the longest text so far (rope_type 'dynamic' in "
            "config.json), which a graph cannot; give export=hf"
        )
