"""What an export loads in, compared with the engines themselves: transformers 5 and 4.57, llama-quantize, ONNX Runtime.

vLLM is not run: its rule is compared with the lines of its source that refuse a shape.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CPU, Cli, in_older, logits, make_folder
from model_types import tiny_folder
from transformers import AutoModelForCausalLM

from prune_lab.export.base import Export
from prune_lab.export.bitmask import Bitmask
from prune_lab.export.gguf import Gguf
from prune_lab.export.hf import HuggingFace
from prune_lab.export.loads_in import NO, PARALLEL, UNKNOWN, YES, Verdict, not_spread, of_folder, row_type, shapes_of
from prune_lab.methods.experts import Experts
from prune_lab.methods.structured import Structured
from prune_lab.models.anatomy import Anatomy
from prune_lab.models.load import HubModel, Loaded
from prune_lab.models.low_bit.quantize_model import quantize
from prune_lab.models.low_bit.scheme import Scheme

Make = Callable[[Path], Path]
EXPORT = HuggingFace()


def made(family: str, **changes: Any) -> Make:
    """A small model of a described family, its heads and rotary frequency no default's."""
    return lambda place: make_folder(place, family, **changes)


def found(model_type: str, **more: Any) -> Make:
    return lambda place: tiny_folder(place, model_type, **more)


def pruned(method: Any) -> Callable[[Loaded], None]:
    return lambda loaded: method.prune(Anatomy(loaded.model), method.amount, 0) and None


def in_bits(**scheme: Any) -> Callable[[Loaded], None]:
    return lambda loaded: quantize(Anatomy(loaded.model), Scheme(**scheme)) and None


HALF = Structured(units=("mlp", "heads"), amount=0.5)
# What is made of a model; the option; and how the engines read it: transformers 5, 4.57, llama.cpp, vLLM, ONNX.
CASES: dict[str, tuple[Make, Callable[[Loaded], None] | None, Export, tuple[str, ...]]] = {
    "llama": (made("llama"), None, EXPORT, (YES, YES, YES, YES, YES)),
    "llama as a mistral": (
        made("llama", num_attention_heads=8, num_key_value_heads=4, head_dim=4),
        pruned(Structured(units=("heads",), amount=0.25)), EXPORT, (YES, YES, YES, YES, YES),
    ),
    "qwen3": (made("qwen3"), pruned(HALF), EXPORT, (YES, YES, YES, YES, YES)),
    "qwen2 with fewer heads": (made("qwen2"), pruned(HALF), EXPORT, (YES, YES, YES, NO, YES)),
    "gemma3": (made("gemma3_text"), pruned(Structured(amount=0.5)), EXPORT, (YES, YES, YES, YES, YES)),
    "gpt2": (made("gpt2"), None, EXPORT, (YES, YES, UNKNOWN, YES, YES)),
    "mixtral": (
        found("mixtral"), pruned(Experts(score="aimer", amount=0.5)), EXPORT, (YES, YES, YES, YES, YES)
    ),
    "qwen3_moe": (
        found("qwen3_moe", norm_topk_prob=True), pruned(Experts(score="aimer", amount=0.25)), EXPORT,
        (YES, YES, YES, YES, YES),
    ),
    "granite": (found("granite"), None, EXPORT, (YES, YES, UNKNOWN, YES, UNKNOWN)),
    "int8": (made("llama"), in_bits(bits=8), EXPORT, (YES, YES, YES, NO, NO)),
    "int8 dynamic": (made("qwen3"), in_bits(bits=8, dynamic=True), EXPORT, (YES, YES, YES, YES, NO)),
    "int4": (made("llama"), in_bits(bits=4, group_size=16), EXPORT, (YES, YES, YES, YES, NO)),
    "gpt2 int8": (made("gpt2"), in_bits(bits=8), EXPORT, (NO, NO, UNKNOWN, NO, NO)),
    "mixtral int4": (found("mixtral"), in_bits(bits=4, group_size=16), EXPORT, (YES, NO, UNKNOWN, YES, NO)),
    "mixtral int8": (found("mixtral"), in_bits(bits=8), EXPORT, (NO, NO, UNKNOWN, NO, NO)),
    "bitmask": (made("llama"), None, Bitmask(), (NO, NO, NO, NO, NO)),
}  # fmt: skip


