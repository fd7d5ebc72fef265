"""Contents of a model: counts of its weights, hashes of weights and config, whether a tensor is damaged."""

from __future__ import annotations

import hashlib
from itertools import chain
from typing import Any

import torch

from prune_lab.errors import Refused
from prune_lab.fingerprint import digest_of
from prune_lab.models.low_bit.linears import LowBitWeights
from prune_lab.models.offload.on_disk import value

_NO_COMPUTE = frozenset(
    {"_name_or_path", "name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype"}
)


def count_weights(model: Any) -> int:
    """Weights of a model, whatever type they are kept in; a tied matrix once."""
    codes = [module.codes() for module in model.modules() if isinstance(module, LowBitWeights)]
    return sum(weight.numel() for weight in [*model.parameters(), *codes])  # parameters() yields a tied one once


def count_nonzero(model: Any) -> int:
    """Number of a model's weights that are not zero, counted as `count_weights` does."""
    codes = [module.codes() for module in model.modules() if isinstance(module, LowBitWeights)]
    weights = (value(model, name, weight) for name, weight in model.named_parameters())
    return sum(int(torch.count_nonzero(weight)) for weight in chain(weights, codes))


def weights_sha256(model: Any) -> str:
    """sha256 over all tensors of a model: names, types, shapes, bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        flat = value(model, name, tensor).detach().contiguous().view(-1).view(torch.uint8)
        digest.update(flat.cpu().numpy().data)
    return digest.hexdigest()


def config_sha256(model: Any) -> str:
    """sha256 over config.json as the model uses it, with defaults filled in and the kind of attention that computes.

    Left out is what names a model or says how it was saved (_NO_COMPUTE); its number type is the run's.
    """
    used = _without(model.config.to_dict(), _NO_COMPUTE)
    return digest_of([used, getattr(model.config, "_attn_implementation", None)])


def _without(values: Any, names: frozenset[str]) -> Any:
    """Nested dictionaries (the config of a part is one) without these keys."""
    if not isinstance(values, dict):
        return values
    return {str(key): _without(value, names) for key, value in values.items() if key not in names}


def check_finite(model: Any, name: str) -> None:
    """Raises Refused where a tensor of the model, called `name`, holds NaN or infinite numbers."""
    for key, tensor in model.state_dict().items():
        parts = value(model, key, tensor).reshape(-1).split(2**22) if tensor.is_floating_point() else ()
        if not all(torch.isfinite(part.float()).all() for part in parts):  # 8-bit floats have no isfinite
            raise Refused(f"model.name={name!r}: {key} holds NaN or infinite weights: the checkpoint is damaged")
