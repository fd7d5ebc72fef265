"""GGUF files as folders in the Hub's layout: read and dequantised by transformers, once, and kept in the cache.

A folder holds what the file holds: config, tokenizer with chat template, and the weights as safetensors in the number
type of the run. Dequantised values are exact in float32; in a shorter type they are those of float32, rounded once, as
loading rounds any model, so that nothing is lost by keeping the shorter type and half of the disk is saved.

What transformers would leave out without a word is refused here or noted: tensors that it does not take (rotary factors
of Llama 3.1, biases of a family that has none), and settings of the file that are others in the config that it makes.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from prune_lab import cache
from prune_lab.errors import Refused
from prune_lab.fingerprint import digest_of, source_sha256
from prune_lab.models.checkpoint import skeleton
from prune_lab.models.contents import check_finite
from prune_lab.models.families import family_of
from prune_lab.models.folder_check import check_config
from prune_lab.models.gguf.vocabulary import ORIGIN
from prune_lab.models.gguf_header import Header, read_header
from prune_lab.models.offload.on_disk import lay_out_model
from prune_lab.models.offload.stored import stored_tensors
from prune_lab.system.files import owner_suffix, state_of
from prune_lab.system.hub import why_not

_FILE = "model.gguf"
_SOURCE = ("models/gguf_folder.py", "models/gguf_header.py")


@contextmanager
def unpacked(path: Path, name: str, dtype: torch.dtype | None) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The folder of a GGUF file that a person calls `name`, and facts: `notes` of what a run must say, `licence`.

    dtype: of the weights; None for config and tokenizer alone. The folder is there while inside. Raises Refused for a
    file that transformers does not read, or not all of it.
    """
    from transformers.utils import logging

    logging.set_verbosity_error()
    before = state_of([path])
    with path.open("rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()
    of = [content, version("transformers"), version("tokenizers"), version("gguf"), source_sha256(*_SOURCE)]

    def make(write: Callable[[Path, Path, str], dict[str, Any]], folder: Path) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(suffix=owner_suffix()) as place:
            # Alone in a folder: transformers would read other files beside it (a config, an adapter) as the model's.
            (Path(place) / _FILE).symlink_to(path.resolve())
            try:
                with redirect_stderr(io.StringIO()):  # its bars are of parts
                    facts = write(Path(place), folder, name)
            except (Refused, OSError):
                raise
            except Exception as error:  # of transformers, the package gguf, tokenizers, NumPy
                raise Refused(f"model.name={name!r} cannot be read as GGUF: {why_not(name, error)}") from error
        if state_of([path]) != before:
            raise Refused(f"model.name={name!r} was changed while it was read: give it again when it is complete")
        return facts

    plain = digest_of([*of, None])[:32]
    with cache.entry("gguf", plain, partial(make, _write_config)) as small:
        if dtype is None:
            yield small.folder, small.metadata
            return
        whole = digest_of([*of, str(dtype)])[:32]
        with cache.entry("gguf", whole, partial(make, partial(_write_whole, small, dtype))) as entry:
            yield entry.folder, entry.metadata | {"notes": [*entry.metadata["notes"], *_of_unkept(entry)]}


def _of_unkept(entry: cache.Entry) -> list[str]:
    """Note on an entry that is made anew for every run, if it is one."""
    if cache.cache_folder() in entry.folder.parents:
        return []
    return [
        f"the dequantised weights, {cache.size_of(entry.folder) / 1e6:,.0f} MB, are not kept for other runs: the cache "
        "holds less (PRUNE_LAB_CACHE_GB), or cannot be written"
    ]


def _write_config(place: Path, folder: Path, name: str) -> dict[str, Any]:
    """Writes config and tokenizer of the file in `place`; facts as of `unpacked`, and the names of the files."""
    from transformers import AutoConfig, AutoTokenizer

    header = read_header(place / _FILE)
    config = AutoConfig.from_pretrained(place, gguf_file=_FILE)
    family_of(config.model_type)
    check_config(config, name)
    for key in ("quantization_config", "_model_name_or_path"):  # the weights are floats by now; a title, no path
        if hasattr(config, key):
            delattr(config, key)
    notes = _compare(header, config, name)
    _check_tensors(header, config, name)
    tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=_FILE)
    check_tokenizer(tokenizer, header, name)
    notes += _write_tokenizer(tokenizer, header, folder)
    config.architectures = [type(skeleton(config)).__name__]
    config.save_pretrained(folder)
    size = (place / _FILE).stat().st_size / 1e6
    notes.append(
        f"the model is a GGUF file of {size:,.1f} MB ({header.kinds}): the dense model is what its weights are when "
        "dequantised, and its size is that of their floats"
    )
    licence = header.metadata.get("general.license")
    files = sorted(path.name for path in folder.iterdir())
    return {"notes": notes, "licence": str(licence) if licence else None, "files": files}