def exported(name: str, place: Path) -> tuple[Loaded, list[Verdict]]:
    """A case's export in a folder, the model that it is of, and the verdicts on it."""
    make, change, export, _ = CASES[name]
    loaded = HubModel(name=str(make(place / "made"))).load(CPU, seed=0)
    loaded.model.set_attn_implementation("eager")
    if change is not None:
        change(loaded)
    export.write(loaded, place / "export")
    return loaded, export.loads_in(loaded, ("mlp",))


def reading_of(verdict: Verdict) -> dict[str, Any]:
    """Keywords of from_pretrained that a verdict's note names."""
    for setting, value in (("run_compressed", False), ("dequantize", True)):
        if f"{setting}={value}" in verdict.note:
            return {setting: value}
    return {}


def difference(place: Path, keywords: dict[str, Any], expected: torch.Tensor) -> float:
    """Of the logits that stock transformers computes, as a fraction of the largest; infinite where it does not load."""
    from transformers import CompressedTensorsConfig

    more = {"quantization_config": CompressedTensorsConfig(**keywords)} if keywords else {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a setting of reading is given beside the one in the folder
            model: Any = AutoModelForCausalLM.from_pretrained(
                place, dtype=torch.float32, attn_implementation="eager", **more
            )
        return float((logits(model.eval()) - expected).abs().max() / expected.abs().max())
    except (RuntimeError, OSError, ValueError):
        return float("inf")


def close(difference: float, name: str) -> bool:
    return difference < (0.1 if name == "int8 dynamic" else 1e-5)  # its inputs are not rounded there


FAST = (
    "gemma4",
    "llama as a mistral",
    "qwen2 with fewer heads",
    "mixtral",
    "int8",
    "mixtral int8",
    "bitmask",
)  # of each kind


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_the_verdicts_on_a_case_and_that_of_transformers_5_is_so(name: str, tmp_path: Path) -> None:
    loaded, verdicts = exported(name, tmp_path)
    expected = logits(loaded.model)
    assert [verdict.engine for verdict in verdicts] == [
        "transformers 5",
        "transformers 4.57",
        "llama.cpp",
        "vLLM",
        "ONNX",
    ]
    assert tuple(verdict.loads for verdict in verdicts) == CASES[name][3], verdicts
    off = difference(tmp_path / "export", reading_of(verdicts[0]), expected)
    assert close(off, name) == (verdicts[0].loads == YES), off


# Run where transformers is 4.57: argv is a folder of exports, each beside its logits, and the keywords by name.
OLDER = """
import json, pathlib, sys
import torch, transformers
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

assert transformers.__version__.startswith("4.57"), transformers.__version__
tokens, found = torch.randint(300, (3, 24), generator=torch.Generator().manual_seed(5)), {}
for name, keywords in json.loads(sys.argv[2]).items():
    more = {"quantization_config": CompressedTensorsConfig(**keywords)} if keywords else {}
    place = pathlib.Path(sys.argv[1]) / name
    try:
        model = AutoModelForCausalLM.from_pretrained(
            place / "export", dtype=torch.float32, attn_implementation="eager", **more)
        with torch.no_grad():
            expected, own = torch.load(place / "logits.pt"), model.eval()(input_ids=tokens, use_cache=False).logits
        found[name] = float((own - expected).abs().max() / expected.abs().max())
    except Exception as error:
        found[name] = str(error)
print(json.dumps(found))
"""


@pytest.mark.slow
def test_that_of_transformers_4_is_so(older: dict[str, str], tmp_path: Path) -> None:
    keywords, says = dict[str, Any](), dict[str, str]()
    for name in CASES:
        loaded, verdicts = exported(name, tmp_path / name)
        torch.save(logits(loaded.model), tmp_path / name / "logits.pt")
        keywords[name], says[name] = reading_of(verdicts[1]), verdicts[1].loads
    off = json.loads(in_older(older, OLDER, str(tmp_path), json.dumps(keywords)).splitlines()[-1])
    loads = {name: YES if isinstance(by, float) and close(by, name) else NO for name, by in off.items()}
    assert loads == says, off


@pytest.mark.parametrize("length", [31, 32, 44, 96, 256, 288, 512])
def test_rows_by_the_block_sizes_of_the_package_gguf(length: int) -> None:
    import numpy as np
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

    block, _ = GGML_QUANT_SIZES[GGMLQuantizationType.Q4_K]
    assert (row_type(length) == "K") == (length % block == 0)
    try:
        quants.quantize(np.ones((2, length), np.float32), GGMLQuantizationType.Q8_0)
        fits = True
    except quants.QuantError:
        fits = False
    assert fits == (row_type(length) in ("K", "32"))


@pytest.mark.slow
def test_what_llama_quantize_makes_of_each_length_of_rows(tmp_path: Path) -> None:
    """Q4_K_M of files with rows of 256, 96 and 44: the types that are in its file."""
    library = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    from gguf import GGUFReader

    types = {"K": {"Q4_K", "Q6_K"}, "32": {"Q5_0", "Q8_0"}, "F16": {"F16"}}
    for width in (256, 96, 44):
        shape = {"hidden_size": 256, "intermediate_size": width, "num_hidden_layers": 2, "vocab_size": 300}
        loaded = HubModel(name=str(make_folder(tmp_path / str(width), "llama", **shape))).load(CPU, seed=0)
        Gguf("f16").write(loaded, tmp_path / f"{width}-export")
        source, target = tmp_path / f"{width}-export" / "model.gguf", tmp_path / f"{width}.gguf"
        parameters = library.llama_model_quantize_default_params()
        parameters.ftype, parameters.nthread = 15, 1  # LLAMA_FTYPE_MOSTLY_Q4_K_M
        assert library.llama_model_quantize(os.fsencode(source), os.fsencode(target), parameters) == 0
        rows = shapes_of(loaded).rows
        for tensor in GGUFReader(target).tensors:
            if len(tensor.shape) == 2 and "token_embd" not in tensor.name:
                length = int(tensor.shape[0])
                assert length in rows.values()
                assert tensor.tensor_type.name in types[row_type(length)], (tensor.name, tensor.tensor_type.name)


def refuses(heads: int, kv: int, width: int, experts: int | None, devices: int) -> bool:
    """Whether vLLM raises while it builds the model: the conditions as its source has them, line by line."""
    try:
        if heads % devices != 0:  # config/model.py, verify_with_parallel_config
            raise ValueError
        if kv >= devices:  # models/llama.py, LlamaAttention
            assert kv % devices == 0
        else:
            assert devices % kv == 0
        assert width % devices == 0  # distributed/utils.py, ensure_divisibility; fused_moe/layer.py
        if experts is not None and devices > experts:  # models/qwen3_moe.py
            raise ValueError
    except (ValueError, AssertionError):
        return True
    return False


@pytest.mark.parametrize("devices", PARALLEL)
def test_where_vllm_spreads_a_model(devices: int, folder: Path) -> None:
    from transformers import LlamaConfig, Qwen3MoeConfig

    from prune_lab.export.loads_in import Shapes

    for heads, kv in ((9, 3), (8, 8), (8, 4), (16, 2), (12, 6), (24, 8), (6, 2), (4, 1), (14, 2)):
        for width in (1536, 1228, 1230, 1229):
            sizes = {"num_attention_heads": heads, "num_key_value_heads": kv, "hidden_size": heads * 16}
            dense = Shapes(LlamaConfig(**sizes, intermediate_size=width), "LlamaForCausalLM", {})
            assert bool(not_spread(dense, devices)) == refuses(heads, kv, width, None, devices)
            for experts in (3, 6, 8):
                config = Qwen3MoeConfig(
                    **sizes, intermediate_size=width, moe_intermediate_size=width, num_experts=experts, head_dim=16
                )
                mixture = Shapes(config, "Qwen3MoeForCausalLM", {})
                assert bool(not_spread(mixture, devices)) == refuses(heads, kv, width, experts, devices)


def test_a_model_whose_blocks_have_heads_of_two_sizes_has_verdicts(tmp_path: Path) -> None:
    loaded = HubModel(name=str(tiny_folder(tmp_path, "gemma4_text"))).load(CPU, seed=0)
    verdicts = EXPORT.loads_in(loaded, ())
    assert [verdict.loads for verdict in verdicts] == [YES, UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN]


def test_heads_that_differ_from_block_to_block_are_all_to_be_spread() -> None:
    from transformers import Gemma4TextConfig

    from prune_lab.export.loads_in import Shapes

    sizes = {"num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 96}
    config = Gemma4TextConfig(**sizes, per_layer_config={1: {"num_key_value_heads": 3, "intermediate_size": 100}})
    shapes = Shapes(config, "Gemma4ForCausalLM", {})
    assert shapes.counts("num_key_value_heads") == [3, 4]
    assert not_spread(shapes, 8) == ["3 KV heads", "intermediate_size=100"]


@pytest.mark.parametrize(
    ("width", "keys"),
    [
        (1536, ()),
        (1228, ("method.round_to=256",)),
        (288, ("method.round_to=256",)),
        (192, ()),
        (44, ("method.round_to=32",)),
    ],
)
def test_the_key_that_keeps_k_quants(width: int, keys: tuple[str, ...], tmp_path: Path) -> None:
    """Following it makes the rows of the MLP such that the answer changes."""
    shape = {"hidden_size": 32, "intermediate_size": width}
    loaded = HubModel(name=str(make_folder(tmp_path / "a", "llama", **shape))).load(CPU, seed=0)
    verdicts = {verdict.engine: verdict for verdict in of_folder(shapes_of(loaded, ("mlp",)))}
    assert verdicts["llama.cpp"].keys == keys
    assert of_folder(shapes_of(loaded))[2].keys == ()  # where no channels were pruned
    if keys:
        multiple = int(keys[0].partition("=")[2])
        better = width // multiple * multiple
        assert (row_type(better), row_type(width)) in (("K", "32"), ("K", "F16"), ("32", "F16"))


def test_a_run_and_its_card_name_the_engines_and_the_keys(
    cli: Cli, folder: Path, small: list[str], tmp_path: Path
) -> None:
    wide = make_folder(tmp_path / "wide", intermediate_size=300)
    run = [*small, f"model.name={wide}", "method=structured", "amount=0.1", "method.score=l2", "method.refit=none"]
    done = cli(*run, "export=hf", "tracking=none", "hydra.run.dir=run", "measure.latency=false", "measure.memory=false")
    assert done.returncode == 0, done.stderr
    line, more = (text for text in done.stdout.splitlines() if text.startswith(("loads in", "          changed")))
    assert line.startswith("loads in  transformers 5, transformers 4.57, llama.cpp, vLLM, ONNX by rules, not tried")
    assert more == "          changed by method.round_to=256 (llama.cpp, vLLM)"
    card = (tmp_path / "run" / "export" / "README.md").read_text()
    assert "| vLLM | yes | on 1 device, tensor-parallel on 2; not 4: intermediate_size=270; not 8:" in card
    assert "Would change it: `method.round_to=256` |" in card
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert [verdict["engine"] for verdict in summary["loads_in"]][:2] == ["transformers 5", "transformers 4.57"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the packages that trace and convert
@pytest.mark.parametrize("name", ["llama as a mistral", "qwen3", "mixtral"])
def test_that_of_onnx_is_so(name: str, tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    import onnxruntime

    _, verdicts = exported(name, tmp_path)
    more = {"experts_implementation": "batched_mm"} if "batched_mm" in verdicts[4].note else {}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "export", dtype=torch.float32, attn_implementation="eager", **more
    ).eval()

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids=ids, use_cache=False).logits

    tokens = torch.randint(300, (1, 24), generator=torch.Generator().manual_seed(5))
    length = ({1: torch.export.Dim("length", min=2, max=100)},)
    torch.onnx.export(
        Logits().eval(), (tokens,), tmp_path / "m.onnx", dynamo=True, dynamic_shapes=length, verbose=False
    )
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    for some in (tokens, tokens[:, :11]):
        (found,) = session.run(None, {session.get_inputs()[0].name: some.numpy()})
        with torch.no_grad():
            expected = model(input_ids=some, use_cache=False).logits
        assert float((torch.from_numpy(found) - expected).abs().max() / expected.abs().max()) < 1e-5
