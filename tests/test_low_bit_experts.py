"""Experts of 8 and 4 bits: what stock transformers computes with each expert's matrices rounded by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CPU, Cli, logits, story
from model_types import tiny_folder
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from prune_lab.errors import Refused
from prune_lab.measure.size import measure_size
from prune_lab.models.anatomy import Anatomy
from prune_lab.models.export import read_folder, save_model
from prune_lab.models.load import HubModel, Loaded
from prune_lab.models.low_bit.quantize_model import quantize
from prune_lab.models.low_bit.scheme import Scheme
from prune_lab.post.base import Post
from prune_lab.post.quantize import Int4WeightOnly, Int8Dynamic, Int8WeightOnly

SLOW = (pytest.mark.slow, pytest.mark.process)
GROUP = 8


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("low_bit_experts")


def folder_of(place: Path, model_type: str) -> Path:
    folder = place / model_type
    return folder if folder.exists() else tiny_folder(folder, model_type)


def load(folder: Path) -> Loaded:
    return HubModel(name=str(folder)).load(CPU, seed=0)


def rounded(weight: Tensor, bits: int) -> Tensor:
    """Every row (8 bits) or run of GROUP inputs (4 bits) in whole multiples of its largest / 127 or / 7."""
    largest = 127 if bits == 8 else 7
    runs = weight.unflatten(1, (-1, GROUP if bits == 4 else weight.shape[1]))
    step = runs.abs().amax(-1, keepdim=True) / largest
    return ((runs / step).round() * step).flatten(1)


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")  # of transformers, to whoever dequantizes
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    "model_type",
    [
        "mixtral", "deepseek_v3", "nemotron_h", "kimi_linear",
        *(pytest.param(n, marks=SLOW) for n in ("qwen2_moe", "olmoe", "lfm2_moe", "minimax_m2", "hunyuan_v1_moe")),
    ],
)  # fmt: skip
def test_each_expert_is_rounded_as_a_linear_of_its_own(
    model_type: str, bits: int, place: Path, tmp_path: Path
) -> None:  # fmt: skip
    folder = folder_of(place, model_type)
    loaded = load(folder)
    notes = quantize(Anatomy(loaded.model), Scheme(bits, group_size=GROUP if bits == 4 else None))
    own = any("only prune_lab can load the export" in note for note in notes)
    assert own == (bits == 8 or model_type == "kimi_linear")
    save_model(loaded, tmp_path / "export")
    (exported,) = (tmp_path / "export").glob("*.safetensors")
    coded = {name.replace("_scale", "") for name in load_file(exported) if name.endswith("weight_scale")}
    by_hand = Path(shutil.copytree(folder, tmp_path / "by_hand"))
    (file,) = by_hand.glob("*.safetensors")
    tensors = load_file(file)
    assert coded >= {name for name in tensors if ".experts." in name and tensors[name].dim() == 2}
    assert coded <= tensors.keys()
    for name in coded:
        tensors[name] = rounded(tensors[name], bits)
    save_file(tensors, file, metadata={"format": "pt"})
    stock: Any = AutoModelForCausalLM.from_pretrained(by_hand).eval()
    torch.testing.assert_close(logits(loaded.model), logits(stock))

    assert torch.equal(logits(read_folder(tmp_path / "export")), logits(loaded.model))
    if bits == 4 and model_type != "kimi_linear":  # as other software reads it
        way = CompressedTensorsConfig(dequantize=True)
        other: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "export", quantization_config=way).eval()
        torch.testing.assert_close(logits(other), logits(loaded.model))


def test_sizes_count_codes_and_a_tokens_experts(place: Path) -> None:
    dense, loaded = load(folder_of(place, "mixtral")), load(folder_of(place, "mixtral"))
    notes = quantize(Anatomy(loaded.model), Scheme(8))
    assert any("only prune_lab can load the export" in note for note in notes)
    sizes = [measure_size(of.model, []) for of in (dense, loaded)]
    assert sizes[0].params == sizes[1].params
    assert sizes[0].active == sizes[1].active
    codes = sum(p.numel() for name, p in dense.model.named_parameters() if ".experts." in name or "_proj" in name)
    scales = sum(b.nbytes for name, b in loaded.model.named_buffers() if name.endswith("weight_scale"))
    assert sizes[1].weights_mb * 1e6 == pytest.approx(sizes[0].weights_mb * 1e6 - 3 * codes + scales)


@pytest.mark.parametrize(
    ("model_type", "post", "said"),
    [
        ("gpt_oss", Int4WeightOnly(group_size=16), "neither as the weight of a Linear nor as a matrix for each expert"),
        ("mixtral", Int8Dynamic(), "cannot be rounded: give post=int8_weight_only or post=int4_weight_only"),
        ("mixtral", Int4WeightOnly(group_size=64), "does not divide the 96 inputs of .*: give 32 or 16 or 8, or"),
        ("jamba", Int8WeightOnly(), "use the weights of model.layers.0.mamba.dt_proj without calling it"),
    ],
)
def test_what_has_no_codes_is_refused_before_anything_is_pruned(
    model_type: str, post: Post, said: str, place: Path
) -> None:  # fmt: skip
    with pytest.raises(Refused, match=said):
        post.check_model(Anatomy(load(folder_of(place, model_type)).model), ())


def test_experts_without_weights_are_no_part_of_what_a_token_reads(place: Path) -> None:
    """LongCat-Flash sends a part of a token's choices to experts that return their input."""
    dense, loaded = load(folder_of(place, "longcat_flash")), load(folder_of(place, "longcat_flash"))
    quantize(Anatomy(loaded.model), Scheme(8))
    sizes = [measure_size(of.model, []) for of in (dense, loaded)]
    assert sizes[0].params == sizes[1].params
    assert sizes[1].active == pytest.approx(sizes[0].active, rel=0.02)  # what was rounded chooses others


def test_a_run_prunes_experts_and_then_rounds_them(cli: Cli, place: Path, tmp_path: Path) -> None:
    folder = folder_of(place, "mixtral")
    (tmp_path / "text.txt").write_text(story(1, 400))
    text = [
        "model=hf", "dataset=text", "dataset.path=text.txt", "dataset.seq_len=32", "dataset.calibration.n_samples=8",
        "measure=quality_only", "measure.max_windows=2",
    ]  # fmt: skip
    post = ["post=int4_weight_only", "post.group_size=8", "export=hf"]
    done = cli(*text, f"model.name={folder}", "method=experts", "amount=0.5", *post, "hydra.run.dir=run")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "run" / "summary.json").read_text())["metrics"]
    assert 0 < found["routing/same_experts"] < 1
    assert found["memory/weights_read_mb"] < found["memory/dense_weights_read_mb"] / 2
    again = cli(*text, "model.name=run/export", "method=none", "hydra.run.dir=again")
    assert again.returncode == 0, again.stderr
    reloaded = json.loads((tmp_path / "again" / "summary.json").read_text())["metrics"]
    for name in ("quality/perplexity", "params/active", "memory/weights_read_mb", "compute/macs_per_token"):
        assert reloaded[name] == pytest.approx(found[name]), name
    refused = cli(*text, f"model.name={folder}", "method=magnitude", "amount=0.5", "post=int8_dynamic")
    assert refused.returncode != 0
    assert "cannot be rounded" in refused.stderr