def _write_whole(small: cache.Entry, dtype: torch.dtype, place: Path, folder: Path, name: str) -> dict[str, Any]:
    """Writes config and tokenizer, which are in the entry `small`, and the weights; facts as of `unpacked`."""
    for file in small.metadata["files"]:
        shutil.copy(small.folder / file, folder)
    _write_weights(place, folder, name, dtype)
    return small.metadata


# Algorithm by which a file's tokenizer cuts words, by the names that GGUF has for it.
_ALGORITHMS = {"gpt2": "BPE", "llama": "BPE", "bert": "WordPiece", "t5": "Unigram"}


def check_tokenizer(tokenizer: Any, header: Header, name: str) -> None:
    """Raises Refused where transformers made a tokenizer of another algorithm than the file's, whose tokens differ.

    transformers 5.17 makes Unigram of Gemma's, with twice as many tokens; 5.24 makes BPE.
    """
    said = _ALGORITHMS.get(str(header.metadata.get("tokenizer.ggml.model")))
    made = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["type"]
    if said is not None and made != said:
        raise Refused(
            f"model.name={name!r} has a tokenizer of the kind {said}, and transformers {version('transformers')} makes "
            f"{made} of it, which cuts text into other tokens: install a newer transformers"
        )


def _write_tokenizer(tokenizer: Any, header: Header, folder: Path) -> list[str]:
    """Writes the tokenizer, with what its file says of BOS and EOS, and returns notes."""
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    said = {f"add_{key}_token": header.metadata.get(f"tokenizer.ggml.add_{key}_token") for key in ("bos", "eos")}
    # transformers writes only what is no default of the class; other versions have other defaults.
    stored = json.loads(file.read_text(encoding="utf-8"))
    stored |= {key: value for key, value in said.items() if value is not None}
    for key in ("is_local", "local_files_only"):
        stored.pop(key, None)
    split = header.metadata.get("tokenizer.ggml.pre")
    if header.metadata.get("tokenizer.ggml.model") == "gpt2" and split is not None:
        stored[ORIGIN] = split  # the rule itself may be lost: see below
    file.write_text(json.dumps(stored, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    if stored.get(ORIGIN, "default") not in (*_known_splits(), *_SPLITS_OF_GPT2):
        return [
            f"transformers does not know the file's rule for cutting text into words (tokenizer.ggml.pre={split}) and "
            "cuts as GPT-2 does: some tokens may differ from those of the model's own tokenizer"
        ]
    return []


_SPLITS_OF_GPT2 = ("default", "gpt-2", "gpt2")


def _known_splits() -> tuple[str, ...]:
    """Names of rules that this version of transformers knows; none where it has no table of them."""
    try:
        from transformers.integrations.gguf import gguf_tokenizer_mapping
    except ImportError:
        return ()
    return tuple(getattr(gguf_tokenizer_mapping, "GGUF_PRE_TOKENIZER_SPLITS", ()))


def _write_weights(place: Path, folder: Path, name: str, dtype: torch.dtype) -> None:
    """Dequantises the weights and writes them beside the config that is there."""
    import transformers

    keywords: dict[str, Any] = {"config": transformers.AutoConfig.from_pretrained(folder), "dtype": dtype}
    if hasattr(transformers, "GgufConfig"):  # else newer versions keep blocks of integers where they have kernels
        keywords["quantization_config"] = transformers.GgufConfig(dequantize=True)
    keywords |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(place, gguf_file=_FILE, **keywords)
    model, report = loaded
    wrong = [*report["missing_keys"], *(key if isinstance(key, str) else key[0] for key in report["mismatched_keys"])]
    if wrong:  # what transformers does not find it starts at random
        raise Refused(
            f"model.name={name!r} lacks the weights {', '.join(sorted(wrong)[:3])}, or has them in another shape: its "
            "tensors are not those of its metadata"
        )
    check_finite(model, name)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    shards = lay_out_model(model, folder)
    for key, tensor in stored_tensors(model).items():
        shards.write(key, tensor)
    model.config.dtype = dtype
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)


def _check_tensors(header: Header, config: Any, name: str) -> None:
    """Raises Refused where the file holds tensors that the model of `config` has no place for."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    numbers = {of: number for number, of in MODEL_ARCH_NAMES.items()}
    names = get_tensor_name_map(numbers[header.architecture], config.num_hidden_layers)
    wanted = {names.get_name(key, (".weight", ".bias")) for key in skeleton(config).state_dict()}
    unread = sorted(header.tensors.keys() - wanted)
    if unread:
        what = f" and {len(unread) - 3} more" if len(unread) > 3 else ""
        raise Refused(
            f"model.name={name!r} holds {', '.join(unread[:3])}{what}, which transformers {version('transformers')} "
            "does not read from GGUF, and the model computes something else without: give the model in the Hub's layout"
        )


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _rope(config: Any) -> dict[str, Any]:
    rope = getattr(config, "rope_parameters", None) or {}
    found: dict[str, Any] = rope.get("full_attention", rope)
    return found


# What the config must have for a key of the file, where the file has it: transformers takes some keys and not others.
_SAID: dict[str, Callable[[Any], Any]] = {
    "block_count": lambda config: config.num_hidden_layers,
    "context_length": lambda config: config.max_position_embeddings,
    "embedding_length": lambda config: config.hidden_size,
    "feed_forward_length": lambda config: getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
    "vocab_size": lambda config: config.vocab_size,
    "attention.head_count": lambda config: config.num_attention_heads,
    "attention.head_count_kv": lambda config: getattr(config, "num_key_value_heads", config.num_attention_heads),
    "attention.key_length": _head_dim,
    "attention.value_length": _head_dim,
    "attention.layer_norm_rms_epsilon": lambda config: config.rms_norm_eps,
    "attention.layer_norm_epsilon": lambda config: config.layer_norm_epsilon,
    "attn_logit_softcapping": lambda config: getattr(config, "attn_logit_softcapping", None),
    "final_logit_softcapping": lambda config: getattr(config, "final_logit_softcapping", None),
    "attention.sliding_window": lambda config: getattr(config, "sliding_window", None),
    "rope.freq_base": lambda config: _rope(config).get("rope_theta"),
    "rope.dimension_count": lambda config: _head_dim(config) * (_rope(config).get("partial_rotary_factor") or 1),
    "rope.scaling.type": lambda config: "none",
    "rope.scaling.factor": lambda config: 1.0,
    "rope.scale_linear": lambda config: 1.0,
    "expert_count": lambda config: 0,
    "expert_used_count": lambda config: 0,
}


def _compare(header: Header, config: Any, name: str) -> list[str]:
    """Notes on settings of the file that are not looked at; raises Refused where the config has another value."""
    notes, prefix = list[str](), f"{header.architecture}."
    unknown = []
    for whole, said in header.metadata.items():
        key = whole.removeprefix(prefix)
        if key == whole:
            continue
        if key not in _SAID:
            unknown.append(f"{whole}={str(said)[:40]}")
            continue
        taken = _SAID[key](config)
        if _same(said, taken):
            continue
        if key == "attention.sliding_window":
            notes.append(
                f"{whole}={said} is not read by transformers: every token sees all before it, also those that are "
                "further away"
            )
            continue
        raise Refused(
            f"model.name={name!r} says {whole}={str(said)[:40]}, and the config that transformers "
            f"{version('transformers')} makes of it has {taken}: the model would compute something else; give it in "
            "the Hub's layout"
        )
    if unknown:
        notes.append(f"settings of the GGUF file that are not known here and were not looked at: {', '.join(unknown)}")
    return notes


def _same(said: Any, taken: Any) -> bool:
    if isinstance(said, float) and isinstance(taken, int | float):  # stored in 32 bits
        return abs(said - taken) <= 1e-6 * abs(taken)
    return bool(said == taken)
