"""Engines that load an export: transformers 4.57 and 5, llama.cpp, vLLM and ONNX, by rules on shapes and layout.

Each rule says where it is from. Those of transformers were tried (tests/test_export.py, tests/test_quantize.py,
tests/test_loads_in.py); those of llama.cpp are of its source of 2026 (src/llama-quant.cpp, conversion/base.py), and its
llama-quantize was run; those of vLLM are of its source of 2025, and nothing was run there.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from prune_lab.errors import Refused
from prune_lab.models.onnx.types import TYPES as IN_ONNX

if TYPE_CHECKING:
    from prune_lab.models.load import Loaded

YES, NO, UNKNOWN = "yes", "no", "not known"
PARALLEL = (2, 4, 8)  # numbers of devices that a model is spread over
BLOCK, SUPERBLOCK = 32, 256  # weights in a block of llama.cpp's q4_0 to q8_0, and of its K-quants

# vllm/model_executor/models/registry.py, of what transformers has as well.
_IN_VLLM = frozenset(
    f"{name}ForCausalLM"
    for name in (
        "Apertus", "Arcee", "Bamba", "Bloom", "Cohere", "Cohere2", "Dbrx", "DeepseekV2", "DeepseekV3", "Dots1",
        "Ernie4_5", "Ernie4_5_Moe", "Exaone4", "Falcon", "FalconH1", "FalconMamba", "FlexOlmo", "GPTBigCode", "GPTJ",
        "GPTNeoX", "Gemma", "Gemma2", "Gemma3", "Glm", "Glm4", "Glm4Moe", "GptOss", "Granite", "GraniteMoe",
        "GraniteMoeHybrid", "GraniteMoeShared", "HunYuanDenseV1", "HunYuanMoEV1", "Jamba", "Lfm2", "Lfm2Moe", "Llama",
        "Llama4", "LongcatFlash", "Mamba", "Mamba2", "MiniMax", "Mistral", "Mixtral", "Mpt", "Nemotron", "NemotronH",
        "OPT", "Olmo", "Olmo2", "Olmo3", "Olmoe", "Persimmon", "Phi", "Phi3", "PhiMoE", "Qwen2", "Qwen2Moe", "Qwen3",
        "Qwen3Moe", "Qwen3Next", "SeedOss", "StableLm", "Starcoder2", "Zamba2",
    )
) | {"GPT2LMHeadModel"}  # fmt: skip
# Their classes there divide hidden_size by the number of heads, whatever head_dim says (qwen2.py, olmoe.py).
_SQUARE_IN_VLLM = ("qwen2", "qwen2_moe", "olmoe")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_WIDTHS = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size")


@dataclass(frozen=True)
class Verdict:
    """Answer of an engine to an export: `loads` is YES, NO or UNKNOWN, `note` says how, or why not.

    keys: what would change the answer, as overrides of a command line.
    """

    engine: str
    loads: str
    note: str
    keys: tuple[str, ...] = ()


@dataclass(frozen=True)
class Shapes:
    """The facts about a model that the rules look at.

    rows: length of the rows of its matrices, by the last part of their names; widths: of MLPs and experts. bits: of
    quantized weights, else None; dynamic: their inputs are rounded, too. foreign: quantized Conv1Ds, which no library
    has a layout for. cuts: kinds of units that pruning took out of it.
    """

    config: Any
    architecture: str
    rows: dict[str, int]
    bits: int | None = None
    dynamic: bool = False
    is_float: bool = False
    foreign: bool = False
    outputs: frozenset[int] = frozenset()
    cuts: frozenset[str] = field(default_factory=frozenset)

    @property
    def text(self) -> Any:
        """Config of the text model."""
        return self.config.get_text_config()

    @property
    def experts(self) -> int | None:
        """Experts of a block; None for a model without."""
        return next((counts[0] for name in _EXPERTS if (counts := self.counts(name))), None)

    @property
    def widths(self) -> list[tuple[str, int]]:
        """Widths of MLPs and experts, each with the name of its field."""
        return [(name, width) for name in _WIDTHS for width in self.counts(name)]

    def counts(self, name: str) -> list[int]:
        """Numbers that a field of the text config has, without zeros: several where blocks differ (Gemma 4)."""
        of_blocks = getattr(self.text, "per_layer_config", None)  # reading such a field of the whole config raises
        if of_blocks:
            found = [getattr(of_blocks[index], name, None) for index in range(self.text.num_hidden_layers)]
        else:
            found = [getattr(self.text, name, None)]
        values = [value for one in found for value in (one if isinstance(one, list | tuple) else [one])]
        return sorted({value for value in values if isinstance(value, int) and not isinstance(value, bool) and value})


def shapes_of(loaded: Loaded, cuts: Collection[str] = ()) -> Shapes:
    """Facts about a model that was loaded, pruned and post-compressed; cuts: what pruning took out of it."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    from prune_lab.models.low_bit.experts import LowBitExperts
    from prune_lab.models.low_bit.linears import LowBitLinear

    model, stored = loaded.model, getattr(loaded.model.config, "quantization_config", None)
    rows, outputs = dict[str, int](), set[int]()
    for name, module in model.named_modules():
        leaf = name.rpartition(".")[2]
        if isinstance(module, nn.Linear | LowBitLinear):
            rows[leaf] = module.in_features
            if isinstance(module, LowBitLinear):
                outputs.add(module.out_features)
        elif isinstance(module, Conv1D):
            rows[leaf] = module.weight.shape[0]
        elif isinstance(module, nn.Embedding):
            rows[leaf] = module.embedding_dim
        for key, tensor in module.named_parameters(recurse=False):
            if tensor.ndim == 3 and not isinstance(module, LowBitExperts):  # of all experts
                rows[key] = tensor.shape[-1]
    facts: dict[str, Any] = {}
    if isinstance(stored, dict):
        (group,) = stored["config_groups"].values()
        facts = {
            "bits": group["weights"]["num_bits"],
            "dynamic": group["input_activations"] is not None,
            "is_float": group["weights"]["type"] == "float",
            "foreign": loaded.family == "gpt2",
        }
    return Shapes(
        model.config, type(model).__name__, rows, outputs=frozenset(outputs), cuts=frozenset(cuts), **facts
    )  # fmt: skip


