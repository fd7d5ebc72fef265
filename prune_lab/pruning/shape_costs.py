"""Costs of shapes of a model, exact from the few shapes at the corners of its axes.

The number of weights of a matrix is a product of counts of different axes, so that what a shape costs is affine in each
count while the others stay: a table of its values where each axis is at one of two counts gives it for all counts.
Where blocks are not alike, which of them go makes a difference that it does not know.
"""

from __future__ import annotations

import copy
import json
from itertools import product
from typing import Any

from safetensors.torch import _TYPES

from prune_lab.measure.size import MB, active_parameters, kv_cache_bytes
from prune_lab.models.anatomy import Anatomy
from prune_lab.models.contents import count_weights
from prune_lab.models.resize import Shape
from prune_lab.pruning.surgery import take_shape


def costs_of_corners(
    anatomy: Anatomy, corners: dict[str, tuple[int, int]], groups: dict[str, str]
) -> list[dict[str, Any]]:
    """Costs where each axis is at one of two counts: {"counts": {axis: count}, "costs": {metric: value}} each.

    corners: by axis a smaller count and the present one. groups: the group of units of an axis. The weights that stay
    are the first ones: only their number matters. The model is left as it was.
    """
    found = []
    for counts in product(*corners.values()):
        of_axis = dict(zip(corners, counts, strict=True))
        cut = Anatomy(copy.deepcopy(anatomy.model))
        smaller = {axis: count for axis, count in of_axis.items() if count < corners[axis][1]}
        blocks = list(range(smaller.pop("blocks", len(cut.blocks))))
        units = {groups[axis]: count for axis, count in smaller.items()}
        take_shape(cut, Shape(units, blocks, cut.config.model_type))
        found.append({"counts": of_axis, "costs": _costs(cut)})
    return found


def _costs(anatomy: Anatomy) -> dict[str, float]:
    """Costs of a model by the name of the metric; of those whose value follows from its shape."""
    params = count_weights(anatomy.model)
    costs: dict[str, float] = {"params/total": params, "params/nonzero": params}
    costs["size/disk_mb"] = stored_bytes(anatomy.model) / MB
    if (cache := kv_cache_bytes(anatomy)) is not None:
        costs["memory/kv_cache_bytes_per_token"] = cache
    if (active := active_parameters(anatomy)) is not None:
        costs["params/active"] = active
    return costs


def stored_bytes(model: Any) -> int:
    """Bytes of a safetensors file of a model's tensors, a tied one once, with its header."""
    tensors = {id(tensor): (name, tensor) for name, tensor in reversed(model.state_dict(keep_vars=True).items())}
    names = {dtype: name for name, dtype in _TYPES.items()}
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.values():
        size = tensor.numel() * tensor.element_size()
        entry: Any = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + size]}
        header[name], at = entry, at + size
    length = len(json.dumps(header, separators=(",", ":")).encode())
    return 8 + (length + 7) // 8 * 8 + at
