"""Models from the shipped folder, a local folder or the Hub; from their weights or from the config alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prune_lab.errors import Refused
from prune_lab.models import folder as folders
from prune_lab.models import streamed
from prune_lab.models.anatomy import family_of
from prune_lab.models.contents import check_finite, count_weights, weights_sha256
from prune_lab.models.folder_check import check_config, check_folder
from prune_lab.system.device import Device
from prune_lab.system.hub import as_folder, cached_file, check_reachable, commit_of, download, is_hub_id, why_not
from prune_lab.text.encode import tokenizer_sha256

TINY = Path(__file__).parent / "tiny"
WEIGHTS = ("pretrained", "random")


@dataclass
class Loaded:
    """A model on its device in eval mode, with its tokenizer."""

    model: Any
    tokenizer: Any
    name: str
    family: str
    revision: str | None = None  # the Hub's commit, where it comes from there
    licence: str | None = None  # by its model card, where that is here and names one

    def facts(self) -> dict[str, Any]:
        """Name, family, parameters (a tied matrix once), revision and licence."""
        return {
            "name": self.name,
            "family": self.family,
            "parameters": count_weights(self.model),
            "revision": self.revision,
            "licence": self.licence,
        }

    @property
    def is_low_bit(self) -> bool:
        """Whether its weights are integers already: an export of a post-compression."""
        return getattr(self.model.config, "quantization_config", None) is not None

    def fingerprint(self) -> dict[str, str]:
        """sha256 of the weights (names, types, shapes, bytes) and of the tokenizer."""
        return {"weights": weights_sha256(self.model), "tokenizer": tokenizer_sha256(self.tokenizer)}


@dataclass(frozen=True)
class ModelSource:
    """A model option: where a model comes from, with its weights or with random ones.

    stream: the blocks' weights rest on disk, for models larger than memory (prune_lab/models/on_disk.py).
    """

    weights: str = "pretrained"
    stream: bool = False

    def __post_init__(self) -> None:
        if self.weights not in WEIGHTS:
            raise ValueError(f"weights={self.weights!r} is none of {', '.join(WEIGHTS)}")
        if self.stream and self.weights == "random":
            raise ValueError(
                "stream=true reads weights from disk, and weights=random has none there; give stream=false"
            )

    def load(self, device: Device, seed: int) -> Loaded:
        """Loads model and tokenizer; `seed` is that of random weights. Raises Refused where it cannot."""
        raise NotImplementedError


@dataclass(frozen=True)
class HubModel(ModelSource):
    """model=hf: a folder in the Hub's layout or a Hub id."""

    name: str = ""
    revision: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (folder := as_folder(self.name)) is not None:
            check_folder(folder, self.weights)
        elif not is_hub_id(self.name):
            raise ValueError(
                f"name={self.name[:200]!r} is neither a folder here nor a Hub id such as Qwen/Qwen2.5-0.5B"
            )

    def load(self, device: Device, seed: int) -> Loaded:
        """Loads from the folder, else from the Hub or its cache on this machine."""
        if (folder := as_folder(self.name)) is not None:
            loaded = _load(str(folder), None, self, self.name, device, seed)
            loaded.licence = licence_of(folder / "README.md")
            return loaded
        if cached_file(self.name, "config.json", self.revision) is None:
            check_reachable("model.name", self.name)
        source = download(self.name, self.revision) if self.stream else self.name
        loaded = _load(source, self.revision, self, self.name, device, seed)
        config = cached_file(self.name, "config.json", self.revision)
        loaded.revision = commit_of(config, "config.json") if config else None
        loaded.licence = licence_of(cached_file(self.name, "README.md", self.revision))
        return loaded


@dataclass(frozen=True)
class Tiny(ModelSource):
    """model=tiny: the model shipped with the package."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_folder(TINY, self.weights)

    def load(self, device: Device, seed: int) -> Loaded:
        """Loads the shipped model under its own name."""
        loaded = _load(str(TINY), None, self, "tiny", device, seed)
        loaded.licence = "apache-2.0"  # the package's
        return loaded


def _load(source: str, revision: str | None, option: ModelSource, name: str, device: Device, seed: int) -> Loaded:
    """The model and tokenizer of a folder or Hub id, to be called `name`."""
    from transformers import AutoConfig
    from transformers.utils import logging

    logging.disable_progress_bar()  # its bars and advice speak of parts; the console speaks of the run
    logging.set_verbosity_error()
    place: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(source, **place)
        family_of(config.model_type)
        check_config(config, name)
        tokenizer = _load_tokenizer(source, place, name)
        if option.stream:
            model = streamed.build(Path(source), config, device, name)
        else:
            model = _build(source, config, option.weights, place, device, seed).to(device.torch_device)
    except Refused:
        raise
    except Exception as error:  # transformers, the Hub's client and safetensors each have their own
        raise Refused(f"model.name={name!r} cannot be loaded: {why_not(name, error)}") from error
    check_finite(model, name)
    return Loaded(model.eval(), tokenizer, name, config.model_type)


def licence_of(card: Path | None) -> str | None:
    """The licence that a model card's YAML header names, if there is a card and it does."""
    import yaml

    try:
        text = card.read_text(encoding="utf-8") if card is not None else ""
        header = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else {}
        return str(header["license"])
    except (OSError, ValueError, KeyError, IndexError, TypeError, yaml.YAMLError):
        return None


def _load_tokenizer(source: str, place: dict[str, Any], name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, **place)
    except Exception as error:  # what it says of a missing file is about packages to install
        raise Refused(
            f"model.name={name!r} cannot be loaded: there is no tokenizer.json, nor other files of a tokenizer, that "
            f"can be read beside config.json ({type(error).__name__})"
        ) from error


def _build(source: str, config: Any, weights: str, place: dict[str, Any], device: Device, seed: int) -> Any:
    from transformers import AutoModelForCausalLM

    if weights == "random":
        if hasattr(config, "quantization_config"):  # of the weights that are not read
            del config.quantization_config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False, dtype=device.dtype)
    model, report = folders.load(source, config, **place, dtype=device.dtype, output_loading_info=True)
    missing = sorted(report["missing_keys"])
    if missing:
        raise Refused(f"model.name={source!r} lacks the weights {', '.join(missing[:3])}: the download is not complete")
    scales = sorted(key for key in report["unexpected_keys"] if key.endswith("_scale"))
    if scales:
        raise Refused(
            f"model.name={source!r} holds {scales[0]}, but its config.json has no quantization_config: the weights "
            "cannot be read without it"
        )
    return model