def of_folder(shapes: Shapes) -> list[Verdict]:
    """Verdicts on a Hugging Face folder (export=hf)."""
    return [*_transformers(shapes), llama_cpp(shapes), vllm(shapes), onnx(shapes)]


def of_bitmask() -> list[Verdict]:
    """Verdicts on export=bitmask, whose layout nobody else has."""
    others = ("transformers 5", "transformers 4.57", "llama.cpp", "vLLM", "ONNX")
    return [Verdict(name, NO, "prune_lab alone reads this layout", ("export=hf",)) for name in others]


def of_gguf(shapes: Shapes, asked: str) -> list[Verdict]:
    """Verdicts on export=gguf of the type `asked`."""
    from prune_lab.models.gguf.families import architecture_of

    read = architecture_of(shapes.config).read_again
    how = "`from_pretrained(folder, gguf_file=...)`, with the package gguf" if read else "it does not read this family"
    quantised = f"; the matrices are in {asked}"
    if asked in ("f32", "f16", "bf16"):
        quantised += f". {_quants(shapes)[0]}"
    return [
        Verdict("llama.cpp", YES, f"as it is{quantised}", _quants(shapes)[1]),
        Verdict("transformers 5", YES if read else NO, how, () if read else ("export=hf",)),
        Verdict("transformers 4.57", UNKNOWN, "not tried", ("export=hf",)),
        Verdict("vLLM", UNKNOWN, "its support of GGUF is experimental", ("export=hf",)),
        Verdict("ONNX", NO, "a GGUF file is not traced", ("export=hf",)),
    ]


def of_onnx(asked: str) -> list[Verdict]:
    """Verdicts on export=onnx of the type `asked`."""
    others = ("transformers 5", "transformers 4.57", "llama.cpp", "vLLM")
    how = f"ONNX Runtime, with a key-value cache, in {asked}"
    return [
        Verdict("ONNX", YES, how),
        *(Verdict(name, NO, "an ONNX graph is not read", ("export=hf",)) for name in others),
    ]


