"""Choices of experts beside the dense model's, and the weights that a token reads, both counted by hand."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CPU
from model_types import tiny_folder
from torch import Tensor
from trainings import interrupted

from prune_lab.measure.routing import SameExperts
from prune_lab.measure.size import measure_size
from prune_lab.methods.experts import Experts
from prune_lab.models.anatomy import Anatomy
from prune_lab.models.load import HubModel, Loaded
from prune_lab.models.resize import keep_blocks, original_experts
from prune_lab.pruning.calibration import Calibrator
from prune_lab.pruning.pruned import Pruned
from prune_lab.recovery.finetune import Finetune
from prune_lab.schedules import OneShot

WINDOWS = torch.randint(4, 300, (6, 24), generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mixtral of four experts in each block, two for a token."""
    return tiny_folder(tmp_path_factory.mktemp("routing") / "mixtral", "mixtral")


def load(folder: Path) -> Loaded:
    return HubModel(name=str(folder)).load(CPU, seed=0)


def prune(loaded: Loaded, amount: float) -> Pruned:
    return Experts(amount=amount).prune(Anatomy(loaded.model), amount, 0, Calibrator(WINDOWS))


@torch.no_grad()
def chosen_by(model: Any) -> Tensor:
    """Experts of every token of WINDOWS by the router's own logits, (blocks, tokens, 2)."""
    logits = model(input_ids=WINDOWS, output_router_logits=True, use_cache=False).router_logits
    return torch.stack([of_block.topk(2, dim=-1).indices for of_block in logits])


def same_by_hand(dense: Tensor, other: Tensor) -> float:
    """Of the first's choices the share that the second has, token by token."""
    pairs = [(set(a.tolist()), set(b.tolist())) for a, b in zip(dense.flatten(0, 1), other.flatten(0, 1), strict=True)]
    return sum(len(a & b) for a, b in pairs) / sum(len(a) for a, _ in pairs)


@torch.no_grad()
def share_of(loaded: Loaded, dense: Loaded, windows: int = len(WINDOWS), size: int = 2) -> float | None:
    same = SameExperts(windows * WINDOWS.shape[1])
    with same.watching(loaded.model, dense.model):
        for batch in WINDOWS.split(size):
            loaded.model(input_ids=batch, use_cache=False)
            dense.model(input_ids=batch, use_cache=False)
    return same.share


def test_choices_that_are_the_same_by_hand(mixtral: Path) -> None:
    dense, loaded = load(mixtral), load(mixtral)
    assert share_of(loaded, dense) == 1
    for amount in (0.25, 0.5):  # one after the other: the second is of what the first left
        prune(loaded, amount)
        kept = original_experts(Anatomy(loaded.model))
        found = torch.stack([torch.tensor(kept[block])[of] for block, of in enumerate(chosen_by(loaded.model))])
        wanted = same_by_hand(chosen_by(dense.model), found)
        assert 0.3 < wanted < 1
        assert share_of(loaded, dense) == pytest.approx(wanted)


def test_what_fills_up_a_batch_is_not_counted(mixtral: Path) -> None:
    dense, loaded = load(mixtral), load(mixtral)
    prune(loaded, 0.5)
    shares = {share_of(loaded, dense, windows=3, size=size) for size in (1, 3, 4, 6)}
    assert len(shares) == 1
    assert shares != {share_of(loaded, dense)}


def test_choices_of_blocks_that_are_gone_are_not_made(mixtral: Path) -> None:
    dense, loaded = load(mixtral), load(mixtral)
    last = len(Anatomy(dense.model).blocks) - 1
    keep_blocks(Anatomy(loaded.model), [last])
    here, there = chosen_by(dense.model), chosen_by(loaded.model)
    wanted = same_by_hand(here[last:], there) / (last + 1)
    assert share_of(loaded, dense) == pytest.approx(wanted)


def test_a_model_without_experts_has_no_choices(folder: Path) -> None:
    assert share_of(load(folder), load(folder)) is None


def test_the_table_of_experts_has_the_dense_models_numbers(mixtral: Path) -> None:
    loaded = load(mixtral)
    prune(loaded, 0.25)
    kept = original_experts(Anatomy(loaded.model))
    second = prune(loaded, 0.5)
    rows = list(csv.DictReader(io.StringIO(second.files["experts.csv"].decode())))
    assert [int(row["expert"]) for row in rows if row["block"] == "0"] == kept[0]
    tokens = [int(row["tokens"]) for row in rows]
    assert second.metrics == {
        "experts/least_tokens": min(tokens), "experts/under_128_tokens": sum(n < 128 for n in tokens),
    }  # fmt: skip


def test_what_was_found_of_experts_outlives_an_interruption(mixtral: Path, tmp_path: Path) -> None:
    recipe = Finetune(steps=24, batch_size=2, lr=0.01, checkpoint_every=9, validate_every=0)
    whole, cut, gone_on = interrupted(
        recipe, mixtral, tmp_path, 20, method=Experts(amount=0.5, score="reap"), schedule=OneShot()
    )
    assert cut.saved == 18
    models = [Anatomy(ended.loaded.model) for ended in (whole, gone_on)]
    assert original_experts(models[0]) == original_experts(models[1]) != {}
    assert whole.training.pruned.files["experts.csv"] == gone_on.training.pruned.files["experts.csv"]
    assert whole.training.pruned.metrics == gone_on.training.pruned.metrics != {}


def test_weights_that_a_token_reads_by_hand(mixtral: Path, folder: Path) -> None:
    mixture = load(mixtral).model
    experts = [p for name, p in mixture.named_parameters() if ".experts." in name]
    table = mixture.model.embed_tokens.weight
    assert mixture.lm_head.weight is not table
    wanted = 4 * (sum(p.numel() for p in mixture.parameters()) - sum(p.numel() for p in experts) // 2)
    wanted -= 4 * (table.numel() - table.shape[1])
    buffers = sum(b.nbytes for b in mixture.buffers())
    assert measure_size(mixture, []).read_mb * 1e6 == pytest.approx(wanted + buffers)
    tied = load(folder).model  # a head that is the table is read whole
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert measure_size(tied, []).read_mb == measure_size(tied, []).weights_mb
