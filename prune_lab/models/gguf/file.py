"""A model as one GGUF file: written by the package gguf, compared with what it was written from, and read back."""

from __future__ import annotations

import copy
import io
import math
from collections import Counter
from contextlib import closing, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGML_QUANT_VERSION, GGUFReader, GGUFWriter, LlamaFileType, quants, size_label
from gguf import GGMLQuantizationType as Stored
from gguf.constants import GGUFType

from prune_lab.errors import Refused
from prune_lab.models.gguf.families import add_parameters, architecture_of
from prune_lab.models.gguf.tensors import Piece, Values, pieces_of, state_of
from prune_lab.models.gguf.vocabulary import Vocabulary

if TYPE_CHECKING:
    from torch import Tensor

_FILE_TYPES = {
    "f32": LlamaFileType.ALL_F32,
    "f16": LlamaFileType.MOSTLY_F16,
    "bf16": LlamaFileType.MOSTLY_BF16,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
    "q4_0": LlamaFileType.MOSTLY_Q4_0,
}
_UNCOMPARED = ("GGUF.", "general.name", "general.license")
_LARGEST_HALF = 65504.0
_VOCABULARY = ("token_embd.weight", "output.weight")


def stored_as(name: str, shape: tuple[int, ...], asked: str) -> Stored:
    """Type in which a tensor of a file of the type `asked` is stored.

    As llama.cpp has it: float32 for vectors, norms and routers, and float16 for rows that are no whole blocks of 32. In
    q4_0, the embedding and the head are stored in q8_0 (llama-quantize takes Q6_K, which the package does not write).
    """
    if len(shape) == 1 or name.endswith(("_norm.weight", "ffn_gate_inp.weight")):
        return Stored.F32
    kind = Stored.Q8_0 if asked == "q4_0" and name in _VOCABULARY else Stored[asked.upper()]
    return Stored.F16 if shape[-1] % GGML_QUANT_SIZES[kind][0] else kind


def notes_of_types(model: Any, asked: str) -> list[str]:
    """Notes of a run on the types in which the tensors of a model are stored."""
    dtype, notes = str(model.dtype).removeprefix("torch."), []
    if asked not in ("f32", dtype.replace("float", "f")):
        rounded = "16 bits" if asked.endswith("16") else f"{asked}: llama-perplexity measures its quality"
        notes.append(f"the figures are of the model in {dtype}, and the GGUF file has its matrices in {rounded}")
    short = [piece.name for piece in pieces_of(model) if stored_as(piece.name, piece.shape, asked) is Stored.F16]
    if short and asked != "f16":
        kinds = Counter(name.split(".")[-2] for name in short)
        listed = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        notes.append(
            f"export.type={asked} is for rows of a multiple of 32 numbers; stored in f16 are {listed} "
            "(of pruned MLPs, method.round_to=32 keeps such rows)"
        )
    return notes


def _new_writer(
    path: Path | None, model: Any, vocabulary: Vocabulary, asked: str, general: dict[str, str]
) -> GGUFWriter:
    """A writer with all metadata and the table of tensors, and no values yet."""
    writer = GGUFWriter(path, architecture_of(model.config).name)
    for piece in pieces_of(model):
        kind = stored_as(piece.name, piece.shape, asked)
        bytes_ = quants.quant_shape_to_byte_shape(piece.shape, kind)
        is_float = kind in (Stored.F32, Stored.F16)
        dtype = np.dtype(kind.name.replace("F", "float")) if is_float else np.dtype(np.uint8)
        writer.add_tensor_info(piece.name, piece.shape if is_float else bytes_, dtype, math.prod(bytes_), kind)
    writer.add_type(GGUFType.MODEL)
    for key, value in general.items():
        writer.add_string(f"general.{key}", value)
    writer.add_size_label(size_label(*writer.get_total_parameter_count()))
    writer.add_file_type(_FILE_TYPES[asked])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    add_parameters(writer, model.config)
    vocabulary.add_to(writer)
    return writer


def write(path: Path, model: Any, vocabulary: Vocabulary, asked: str, general: dict[str, str]) -> None:
    """Writes a model's file; `general` has the model's name and licence. One tensor at a time is in memory beside it.

    Raises Refused where float16 is asked for and cannot hold a weight.
    """
    with closing(_new_writer(path, model, vocabulary, asked, general)) as writer:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for piece in pieces_of(model):
            values = piece.values()
            kind = stored_as(piece.name, piece.shape, asked)
            if kind is Stored.F16 and (largest := float(np.abs(values).max())) > _LARGEST_HALF:
                raise Refused(
                    f"export.type={asked}: {piece.name} has a weight of {largest:g}, and 16-bit floats of this kind "
                    f"end at {_LARGEST_HALF:g}; give export.type=bf16 or f32"
                )
            writer.write_tensor_data(quants.quantize(values, kind))