def _transformers(shapes: Shapes) -> list[Verdict]:
    from prune_lab.models.auto_class import auto_class
    from prune_lab.models.export_config import READ_BY_4

    five, four = "transformers 5", "transformers 4.57"
    how = f"`{auto_class(shapes.config, [shapes.architecture]).__name__}.from_pretrained(folder)`"
    if shapes.foreign:  # compressed-tensors finds no Linear in it, and leaves its weights random
        note = "only prune_lab has a layout for quantized Conv1Ds"
        return [Verdict(five, NO, note, ("post=none",)), Verdict(four, NO, note, ("post=none",))]
    if shapes.bits is not None and shapes.experts is not None:
        eight = shapes.bits == 8
        note = "reads experts of 4 bits, not of 8-bit integers" if eight else _with_library("dequantize=True")
        return [
            Verdict(five, NO if eight else YES, note, ("post=int4_weight_only",) if eight else ()),
            Verdict(four, NO, "cannot read quantized experts", ("post=none",)),
        ]
    if shapes.bits is not None:
        how = _with_library("run_compressed=False")
        if shapes.dynamic:
            how += "; inputs are not rounded then, so its figures are a little better"
    known = shapes.config.model_type in READ_BY_4
    return [
        Verdict(five, YES, how),
        Verdict(four, YES if known else UNKNOWN, how if known else "not among the types that were tried there"),
    ]


def _with_library(setting: str) -> str:
    return (
        "with the package compressed-tensors, "
        f"`from_pretrained(folder, quantization_config=CompressedTensorsConfig({setting}))`"
    )


def llama_cpp(shapes: Shapes) -> Verdict:
    """llama.cpp by its converter: whether it has the family, and which quantisations keep their type."""
    from prune_lab.models.gguf.families import ARCHITECTURES, check_config

    quants, keys = _quants(shapes)
    if shapes.foreign or (shapes.bits is not None and shapes.experts is not None):
        return Verdict("llama.cpp", UNKNOWN, "conversion of these quantized weights was not tried", ("post=none",))
    if shapes.config.model_type not in ARCHITECTURES:
        return Verdict(
            "llama.cpp", UNKNOWN, f"if convert_hf_to_gguf.py has {shapes.architecture}. {quants}", keys
        )  # fmt: skip
    try:
        check_config(shapes.config)
    except Refused as error:
        return Verdict("llama.cpp", NO, str(error).removeprefix("export=gguf: ").partition("; give")[0])
    how = "convert_hf_to_gguf.py" if shapes.bits else "convert_hf_to_gguf.py, or export=gguf here"
    expanded = " (it expands the quantized weights)" if shapes.bits else ""  # conversion/base.py, dequant_model
    return Verdict("llama.cpp", YES, f"{how}{expanded}. {quants}", keys)


def row_type(length: int) -> str:
    """Type that llama-quantize stores rows of a length in where a K-quant is asked for (tensor_type_fallback).

    "K" for the K-quant itself, "32" for another type with blocks of 32, "F16" where neither fits; versions before that
    of 2026 stop there.
    """
    return "K" if not length % SUPERBLOCK else "32" if not length % BLOCK else "F16"


def _quants(shapes: Shapes) -> tuple[str, tuple[str, ...]]:
    """Types that llama-quantize gives the matrices, by the length of their rows; and keys."""
    says = []
    if fall := _named(shapes.rows, "32"):
        says.append(f"K-quants fall back in rows of {fall}, no multiple of 256: Q4_K to Q5_0, Q6_K to Q8_0")
    if odd := _named(shapes.rows, "F16"):
        says.append(f"rows of {odd}, no multiple of 32, stay in F16, or llama-quantize stops")
    return ("; ".join(says) or "all K-quants keep their type"), _round_to(shapes)


def _round_to(shapes: Shapes) -> tuple[str, ...]:
    """The key that makes pruned widths fit blocks of llama.cpp; none where they do, or were not pruned."""
    for multiple in (SUPERBLOCK, BLOCK):
        if "mlp" in shapes.cuts and any(width % multiple and width > multiple for _, width in shapes.widths):
            return (f"method.round_to={multiple}",)
    return ()


def _named(rows: dict[str, int], kind: str) -> str:
    """Lengths of rows of a `row_type`, each with the matrices that have it: 96 (down_proj), 576 (q_proj, ...)."""
    by_length: dict[int, list[str]] = {}
    for name, length in rows.items():
        if row_type(length) == kind:
            by_length.setdefault(length, []).append(name)
    return ", ".join(
        f"{length} ({', '.join(names[:2])}{', ...' if len(names) > 2 else ''})" for length, names in by_length.items()
    )


