"""Sparse weights as bitmask and values: the layout by hand, nothing lost, and what it costs in bytes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CPU, Cli, make_folder
from safetensors.torch import load_file, save_file

from prune_lab.errors import Refused
from prune_lab.export.bitmask import Bitmask
from prune_lab.models.anatomy import Anatomy
from prune_lab.models.export import check_reload, save_model
from prune_lab.models.load import HubModel, Loaded
from prune_lab.models.low_bit.bitmask import FILE, compress, compress_folder, expand

TOKENS = torch.arange(24)[None]


def write(loaded: Loaded, folder: Path) -> None:
    folder.mkdir()
    Bitmask().write(loaded, folder)


def test_the_layout_by_hand() -> None:
    """Ten weights, row by row: 0 5 0 0 0 0 0 0 | 0 -2."""
    matrix = torch.tensor([[0.0, 5, 0, 0, 0], [0, 0, 0, 0, -2]])
    stored = compress("w", matrix)
    assert {name: tensor.tolist() for name, tensor in stored.items()} == {
        "w.bitmask": [0b10, 0b10],
        "w.values": [5.0, -2.0],
        "w.shape": [2, 5],
    }
    assert (stored["w.bitmask"].dtype, stored["w.values"].dtype) == (torch.uint8, torch.float32)


@pytest.mark.parametrize(
    ("zeros", "dtype"),
    [(0.0, torch.float32), (0.1, torch.bfloat16), (0.5, torch.float32), (0.5, torch.float16), (0.9, torch.bfloat16),
     (1.0, torch.float32)],
)  # fmt: skip
def test_nothing_is_lost_and_no_byte_is_added(zeros: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(13, 29, generator=generator).to(dtype)
    matrix[torch.rand(13, 29, generator=generator) < zeros] = 0
    stored = compress("a.weight", matrix)
    again = expand(stored)
    assert list(again) == ["a.weight"]
    assert again["a.weight"].dtype == dtype
    assert torch.equal(again["a.weight"], matrix)
    held = sum(tensor.nbytes for name, tensor in stored.items() if not name.endswith(".shape"))
    element = matrix.element_size()
    assert held == min(matrix.nbytes, -(-13 * 29 // 8) + int((matrix != 0).sum()) * element)


def test_vectors_are_left_alone() -> None:
    assert list(compress("norm.weight", torch.zeros(40))) == ["norm.weight"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda stored: stored.pop("w.values"), "lacks w.values"),
        (lambda stored: stored.update({"w.values": torch.ones(3)}), "do not fit"),
        (lambda stored: stored.update({"w.shape": torch.tensor([9, 9])}), "do not fit"),
    ],
)
def test_what_does_not_fit_is_no_weight(change: object, says: str) -> None:
    stored = compress("w", torch.tensor([[0.0, 5, 0, 0, 0], [0, 0, 0, 0, -2]]))
    change(stored)  # type: ignore[operator]
    with pytest.raises(ValueError, match=says):
        expand(stored)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_neox"])
def test_a_folder_reads_back_as_the_model(tmp_path: Path, family: str) -> None:
    loaded = HubModel(name=str(make_folder(tmp_path / "made", family))).load(CPU, seed=0)
    with torch.no_grad():
        for _, linear in Anatomy(loaded.model).linears():
            linear.weight[torch.rand_like(linear.weight) < 0.7] = 0
    save_model(loaded, tmp_path / "dense")
    write(loaded, tmp_path / "export")
    check_reload(loaded.model, tmp_path / "export", TOKENS)
    again = HubModel(name=str(tmp_path / "export")).load(CPU, seed=0).model.state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in loaded.model.state_dict().items())
    assert [path.name for path in (tmp_path / "export").glob("*.safetensors")] == [FILE]
    sizes = [sum(p.stat().st_size for p in (tmp_path / n).glob("*.safetensors")) for n in ("export", "dense")]
    assert sizes[0] < sizes[1]


def test_shards_become_one_file(tmp_path: Path, folder: Path) -> None:
    loaded = HubModel(name=str(folder)).load(CPU, seed=0)
    loaded.model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    loaded.tokenizer.save_pretrained(tmp_path / "shards")
    compress_folder(tmp_path / "shards")
    assert [path.name for path in (tmp_path / "shards").glob("model*")] == [FILE]
    check_reload(loaded.model, tmp_path / "shards", TOKENS)


def test_a_damaged_file_is_refused(tmp_path: Path, folder: Path) -> None:
    loaded = HubModel(name=str(folder)).load(CPU, seed=0)
    with torch.no_grad():
        for _, linear in Anatomy(loaded.model).linears():
            linear.weight[:, ::2] = 0
    write(loaded, tmp_path / "export")
    stored = load_file(tmp_path / "export" / FILE)
    lost = next(name for name in stored if name.endswith(".values"))
    del stored[lost]
    save_file(stored, tmp_path / "export" / FILE, metadata={"format": "pt"})
    with pytest.raises(Refused, match=f"lacks {lost}"):
        HubModel(name=str(tmp_path / "export")).load(CPU, seed=0)


def test_stock_transformers_finds_no_weights_rather_than_wrong_ones(tmp_path: Path, folder: Path) -> None:
    write(HubModel(name=str(folder)).load(CPU, seed=0), tmp_path / "export")
    code = "import sys; from transformers import AutoModelForCausalLM as A; A.from_pretrained(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "export"], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "no file named model.safetensors" in done.stderr


def test_the_run_counts_the_bytes_of_the_file(cli: Cli, small: list[str], tmp_path: Path) -> None:
    run = ["method=magnitude", "amount=0.7", "measure=quality_only", "tracking=none"]
    figures = {}
    for export in ("none", "bitmask"):
        done = cli(*small, *run, f"export={export}", f"hydra.run.dir={export}")
        assert done.returncode == 0, done.stderr
        figures[export] = json.loads((tmp_path / export / "summary.json").read_text())["metrics"]
    file = tmp_path / "bitmask" / "export" / FILE
    assert figures["bitmask"]["size/disk_mb"] * 1e6 == pytest.approx(file.stat().st_size)
    assert figures["bitmask"]["size/disk_mb"] < figures["none"]["size/disk_mb"]
    for name in ("quality/perplexity", "params/nonzero", "memory/weights_mb", "size/dense_disk_mb"):
        assert figures["bitmask"][name] == figures["none"][name]
