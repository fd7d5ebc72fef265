"""Models from the shipped folder, a local folder or the Hub; from their weights or from the config alone."""

from __future__ import annotations

import json
import weakref
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from prune_lab.errors import Refused
from prune_lab.fingerprint import digest_of
from prune_lab.models import formats
from prune_lab.models.folder_check import check_folder, licence_of
from prune_lab.models.gguf_header import SUFFIX
from prune_lab.system.hub import as_place, cached_file, check_reachable, commit_of, download, is_hub_id
from prune_lab.text.encode import tokenizer_settings, tokenizer_sha256

if TYPE_CHECKING:
    from prune_lab.system.device import Device

TINY = Path(__file__).parent / "tiny"
TINY_MOE = Path(__file__).parent / "tiny_moe"
WEIGHTS = ("pretrained", "random")
# What a processor for images, video or sound is read from: AutoProcessor needs it beside the tokenizer.
PROCESSOR = (
    "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json",
    "audio_tokenizer_config.json", "chat_template.json",
)  # fmt: skip


@dataclass
class Loaded:
    """A model on its device in eval mode, with its tokenizer."""

    model: Any
    tokenizer: Any
    name: str
    family: str
    revision: str | None = None  # the Hub's commit, where it comes from there
    licence: str | None = None  # by its model card, where that is here and names one
    warnings: list[str] = field(default_factory=list)  # what a run must say of what was loaded
    tokenizer_config: dict[str, Any] = field(default_factory=dict)  # the file of this name that it came with
    processor: dict[str, bytes] = field(default_factory=dict)  # files for images and sound that it came with, by name

    def describe(self) -> dict[str, Any]:
        """Name, family, parameters (a tied matrix once), revision, licence, and the scope of single weights.

        The scope: number of matrices, their share of the blocks' weights, and names by the reason why they are left
        alone; None of weights that are quantized already.
        """
        from prune_lab.models.anatomy import Anatomy, scope_of
        from prune_lab.models.contents import count_weights

        scope: dict[str, Any] | None = None
        if not self.is_low_bit:
            found = scope_of(Anatomy(self.model))
            left_alone: dict[str, list[str]] = {}
            for name, (reason, _) in found.left_alone.items():
                left_alone.setdefault(reason, []).append(name)
            scope = {"matrices": found.matrices, "share": round(found.share, 6), "left_alone": left_alone}
        return {
            "name": self.name,
            "family": self.family,
            "parameters": count_weights(self.model),
            "revision": self.revision,
            "licence": self.licence,
            "scope": scope,
        }

    @property
    def is_low_bit(self) -> bool:
        """True where its weights are integers already: an export of a post-compression."""
        return getattr(self.model.config, "quantization_config", None) is not None

    def fingerprint(self) -> dict[str, str]:
        """sha256 of all that computes: weights (names, types, shapes, bytes), config as it is used, tokenizer."""
        from prune_lab.models.contents import config_sha256, weights_sha256

        return {
            "weights": weights_sha256(self.model),
            "config": config_sha256(self.model),
            "tokenizer": tokenizer_sha256(self.tokenizer),
        }

    def carried_sha256(self) -> str:
        """sha256 of what an export has from this model and no figure depends on.

        That is the generation config, the tokenizer's settings with its chat template, the processor and the licence.
        """
        generation = getattr(self.model, "generation_config", None)
        values = generation.to_dict() if generation is not None else {}
        values.pop("transformers_version", None)
        processor = {name: content.hex() for name, content in self.processor.items()}
        return digest_of([values, tokenizer_settings(self.tokenizer), self.licence, processor])


@dataclass(frozen=True)
class ModelSource:
    """A model option: where a model comes from, with its weights or with random ones.

    stream: the blocks' weights stay on disk, for models larger than memory (prune_lab/models/offload/on_disk.py).
    """

    weights: str = "pretrained"
    stream: bool = False

    weights_known: ClassVar[tuple[str, ...]] = WEIGHTS

    def __post_init__(self) -> None:
        if self.weights not in self.weights_known:
            raise ValueError(f"weights={self.weights!r} is not one of {', '.join(self.weights_known)}")
        if self.stream and self.weights != "pretrained":
            raise ValueError(
                f"stream=true reads weights from disk, and weights={self.weights} has none there; give stream=false"
            )

    def files(self) -> list[Path]:
        """The files on this machine that it is loaded from, as far as they may be edited while a process runs."""
        return []

    def config(self) -> Any:
        """The model's config, as transformers reads it. Raises Refused where it cannot be had."""
        raise NotImplementedError

    def load(self, device: Device, seed: int) -> Loaded:
        """Loads model and tokenizer; `seed` is that of random weights. Raises Refused where it cannot."""
        raise NotImplementedError