def vllm(shapes: Shapes) -> Verdict:
    """vLLM: whether it has the class and the layout, and over how many devices it can spread the model."""
    config, text = shapes.config, shapes.text
    if shapes.foreign:
        return Verdict("vLLM", NO, "no layout for quantized Conv1Ds", ("post=none",))
    if shapes.bits == 8 and not shapes.dynamic:  # compressed_tensors.py, _get_scheme_from_parts
        note = "it reads 8-bit weights without 8-bit inputs in packed layouts alone"
        return Verdict("vLLM", NO, note, ("post=int8_dynamic", "post=int4_weight_only"))
    heads, head_dims = shapes.counts("num_attention_heads"), shapes.counts("head_dim")
    if config.model_type in _SQUARE_IN_VLLM and head_dims and heads[0] * head_dims[0] != text.hidden_size:
        note = f"its {shapes.architecture} takes hidden_size / heads for head_dim, and here that is not {head_dims[0]}"
        return Verdict("vLLM", NO, note, ("method.units=[mlp]",))
    known, keys, notes = shapes.architecture in _IN_VLLM, set[str](), list[str]()
    if not known:
        notes.append(f"by its transformers backend, if it has no {shapes.architecture} of its own")
    if heads:
        why = {n: reasons for n in PARALLEL if (reasons := not_spread(shapes, n))}
        able = _numbers(n for n in PARALLEL if n not in why)
        notes += [f"on 1 device, tensor-parallel on {able}", *(f"not {n}: {', '.join(why[n])}" for n in why)]
        keys |= {*(_round_to(shapes) if any(width % 8 for _, width in shapes.widths) else ())}
    if (experts := shapes.experts) is not None:
        notes.append(f"expert-parallel on {_numbers(n for n in PARALLEL if not experts % n)}")
        fewer = [n for n in PARALLEL if experts % n and n < experts]
        keys |= {f"method.round_to={fewer[-1]}"} if fewer and "experts" in shapes.cuts else set()
    if shapes.bits == 4 and (
        any(n % 128 for n in _quantized_rows(shapes)) or any(n % 64 for n in shapes.outputs)
    ):  # verify_marlin_supports_shape
        notes.append("no Marlin kernel: it wants inputs in multiples of 128 and outputs in multiples of 64")
    return Verdict(
        "vLLM", YES if known else UNKNOWN, f"{'; '.join(notes)} (by its source, not run)".lstrip(), tuple(sorted(keys))
    )


def _quantized_rows(shapes: Shapes) -> list[int]:
    skipped = ("lm_head", "embed_tokens", "gate", "router")
    return [length for name, length in shapes.rows.items() if name not in skipped]


def not_spread(shapes: Shapes, devices: int) -> list[str]:
    """Reasons why vLLM cannot spread a model with attention over so many devices; none where it can.

    Heads and widths must divide (ModelConfig.verify_with_parallel_config, distributed.utils.divide, FusedMoE); KV heads
    divide or are divided (LlamaAttention); there are no more devices than experts (Qwen3MoeSparseMoeBlock).
    """
    n, heads = devices, shapes.counts("num_attention_heads")
    reasons = [f"{count} heads" for count in heads if count % n]
    kv = shapes.counts("num_key_value_heads") or heads
    reasons += [f"{count} KV heads" for count in kv if (count % n if count >= n else n % count)]
    reasons += [f"{name}={width}" for name, width in shapes.widths if width % n]
    return reasons + ([f"{shapes.experts} experts"] if shapes.experts is not None and shapes.experts < n else [])


def _numbers(numbers: Any) -> str:
    found = [str(n) for n in numbers]
    return ", ".join(found) or "none of 2, 4, 8"


def onnx(shapes: Shapes) -> Verdict:
    """ONNX by export=onnx, or by torch.onnx.export(dynamo=True) of the model that stock transformers loads.

    Both were tried with PyTorch 2.13, onnxscript 0.7.2 and ONNX Runtime 1.32: the logits of IN_ONNX are equal to 1e-5
    of the largest, also of fewer heads with a head_dim of their own.
    """
    if shapes.bits is not None:
        return Verdict("ONNX", NO, "torch.onnx does not trace the modules of quantized weights", ("post=none",))
    loading = ', loaded with experts_implementation="batched_mm"' if shapes.experts is not None else ""
    known = shapes.config.model_type in IN_ONNX
    how = f"`torch.onnx.export(model, ..., dynamo=True)`{loading}"
    how = f"export=onnx here, or {how}" if known else how
    return Verdict("ONNX", YES if known else UNKNOWN, how if known else f"{how}; this type was not tried")
