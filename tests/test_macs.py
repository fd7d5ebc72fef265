"""Multiply-accumulates by hand, and against PyTorch's own counter of operations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ALL_FAMILIES, CPU, make_folder
from torch.utils.flop_counter import FlopCounterMode

from prune_lab.compare import compute_figures
from prune_lab.measure.macs import Macs, count_macs
from prune_lab.methods.depth import Depth
from prune_lab.methods.structured import Structured
from prune_lab.models.anatomy import Anatomy
from prune_lab.models.load import HubModel, Loaded
from prune_lab.pruning.calibration import Calibrator

TOKENS = 20
# Hidden 32, 4 heads of 8, 2 KV groups, 48 channels, vocabulary 300.
BLOCK = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48  # q, k and v, o, the MLP


def counted(model: Any) -> float:
    """Multiply-accumulates per token of a forward pass over TOKENS tokens, by PyTorch's counter (2 to each)."""
    prompt = torch.randint(300, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    model.set_attn_implementation("eager")  # plain matrix products, which it knows
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=prompt, use_cache=False)
    return counter.get_total_flops() / 2 / TOKENS


def test_macs_by_hand(loaded: Loaded) -> None:
    attention = 2 * 10 * 32  # QK^T and AV, 10 tokens of context, 4 heads of 8
    total = 2 * (BLOCK + attention) + 32 * 300
    assert count_macs(Anatomy(loaded.model), 10) == Macs(total, total - 32)  # the padding token's row is zeros


def test_zeros_save_nothing_but_effective_macs(loaded: Loaded) -> None:
    dense = count_macs(Anatomy(loaded.model), 10)
    with torch.no_grad():
        loaded.model.model.layers[1].mlp.up_proj.weight[:7, :5] = 0
        loaded.model.lm_head.weight[0] = 0
        loaded.model.model.norm.weight.zero_()  # no Linear
    found = count_macs(Anatomy(loaded.model), 10)
    assert (found.total, found.effective) == (dense.total, dense.total - 7 * 5 - 32)
    assert compute_figures(dense, found) == {
        "compute/macs_per_token": dense.total,
        "compute/dense_macs_per_token": dense.total,
        "compute/effective_macs_per_token": dense.total - 67,
    }


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_macs_are_those_that_pytorch_counts(tmp_path: Path, family: str) -> None:
    model = HubModel(name=str(make_folder(tmp_path / family, family))).load(CPU, seed=0).model
    expected, found = counted(model), count_macs(Anatomy(model), TOKENS)
    assert found.total == pytest.approx(expected, rel=1e-9)
    padding = 32 if model.get_output_embeddings().weight[0].eq(0).all() else 0  # a tied padding row is made of zeros
    assert found.effective == found.total - padding


@pytest.mark.parametrize("units", ["mlp", "heads"])
def test_removed_units_are_no_longer_counted(tmp_path: Path, units: str) -> None:
    model = HubModel(name=str(make_folder(tmp_path / "model", "mistral"))).load(CPU, seed=0).model
    before = count_macs(Anatomy(model), TOKENS).total
    Structured(amount=0.5, units=(units,)).prune(Anatomy(model), 0.5, 0, None)
    gone = 3 * 32 * 24 if units == "mlp" else 2 * 16 * 32 + 2 * 8 * 32 + 2 * TOKENS * 16
    found = count_macs(Anatomy(model), TOKENS).total
    assert found == before - 2 * gone
    assert found == pytest.approx(counted(model), rel=1e-9)


def test_removed_blocks_are_no_longer_counted(loaded: Loaded) -> None:
    windows = torch.randint(300, (4, 16), generator=torch.Generator().manual_seed(1))
    Depth(amount=0.5).prune(Anatomy(loaded.model), 0.5, 0, Calibrator(windows))
    assert count_macs(Anatomy(loaded.model), 10).total == BLOCK + 2 * 10 * 32 + 32 * 300
