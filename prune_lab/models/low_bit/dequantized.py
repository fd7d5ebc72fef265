"""Checkpoints in MXFP4 or 8-bit floats, of which transformers makes dense weights as it reads them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from prune_lab.errors import Refused
from prune_lab.models.auto_class import auto_class
from prune_lab.models.shards import Span, open_shards

_FLOATS = (torch.float8_e4m3fn, torch.float8_e5m2)
_BLOCKS, _SCALES = "_blocks", "_scales"  # ends of the names of what a matrix in MXFP4 is stored as
_DENSE = "give the dense model that it was made from"


def load(folder: Path, source: str, config: Any, **keywords: Any) -> Any:
    """`from_pretrained` of the config's auto class for `source`, which has the files of `folder`, with dense weights.

    Raises Refused where nothing is stored in few bits, or where the scales are not there or are those of blocks that
    transformers would take for others.
    """
    stored, spans = config.quantization_config, open_shards(folder).spans
    of_few_bits = _check_blocks(spans) + _check_floats(spans, _block_of(stored))
    if not of_few_bits:
        raise Refused(
            f"config.json says that the model is quantized already (quant_method {stored['quant_method']!r}), and its "
            "files hold no such weights: take quantization_config out of config.json, if the weights are dense"
        )
    config.quantization_config = {**stored, "dequantize": True}
    return auto_class(config).from_pretrained(source, config=config, **keywords)


def _block_of(stored: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of weights in 8-bit floats that share a scale; None where config.json leaves that open."""
    block = stored.get("weight_block_size", (128, 128))  # as transformers has it by default
    if block is None:
        return None
    if not isinstance(block, list | tuple) or [type(size) for size in block] != [int, int] or min(block) < 1:
        raise Refused(f"config.json has weight_block_size={str(block)[:40]}, not two whole numbers from 1")
    return block[0], block[1]


def _check_blocks(spans: Mapping[str, Span]) -> int:
    """Number of matrices in MXFP4; raises Refused where one lacks a part."""
    found = {name.removesuffix(end) for end in (_BLOCKS, _SCALES) for name in spans if name.endswith(end)}
    for name in sorted(found):
        if missing := [f"{name}{end}" for end in (_BLOCKS, _SCALES) if f"{name}{end}" not in spans]:
            raise Refused(f"the files lack {missing[0]}, a part of a matrix in MXFP4: fetch the model again")
    return len(found)


def _check_floats(spans: Mapping[str, Span], block: tuple[int, int] | None) -> int:
    """Number of tensors in 8-bit floats; raises Refused where one has no scales, or those of other blocks.

    Transformers takes the size of a block from the number of scales: wrongly where the last block is a smaller one.
    """
    floats = [name for name, span in spans.items() if span.dtype in _FLOATS]
    for name in floats:
        stem = name.rpartition(".")[0]
        called = (f"{name}_scale_inv", f"{name}_scale", f"{stem}.scale", f"{stem}.qscale_weight")
        scales = next((spans[of].shape for of in called if of in spans), None)
        shape = spans[name].shape
        if scales is None:
            raise Refused(f"{name} holds 8-bit floats, and the files lack its scales ({called[0]}): {_DENSE}")
        counts = scales[-2:] if len(scales) >= 2 else (1, 1)
        for size, count, of in zip(shape[-2:], counts, block or (None, None), strict=True):
            is_one = count == 1 and (of is None or size <= of or len(scales) < 2)
            if not is_one and (count != size if of is None else (size % of or count != size // of)):
                raise Refused(
                    f"{name} of shape {list(shape)} has scales of shape {list(scales)}, for blocks of "
                    f"{list(block) if block else 'no size'}: only whole blocks are read; {_DENSE}"
                )
    return len(floats)


def has_floats(folder: Path) -> bool:
    """True where a tensor of a folder is stored in 8-bit floats."""
    return any(span.dtype in _FLOATS for span in open_shards(folder).spans.values())
