"""Checks of a model's folder and config before anything of it is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prune_lab.errors import Refused
from prune_lab.models.families import check_type

# Fields of a config that say how large a model is, and the most that any model has by far: what is beyond is damaged,
# and building it would take all memory or all day.
_LAYERS = ("num_hidden_layers", "n_layer")
_WIDTHS = (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size",
    "max_position_embeddings", "n_embd", "n_head", "n_inner", "n_positions", "ffn_dim", "word_embed_proj_dim",
)  # fmt: skip
_MAY_BE_0 = ("head_dim",)  # of a latent attention without positions (GLM-5)
_MOST = dict.fromkeys(_LAYERS, 10_000) | dict.fromkeys(_WIDTHS, 2**24)
# Weights that are not read.
_PICKLE = "a pickle that could run code"
_OTHERS = (
    ("*.bin", _PICKLE), ("*.pt", _PICKLE), ("*.pth", _PICKLE), ("*.pkl", _PICKLE), ("*.ckpt", _PICKLE),
    ("*.distcp", "a distributed checkpoint of PyTorch (torch.distributed.checkpoint)"),
    ("*.h5", "weights of TensorFlow"), ("*.msgpack", "weights of Flax"), ("*.onnx", "an ONNX graph"),
    ("*.npz", "arrays of NumPy"), ("global_step*", "a checkpoint of DeepSpeed"),
)  # fmt: skip
# Transformers fetches any other kind of attention from the Hub, as code.
_ATTENTION = ("eager", "sdpa")


def check_folder(folder: Path, weights: str, called: str | None = None) -> None:
    """Raises ValueError or Refused for a folder that can hold no model we may read.

    weights: pretrained or random. called: what a person calls it, where that is not its path.
    """
    name = f"name={(called or str(folder))!r}"
    config = folder / "config.json"
    has_weights, ggufs = any(folder.glob("*.safetensors")), sorted(folder.glob("*.gguf"))
    if ggufs and not has_weights and (weights == "pretrained" or not config.is_file()):
        one = folder / ggufs[0].name
        raise ValueError(
            f"{name} holds only GGUF files ({', '.join(path.name for path in ggufs[:3])}{', ...' * (len(ggufs) > 3)}): "
            f"name one of them, model.name={one}"
        )
    if not config.is_file():
        raise ValueError(f"{name} has no config.json: give a folder in the Hugging Face layout")
    try:
        values = dict(json.loads(config.read_text(encoding="utf-8")).items())
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{name}: config.json is not a JSON object ({error})") from error
    check_type(str(values.get("model_type", "")))
    _check_sizes(values, name)
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{name} holds an adapter (adapter_config.json), which names the model it is for: merge it into that model"
        )
    if weights == "pretrained" and not has_weights:
        held = next((f"only {path.name}, {what}" for pattern, what in _OTHERS for path in folder.glob(pattern)), None)
        raise ValueError(
            f"{name} holds {held or 'no weights'}: only *.safetensors are read; convert it, or give "
            "model.weights=random"
        )
    if weights == "pretrained":
        _check_shards(folder, name)


def check_config(config: Any, name: str) -> None:
    """Refuses a config of transformers with absurd sizes, or one that would have code for attention fetched."""
    _check_sizes(config.to_dict(), f"name={name!r}")
    parts = [config, *(getattr(config, key, None) for key in getattr(config, "sub_configs", ()))]
    given = (getattr(part, "_attn_implementation", None) for part in parts)
    asked = next((one for one in given if one is not None and one not in _ATTENTION), None)
    if asked is not None:
        raise Refused(
            f"model.name={name!r}: its config.json asks for attn_implementation={str(asked)[:80]!r}, which could be "
            f"code from the Hub: allowed are {', '.join(_ATTENTION)}; take it out of config.json"
        )


def _check_sizes(config: dict[str, Any], name: str) -> None:
    for part in config.values():
        if isinstance(part, dict):
            _check_sizes(part, name)
    for key, most in _MOST.items():
        value = config.get(key)
        counts = value if isinstance(value, list) and value else [value]  # some types have one for each block
        least = 0 if key in _MAY_BE_0 else 1
        if value is not None and not all(isinstance(count, int) and least <= count <= most for count in counts):
            raise ValueError(
                f"{name}: config.json has {key}={str(value)[:40]}, not a whole number from {least} to {most}"
            )


def _check_shards(folder: Path, name: str) -> None:
    """Raises ValueError where the index of a sharded checkpoint names files that are not there, or not ours to read."""
    file = "model.safetensors.index.json"
    if not (folder / file).is_file():
        return
    try:
        index = json.loads((folder / file).read_text(encoding="utf-8"))
        shards = {str(shard) for shard in index["weight_map"].values()}
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"{name}: {file} cannot be read ({error})") from error
    if foreign := sorted(shard for shard in shards if Path(shard).name != shard or not shard.endswith(".safetensors")):
        raise ValueError(f"{name}: {file} names {foreign[0][:80]!r}: only *.safetensors of the same folder are read")
    if missing := sorted(shard for shard in shards if not (folder / shard).is_file()):
        raise ValueError(
            f"{name} lacks {', '.join(missing[:3])}, which its {file} names: the download is not complete; fetch it "
            "again"
        )


def licence_of(card: Path | None) -> str | None:
    """The licence that a model card's YAML header names, if there is a card and it does."""
    import yaml

    try:
        text = card.read_text(encoding="utf-8") if card is not None else ""
        header = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else {}
        return str(header["license"])
    except (OSError, ValueError, KeyError, IndexError, TypeError, yaml.YAMLError):
        return None
