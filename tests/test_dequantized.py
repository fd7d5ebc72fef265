"""Checkpoints in MXFP4 and 8-bit floats: read as the dense weights that their numbers are, by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CPU, Cli, make_folder, story
from model_types import tiny_folder
from safetensors.torch import load_file, save_file
from torch import Tensor

from prune_lab.errors import Refused
from prune_lab.methods.wanda import Wanda
from prune_lab.models.anatomy import Anatomy
from prune_lab.models.export import check_reload, save_model
from prune_lab.models.load import HubModel, Loaded
from prune_lab.pruning.calibration import Calibrator

WINDOWS = torch.randint(4, 300, (6, 24), generator=torch.Generator().manual_seed(7))
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])  # the numbers of 4 bits
Tensors = dict[str, Tensor]


def tensors_of(folder: Path) -> Tensors:
    return load_file(folder / "model.safetensors")


def store(folder: Path, tensors: Tensors, **quantization: Any) -> None:
    """Puts tensors into a folder, and a quantization_config into its config.json."""
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}), encoding="utf-8")


def in_mxfp4(folder: Path) -> Tensors:
    """Gives the experts of a folder random numbers of 4 bits, with a power of 2 for each 32; returns what they are."""
    generator, stored, dense = torch.Generator().manual_seed(0), Tensors(), Tensors()
    for name, tensor in tensors_of(folder).items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            stored[name] = dense[name] = tensor
            continue
        experts, inputs, outputs = tensor.shape
        codes = torch.randint(16, (experts, outputs, inputs), generator=generator)
        powers = torch.randint(120, 125, (experts, outputs, inputs // 32), generator=generator)
        values = E2M1[codes] * torch.exp2(powers - 127.0).repeat_interleave(32, -1)
        dense[name] = values.transpose(1, 2).contiguous()
        packed = (codes[..., 0::2] | (codes[..., 1::2] << 4)).to(torch.uint8)  # the first number in the low bits
        stored[f"{name}_blocks"] = packed.view(experts, outputs, inputs // 32, 16)
        stored[f"{name}_scales"] = powers.to(torch.uint8)
    store(folder, stored, quant_method="mxfp4", modules_to_not_convert=["model.embed_tokens", "lm_head"])
    return dense


def in_floats(folder: Path, block: tuple[int, int] | None = (8, 8)) -> Tensors:
    """Stores the projections of a folder's text in 8-bit floats with a scale for each block; returns what they are."""
    stored, dense = Tensors(), Tensors()
    for name, tensor in tensors_of(folder).items():
        if "proj" not in name or tensor.dim() != 2 or "vision" in name or "projector" in name:
            stored[name] = dense[name] = tensor
            continue
        rows, columns = block or tensor.shape
        scales = torch.stack([
            torch.stack([part.abs().max() / 448 for part in line.split(columns, 1)]) for line in tensor.split(rows)
        ])  # fmt: skip
        spread = scales.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[: len(tensor), : tensor.shape[1]]
        stored[name] = (tensor / spread).to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = scales if block else scales[0, 0]
        dense[name] = stored[name].float() * spread
    store(folder, stored, quant_method="fp8", weight_block_size=block, activation_scheme="dynamic")
    return dense


def load(folder: Path) -> Loaded:
    return HubModel(name=str(folder)).load(CPU, seed=0)


def of_one_scale(folder: Path) -> Tensors:
    return in_floats(folder, None)


@pytest.mark.parametrize(
    ("model_type", "stored", "called"),
    [
        ("gpt_oss", in_mxfp4, "MXFP4"),
        ("deepseek_v3", in_floats, "8-bit floats"),  # experts one by one
        ("mistral3", of_one_scale, "8-bit floats"),  # a wrapper
        ("llama", in_floats, "8-bit floats"),
    ],
)
def test_the_weights_are_those_of_the_numbers(
    model_type: str, stored: Callable[[Path], Tensors], called: str, tmp_path: Path
) -> None:
    """Bit by bit, and so is the export, which is dense and prunable like any model."""
    make = make_folder if model_type == "llama" else tiny_folder
    folder = make(tmp_path / "m", model_type)
    dense = stored(folder)
    loaded = load(folder)
    assert any(f"stored in {called}" in warning for warning in loaded.warnings)
    assert not loaded.is_low_bit
    save_model(loaded, tmp_path / "dense")
    written = tensors_of(tmp_path / "dense")
    assert written.keys() == dense.keys()
    assert [name for name, tensor in dense.items() if not torch.equal(written[name], tensor)] == []
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    Wanda(amount=0.5).prune(Anatomy(loaded.model), 0.5, 0, Calibrator(WINDOWS))
    save_model(loaded, tmp_path / "pruned")
    check_reload(loaded.model, tmp_path / "pruned", WINDOWS[:1])