def check(path: Path, model: Any, vocabulary: Vocabulary, asked: str) -> None:
    """Compares a file with what it was written from: metadata, and the tensors' names, shapes, types and values.

    Names and licences are whatever they are.

    Raises RuntimeError where they differ by more than rounding to a tensor's type allows.
    """
    reader, expected = GGUFReader(path), _new_writer(None, model, vocabulary, asked, {})
    written = {key: field.contents() for key, field in reader.fields.items() if not key.startswith(_UNCOMPARED)}
    for key, value in expected.kv_data[0].items():
        if key not in written or not _same(written.pop(key), value.value):
            raise _differs(path, key)
    if written:
        raise _differs(path, next(iter(written)))
    stored = {tensor.name: tensor for tensor in reader.tensors}
    for piece in pieces_of(model):
        _check_tensor(path, piece, stored.pop(piece.name, None), asked)
    if stored:
        raise _differs(path, next(iter(stored)))


def _check_tensor(path: Path, piece: Piece, found: Any, asked: str) -> None:
    expected = piece.values()
    if found is None or tuple(reversed(found.shape.tolist())) != expected.shape:
        raise _differs(path, piece.name)
    if found.tensor_type is not stored_as(piece.name, expected.shape, asked):
        raise _differs(path, piece.name)
    off = np.abs(_dequantised(found) - expected)
    if not bool((off <= _bound(expected, found.tensor_type)).all()):  # NaN is in no bound
        raise _differs(path, f"{piece.name}, by {float(off.max()):g}")


def _same(found: Any, expected: Any) -> bool:
    if isinstance(expected, float):
        return bool(np.float32(expected) == np.float32(found))
    if isinstance(expected, list | tuple):
        return len(found) == len(expected) and all(map(_same, found, expected))
    return bool(found == expected)


def _differs(path: Path, what: str) -> RuntimeError:
    return RuntimeError(f"the export in {path.parent} does not reload: its {path.name} differs in {what}")


def _dequantised(found: Any) -> Values:
    """Values of a tensor of the reader, float32, in the model's order of dimensions."""
    values: Values = quants.dequantize(found.data, found.tensor_type)
    return values.reshape(tuple(reversed(found.shape.tolist())))


def _bound(values: Values, kind: Stored) -> Values:
    """Largest error of rounding values to a type: half a step of floats, or of a block's scale."""
    if kind is Stored.F32:
        return np.zeros_like(values)
    if kind in (Stored.F16, Stored.BF16):
        bits, smallest = (11, 2.0**-25) if kind is Stored.F16 else (8, 2.0**-134)
        return np.abs(values) * 2.0**-bits + smallest
    blocks = np.abs(values.reshape(*values.shape[:-1], -1, 32)).max(-1, keepdims=True)
    # The scale is a float16, off by 2^-11 of it, or by 2^-25 where it is tiny. The largest number of q4_0 has no step.
    steps, off = (127, 0.5) if kind is Stored.Q8_0 else (8, 1.0)
    bound = blocks / steps * off + steps * (blocks / steps * 2.0**-11 + 2.0**-25)
    return np.broadcast_to(bound, (*values.shape[:-1], values.shape[-1] // 32, 32)).reshape(values.shape)


def read(path: Path, config: Any, dtype: torch.dtype) -> Any:
    """The model of a file, dequantised, for the config that was written beside it; in eval mode."""
    from prune_lab.models.checkpoint import skeleton

    tensors, like = {tensor.name: tensor for tensor in GGUFReader(path).tensors}, skeleton(config)

    def stored(name: str) -> Tensor:
        return torch.from_numpy(_dequantised(tensors[name]).copy())

    state = {key: tensor.to(dtype) for key, tensor in state_of(like, stored).items()}
    return type(like).from_pretrained(None, config=config, state_dict=state, dtype=dtype).eval()


def read_by_transformers(path: Path, model: Any) -> Any:
    """A model like `model` with the weights that stock transformers reads of its file, in eval mode.

    It has other code for names and layouts, which it looks up by model_type: a Mistral is a Llama in GGUF.
    """
    import transformers

    config = copy.deepcopy(model.config)
    if (name := architecture_of(config).name) == "llama":
        config.model_type = name
    keywords: dict[str, Any] = {"config": config, "dtype": torch.float32, "local_files_only": True}
    if hasattr(transformers, "GgufConfig"):
        keywords["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with redirect_stderr(io.StringIO()):  # its bars are of parts
        found: Any = type(model).from_pretrained(path.parent, gguf_file=path.name, **keywords)
    return found.to(model.dtype).eval()