@dataclass(frozen=True)
class HubModel(ModelSource):
    """model=hf: a folder in the Hub's layout, a GGUF file, or a Hub id."""

    name: str = ""
    revision: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (place := as_place(self.name)) is not None:
            formats.check(place, self.weights)
        elif self.name.lower().endswith(SUFFIX):
            raise ValueError(
                f"name={self.name[:200]!r} is no file here: give the path of a GGUF file; one on the Hub is fetched "
                "with 'hf download REPOSITORY FILE.gguf --local-dir .' on a machine with a network"
            )
        elif not is_hub_id(self.name):
            raise ValueError(
                f"name={self.name[:200]!r} is neither a folder here nor a Hub id such as Qwen/Qwen2.5-0.5B"
            )

    def files(self) -> list[Path]:
        """Files of the folder, or the file."""
        place = as_place(self.name)
        return [] if place is None else formats.files_of(place)

    def config(self) -> Any:
        """From the folder or file, else from the Hub or its cache on this machine."""
        from prune_lab.models.build import read_config

        if (place := as_place(self.name)) is not None:
            with formats.opened(place, self.name, None) as found:
                return read_config(str(found.folder), None, self.name)
        self._check_reachable()
        return read_config(self.name, self.revision, self.name)

    def _check_reachable(self) -> None:
        if cached_file(self.name, "config.json", self.revision) is None:
            check_reachable("model.name", self.name)

    def load(self, device: Device, seed: int) -> Loaded:
        """Loads from the folder or file, else from the Hub or its cache on this machine."""
        if (place := as_place(self.name)) is not None:
            return self._load_from(place, device, seed)
        self._check_reachable()
        source = self.name
        if self.weights == "pretrained":
            source = download(self.name, self.revision)
            self._check(Path(source))
        loaded = _load(source, self.revision, self, self.name, device, seed)
        config = cached_file(self.name, "config.json", self.revision)
        loaded.revision = commit_of(config, "config.json") if config else None
        loaded.licence = licence_of(cached_file(self.name, "README.md", self.revision))
        return loaded

    def _load_from(self, place: Path, device: Device, seed: int) -> Loaded:
        with ExitStack() as stack:
            dtype = device.dtype if self.weights == "pretrained" else None
            found = stack.enter_context(formats.opened(place, self.name, dtype))
            loaded = _load(str(found.folder), None, self, self.name, device, seed)
            loaded.licence = found.licence
            loaded.warnings[:0] = found.notes
            if self.stream:  # its blocks are read from the folder for as long as there is a copy of it
                from prune_lab.models.offload.on_disk import weights_on_disk

                weights = weights_on_disk(loaded.model)
                assert weights is not None
                weakref.finalize(weights.source, stack.pop_all().close)
        return loaded

    def _check(self, downloaded: Path) -> None:
        """Raises Refused where what came from the Hub is no model that is read."""
        try:
            check_folder(downloaded, self.weights, self.name)
        except Refused:
            raise
        except ValueError as error:
            raise Refused(f"model.{error}") from error


@dataclass(frozen=True)
class Tiny(ModelSource):
    """model=tiny: the model shipped with the package."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_folder(TINY, self.weights)

    def config(self) -> Any:
        """The shipped model's."""
        from prune_lab.models.build import read_config

        return read_config(str(TINY), None, "tiny")

    def load(self, device: Device, seed: int) -> Loaded:
        """Loads the shipped model under its own name."""
        loaded = _load(str(TINY), None, self, "tiny", device, seed)
        loaded.licence = "apache-2.0"  # the package's
        return loaded


@dataclass(frozen=True)
class TinyMoe(ModelSource):
    """model=tiny_moe: the mixture of experts shipped with the package, a Mixtral.

    weights=split: where its training begins, with the weights of model=tiny dealt out to its experts.
    """

    weights_known: ClassVar[tuple[str, ...]] = (*WEIGHTS, "split")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_folder(TINY_MOE, "pretrained" if self.weights == "pretrained" else "random")

    def config(self) -> Any:
        """The shipped mixture's."""
        from prune_lab.models.build import read_config

        return read_config(str(TINY_MOE), None, "tiny_moe")

    def load(self, device: Device, seed: int) -> Loaded:
        """Loads the shipped mixture under its own name."""
        if self.weights == "split":
            loaded = replace(self, weights="random").load(device, seed)
            from prune_lab.models.split import split_tiny

            split_tiny(Tiny().load(device, seed), loaded.model)
            return loaded
        loaded = _load(str(TINY_MOE), None, self, "tiny_moe", device, seed)
        loaded.licence = "apache-2.0"  # the package's
        return loaded


def _load(source: str, revision: str | None, option: ModelSource, name: str, device: Device, seed: int) -> Loaded:
    """The model and tokenizer of a folder or Hub id, to be called `name`."""
    from prune_lab.models.build import build  # with torch, which checking a configuration has no use for

    model, tokenizer, notes = build(source, revision, name, option.weights, option.stream, device, seed)
    return Loaded(
        model,
        tokenizer,
        name,
        model.config.model_type,
        warnings=notes,
        tokenizer_config=_tokenizer_config(source, revision),
        processor=_processor(source, revision),
    )


def _tokenizer_config(source: str, revision: str | None) -> dict[str, Any]:
    """Contents of tokenizer_config.json of a folder or Hub id; empty where there is none."""
    try:
        return dict(json.loads(_file_of(source, "tokenizer_config.json", revision) or b"{}"))
    except (ValueError, TypeError):
        return {}


def _processor(source: str, revision: str | None) -> dict[str, bytes]:
    """Contents of the files of a folder or Hub id that AutoProcessor reads beside the tokenizer's, by name."""
    found = {name: _file_of(source, name, revision) for name in PROCESSOR}
    return {name: content for name, content in found.items() if content is not None}


def _file_of(source: str, name: str, revision: str | None) -> bytes | None:
    """Contents of a file of a folder or Hub id; None where there is none that can be read."""
    path = Path(source) / name if Path(source).is_dir() else cached_file(source, name, revision)
    try:
        return path.read_bytes() if path is not None else None
    except OSError:
        return None
