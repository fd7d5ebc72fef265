"""model.stream=true: the same figures and the same files, with one block in memory at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ALL_FAMILIES, CPU, make_folder

from prune_lab.console import Console
from prune_lab.device import Device
from prune_lab.export import check_reload, save_model
from prune_lab.measure.macs import count_macs
from prune_lab.measure.perplexity import measure_quality
from prune_lab.measure.size import measure_size
from prune_lab.methods.base import Method
from prune_lab.methods.magnitude import Magnitude
from prune_lab.methods.none import NoPruning
from prune_lab.methods.random import Random
from prune_lab.methods.ria import Ria
from prune_lab.methods.sparsegpt import SparseGPT
from prune_lab.methods.wanda import Wanda
from prune_lab.models.anatomy import Anatomy
from prune_lab.models.load import HubModel, Loaded
from prune_lab.models.on_disk import own_copy
from prune_lab.pruning.calibration import Calibrator

WINDOWS = torch.randint(1, 300, (5, 24), generator=torch.Generator().manual_seed(7))
BF16 = Device(torch.device("cpu"), torch.bfloat16)
TURNS = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 6, "num_hidden_layers": 4}
CHANGES: dict[str, dict[str, Any]] = {"gemma2": TURNS, "gemma3_text": TURNS}  # their blocks attend in two ways


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small model of each family, and a Llama whose head is its own."""
    place = tmp_path_factory.mktemp("streamed")
    found = {family: make_folder(place / family, family, **CHANGES.get(family, {})) for family in ALL_FAMILIES}
    return found | {"untied": make_folder(place / "untied", "llama", tie_word_embeddings=False)}


def compressed(folder: Path, method: Method, place: Path, stream: bool, propagate: str, device: Device) -> Any:
    """Prunes, measures and saves a model as a run does; its figures, what was removed, and where it was saved."""
    dense = HubModel(name=str(folder), stream=stream).load(device, seed=0)
    loaded = Loaded(own_copy(dense.model, place / "weights"), dense.tokenizer, dense.name, dense.family)
    calibrator = Calibrator(WINDOWS, propagate, batch_size=2) if method.calibrated else None
    pruned = method.prune(Anatomy(loaded.model), method.amount, 0, calibrator)
    quality = [measure_quality(m, WINDOWS, 3.0, 2, device, Console(quiet=True)) for m in (dense.model, loaded.model)]
    save_model(loaded, place / "export")
    check_reload(loaded.model, place / "export", WINDOWS[:1])
    size, macs = measure_size(loaded.model, place / "export"), count_macs(Anatomy(loaded.model), 16)
    hashes = dense.fingerprint(), loaded.fingerprint()
    return (quality, size, macs, pruned.rows, pruned.notes, hashes, dense.facts()), place / "export"


def check_alike(folder: Path, place: Path, method: Method, propagate: str = "pruned", device: Device = CPU) -> None:
    """Streamed and in memory: equal figures, equal files, byte for byte."""
    here, saved_here = compressed(folder, method, place / "memory", False, propagate, device)
    there, saved_there = compressed(folder, method, place / "disk", True, propagate, device)
    assert here == there
    files = sorted(path.name for path in saved_here.iterdir())
    assert files == sorted(path.name for path in saved_there.iterdir())
    for name in files:
        assert (saved_here / name).read_bytes() == (saved_there / name).read_bytes(), name


@pytest.mark.parametrize("family", [*ALL_FAMILIES, "untied"])
def test_every_family_streams_to_the_same_files(folders: dict[str, Path], tmp_path: Path, family: str) -> None:
    check_alike(folders[family], tmp_path, Wanda(amount=0.5))


@pytest.mark.parametrize(
    ("method", "propagate"),
    [
        (Magnitude(amount=0.4), "pruned"),
        (Magnitude(amount=0.5, pattern="2:4"), "pruned"),
        (Random(amount=0.5), "pruned"),
        (Wanda(amount=0.5), "dense"),
        (Wanda(amount=0.5, allocation="owl"), "pruned"),
        (Ria(amount=0.5), "pruned"),
        (SparseGPT(amount=0.5), "pruned"),
        (SparseGPT(amount=0.5), "dense"),
        (NoPruning(), "pruned"),
    ],
    ids=str,
)
def test_every_streamed_method_gives_the_same_files(
    folders: dict[str, Path], tmp_path: Path, method: Method, propagate: str
) -> None:
    check_alike(folders["qwen2"], tmp_path, method, propagate)