def test_a_block_that_is_larger_than_the_matrix_is_read(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m")
    dense = in_floats(folder, (64, 64))
    weights = load(folder).model.state_dict()
    assert [name for name, tensor in dense.items() if not torch.equal(weights[name], tensor)] == []


def lacks(end: str) -> Callable[[Path], None]:
    def take(folder: Path) -> None:
        tensors = tensors_of(folder)
        del tensors[next(name for name in sorted(tensors) if name.endswith(end))]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return take


def says(**quantization: Any) -> Callable[[Path], None]:
    return lambda folder: store(folder, tensors_of(folder), **quantization)


@pytest.mark.parametrize(
    ("block", "change", "why"),
    [
        ((8, 8), lacks("_scale_inv"), "8-bit floats, and the files lack its scales"),
        ((8, 8), lacks("q_proj.weight"), "lacks the weights .*q_proj"),
        ((32, 32), None, r"shape \[32, 48\] has scales of shape \[1, 2\].*only whole blocks"),  # 32 and 16 columns
        ((20, 20), None, "only whole blocks"),
        ((8, 8), says(quant_method="fp8"), r"blocks of \[128, 128\]"),
        ((8, 8), says(quant_method="fp8", weight_block_size=None), "blocks of no size"),
        ((8, 8), says(quant_method="fp8", weight_block_size=[8]), "not two whole numbers"),
        ((8, 8), says(quant_method="fp8", weight_block_size=[8, 0]), "not two whole numbers"),
        ((8, 8), says(quant_method="fbgemm_fp8"), "quantized already .*fbgemm_fp8.*MXFP4 or FP8"),
        ((8, 8), says(quant_method=["fp8"]), "quantized already"),
    ],
)
def test_numbers_that_would_be_read_as_others_are_refused(
    block: tuple[int, int], change: Callable[[Path], None] | None, why: str, tmp_path: Path
) -> None:
    folder = make_folder(tmp_path / "m")
    in_floats(folder, block)
    if change is not None:
        change(folder)
    with pytest.raises(Refused, match=why):
        load(folder)


@pytest.mark.parametrize("model_type", ["olmo2", "llava", "llama"])
def test_scales_that_the_config_does_not_speak_of_are_refused(model_type: str, tmp_path: Path) -> None:
    """Without them the numbers would be other weights."""
    folder = make_folder(tmp_path / "m") if model_type == "llama" else tiny_folder(tmp_path / "m", model_type)
    in_floats(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(Refused, match=r"model\.name=.*scale_inv, but its config.json has no quantization_config"):
        load(folder)


@pytest.mark.parametrize("end", ["_blocks", "_scales"])
def test_half_of_a_matrix_in_mxfp4_is_refused(end: str, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m", "gpt_oss")
    in_mxfp4(folder)
    lacks(end)(folder)
    with pytest.raises(Refused, match=f"lack .*{end}, a part of a matrix in MXFP4"):
        load(folder)


@pytest.mark.parametrize("method", ["mxfp4", "fp8"])
def test_dense_weights_that_are_said_to_be_quantized_are_refused(method: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m")
    says(quant_method=method)(folder)
    with pytest.raises(Refused, match=f"quantized already .*{method}.* take quantization_config out"):
        load(folder)


def test_the_command_line_says_what_it_read(cli: Cli, tmp_path: Path) -> None:
    in_floats(make_folder(tmp_path / "m"))
    (tmp_path / "text.txt").write_text(story(1, 400))
    keys = ["model=hf", "model.name=m", "dataset=text", "dataset.path=text.txt", "dataset.seq_len=32",
            "dataset.calibration.n_samples=8", "measure=quality_only", "measure.max_windows=2", "method=wanda",
            "hydra.run.dir=run"]  # fmt: skip
    done = cli(*keys, "export=hf")
    assert done.returncode == 0, done.stderr
    assert "stored in 8-bit floats" in done.stdout + done.stderr
    assert load(tmp_path / "run" / "export").warnings == []
    done = cli(*keys, "model.stream=true")
    assert done.returncode == 2
    assert "has quantized weights: model.stream=true reads dense weights only" in done.stderr
