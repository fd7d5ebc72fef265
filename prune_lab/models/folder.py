"""Models from a folder or Hub id, however their weights are stored: dense, in few bits, as bitmask and values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prune_lab.models import bitmask, low_bit_format


def load(source: str, config: Any, **keywords: Any) -> Any:
    """What AutoModelForCausalLM.from_pretrained returns for `source`, whose config.json is `config`.

    Raises Refused where the weights are quantized in a way that is not ours.
    """
    keywords["use_safetensors"] = True  # pickles could run code
    if (Path(source) / bitmask.FILE).is_file():
        return bitmask.load(Path(source), config, **keywords)
    return low_bit_format.load(source, config, **keywords)
