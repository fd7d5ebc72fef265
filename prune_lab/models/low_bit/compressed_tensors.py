"""config.json's quantization_config of the compressed-tensors library, written and read; and models loaded by it.

Stock transformers reads such a folder where the compressed-tensors package is installed; this module needs no package
beside transformers: it is a quantizer of transformers under our own name, put in place for folders that hold what
models/low_bit/linears.py computes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from prune_lab.errors import Refused
from prune_lab.models.auto_class import auto_class
from prune_lab.models.low_bit.experts import conversions_with_codes, put_all_experts
from prune_lab.models.low_bit.linears import LowBitLinear
from prune_lab.models.low_bit.scheme import Scheme

OURS = "prune_lab"


def read_config(config: dict[str, Any]) -> tuple[Scheme, list[str]]:
    """The scheme and the untouched Linears of a quantization_config; raises Refused where it is not one of ours."""
    try:
        (group,) = config["config_groups"].values()
        weights, inputs = group["weights"], group.get("input_activations")
        scheme = Scheme(weights["num_bits"], weights["type"], inputs is not None, weights.get("group_size"))
        if scheme.to_config(list(config["ignore"])) == config:
            return scheme, list(config["ignore"])
    except (KeyError, ValueError, TypeError, AttributeError):
        pass
    of = [f"{key} {config[key]!r}" for key in ("quant_method", "format") if config.get(key) is not None]
    if isinstance(sparsity := config.get("sparsity_config"), dict):
        of.append(f"sparsity {sparsity.get('format')!r}")
    raise Refused(
        f"the model is quantized already ({', '.join(of)[:100]}): only dense models, models in MXFP4 or FP8, and "
        "exports of a post-compression of prune_lab can be read; give the model it was made from"
    )


def leave_out_compression(config: Any, whatever_it_is: bool) -> None:
    """Takes out of a config what a library left there beside dense weights: that nothing is compressed.

    whatever_it_is: also what says that the weights are quantized, where they are not read.
    """
    if hasattr(config, "compression_config"):  # an older name, which transformers does not read: the tensors tell
        del config.compression_config
    stored = getattr(config, "quantization_config", None)
    if hasattr(config, "quantization_config") and (whatever_it_is or not stored or _is_dense(stored)):
        del config.quantization_config


def _is_dense(stored: Any) -> bool:
    """True where a compressed-tensors config has no quantized group and no format but `dense`."""
    if not isinstance(stored, dict) or stored.get("quant_method", "compressed-tensors") != "compressed-tensors":
        return False
    sparsity = stored.get("sparsity_config") or {}
    formats = {stored.get("format") or "dense", sparsity.get("format") or "dense"}
    return formats == {"dense"} and not stored.get("config_groups") and not stored.get("kv_cache_scheme")


def load(source: str, config: Any, **keywords: Any) -> Any:
    """`from_pretrained` of the config's auto class; its quantization_config may be one of `Scheme.to_config`.

    Raises Refused where it has another one.
    """
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return auto_class(config).from_pretrained(source, config=config, **keywords)
    read_config(stored)
    _register()
    config.quantization_config = {**stored, "quant_method": OURS}
    loaded: Any = auto_class(config).from_pretrained(source, config=config, **keywords)
    (loaded[0] if isinstance(loaded, tuple) else loaded).config.quantization_config = stored
    return loaded


def replace_linear(model: Any, name: str, scheme: Scheme, dtype: torch.dtype) -> LowBitLinear:
    """Puts an empty Linear of the scheme in the place of the Linear (or Conv1D) called `name`, and returns it."""
    old = model.get_submodule(name)
    out_features, in_features = old.weight.shape if isinstance(old, nn.Linear) else old.weight.shape[::-1]
    new = scheme.empty(in_features, out_features, getattr(old, "bias", None) is not None, dtype)
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new.to(old.weight.device))
    return new


def replace_linears(model: Any, stored: dict[str, Any], dtype: torch.dtype) -> None:
    """Puts empty Linears in the places that a quantization_config names; raises Refused where it is not one of ours."""
    scheme, untouched = read_config(stored)
    put_all_experts(model, scheme, dtype)
    for name in linear_names(model):
        if name not in untouched:
            replace_linear(model, name, scheme, dtype)
            # else GPT-2's blocks would first fill the `weight` of a Linear that has none
            model.get_submodule(name.rpartition(".")[0])._is_hf_initialized = True


def linear_names(model: Any) -> list[str]:
    """Names of all Linears (and GPT-2's Conv1D), in floats or integers."""
    from transformers.pytorch_utils import Conv1D

    return [name for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D | LowBitLinear)]


def _register() -> None:
    """Makes transformers know our quantizer; once."""
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    if OURS in AUTO_QUANTIZER_MAPPING:
        return

    @register_quantization_config(OURS)
    class _Config(QuantizationConfigMixin):
        def __init__(self, **values: Any) -> None:
            self.quant_method: Any = OURS
            self.stored = {**values, "quant_method": "compressed-tensors"}

    @register_quantizer(OURS)
    class _Quantizer(HfQuantizer):
        is_trainable = False
        quantization_config: _Config

        def is_serializable(self) -> bool:
            """True: it is saved as it is."""
            return True

        def _process_model_before_weight_loading(self, model: Any, dtype: Any = None, **kwargs: Any) -> Any:
            replace_linears(model, self.quantization_config.stored, dtype)
            return model

        def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
            """The conversions of a model with those of the codes of experts."""
            return conversions_with_codes(model, weight_conversions)
