"""Mixtures of experts in training, whose load balance is stock transformers'; and the mixture that is shipped."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CPU, Cli, make_folder
from model_types import tiny_folder
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from trainings import training_of, weights_of
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func as stock_balance

from prune_lab.errors import Refused
from prune_lab.measure.perplexity import measure_losses, quality_of
from prune_lab.models.load import TINY, TINY_MOE, HubModel, Loaded, Tiny, TinyMoe
from prune_lab.models.split import balanced, deal_out, split_channels
from prune_lab.recovery.context import TrainingContext
from prune_lab.recovery.distill import Distill
from prune_lab.recovery.finetune import Finetune
from prune_lab.recovery.losses import NO_BALANCE, Balance, balance_of, distillation_loss, next_token_loss
from prune_lab.recovery.optimizer import lr_factor
from prune_lab.recovery.order import WindowOrder
from prune_lab.system.console import Console
from prune_lab.text.stdlib import Stdlib
from prune_lab.text.tokens import Tokens

BATCH = torch.randint(4, 300, (3, 24), generator=torch.Generator().manual_seed(5))
# Of each way to a load balance: experts in every block, in some, with shared ones, with scaled logits, with the
# coefficient in a part of the config, under another name.
TYPES = {
    "mixtral": {"router_aux_loss_coef": 0.05},
    "jamba": {},
    "qwen2_moe": {},
    "granitemoe": {},
    "dbrx": {"ffn_config": {"moe_loss_weight": 0.05}},
    "jetmoe": {},
}
BITS_PER_BYTE = 1.30  # of the shipped mixture, at most, on the whole test split in windows of 256


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mixtures")


def loaded_of(place: Path, model_type: str) -> Loaded:
    """A small model of a type, to be changed."""
    folder = place / model_type
    made = folder if folder.exists() else tiny_folder(folder, model_type, **TYPES.get(model_type, {}))
    return HubModel(name=str(made)).load(CPU, seed=0)


def gradients(model: Any, total: Tensor) -> dict[str, Tensor]:
    """Gradients of a loss by every weight that has one."""
    model.zero_grad()
    total.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        largest = float(gradient.abs().max())
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6 * largest, msg=name)


def stock_loss(model: Any, batch: Tensor) -> Any:
    """Output of stock transformers, with the loss that has the routers' in it."""
    return model(input_ids=batch, labels=batch, output_router_logits=True)


@pytest.mark.parametrize("model_type", TYPES)
def test_the_loss_of_a_mixture_is_stocks(model_type: str, place: Path, tmp_path: Path) -> None:
    loaded = loaded_of(place, model_type)
    balance = balance_of(None, False, training_of(loaded, tmp_path))
    model = loaded.model.train().requires_grad_(True)
    stock, found = stock_loss(model, BATCH), next_token_loss(0, balance)(model, BATCH)
    assert found.balance is not None
    assert float(found.balance) == pytest.approx(stock.aux_loss.item())
    assert balance.coefficient * stock.aux_loss.item() > 1e-3  # so that it would be missed
    assert found.total.item() == pytest.approx(stock.loss.item(), abs=1e-5)
    same(gradients(model, found.total), gradients(model, stock.loss))


@pytest.mark.parametrize("model_type", ["mixtral", "jamba", "dbrx"])
def test_each_block_may_have_its_own_balance(model_type: str, place: Path) -> None:
    """Stock's own function on the router logits of one block at a time."""
    model = loaded_of(place, model_type).model.train().requires_grad_(True)
    output = stock_loss(model, BATCH)
    top_k = model.num_experts_per_tok
    blocks = [stock_balance((logits,), logits.shape[1], top_k) for logits in output.router_logits]
    assert len(blocks) > 1
    wanted = cross_entropy(output.logits[:, :-1].flatten(0, 1), BATCH[:, 1:].flatten()) + 0.3 * sum(blocks) / len(
        blocks
    )
    found = next_token_loss(0, Balance(0.3, by_block=True))(model, BATCH)
    assert found.total.item() == pytest.approx(wanted.item(), abs=1e-5)
    assert found.balance is not None
    assert found.balance.item() > output.aux_loss.item() + 1e-4  # blocks do not make up for each other
    same(gradients(model, found.total), gradients(model, wanted))


def test_under_autocast_the_load_balance_is_that_of_the_float32_model(place: Path) -> None:
    model = loaded_of(place, "mixtral").model.train().requires_grad_(True)
    wanted = next_token_loss(0, Balance(1.0))(model, BATCH)
    of_wanted = gradients(model, wanted.total)
    with torch.autocast("cpu", torch.bfloat16):
        found = next_token_loss(0, Balance(1.0))(model, BATCH)
    assert found.balance is not None
    assert wanted.balance is not None
    assert float(found.balance) == pytest.approx(float(wanted.balance), rel=0.02)
    of_found = gradients(model, found.total)
    for name in (f"model.layers.{block}.mlp.gate.weight" for block in range(3)):
        assert float(torch.cosine_similarity(of_found[name].flatten(), of_wanted[name].flatten(), 0)) > 0.9, name


def test_distillation_of_a_mixture_has_its_balance_too(place: Path, tmp_path: Path) -> None:
    student, teacher = loaded_of(place, "mixtral").model.requires_grad_(True), loaded_of(place, "mixtral").model
    of_text = gradients(student, distillation_loss(teacher, 2.0, 0.3)(student, BATCH).total)
    of_routers = gradients(student, stock_loss(student, BATCH).aux_loss)
    found = gradients(student, distillation_loss(teacher, 2.0, 0.3, balance=Balance(0.5))(student, BATCH).total)
    same(found, {name: of_text[name] + 0.5 * of_routers.get(name, torch.zeros(())) for name in of_text})
    training = training_of(loaded_of(place, "mixtral"), tmp_path)
    assert float(Distill().loss(training)(student, BATCH).balance) == stock_loss(student, BATCH).aux_loss.item()  # type: ignore[arg-type]


def test_the_loop_trains_a_mixture_as_a_plain_loop_does(place: Path, tmp_path: Path) -> None:
    """Stock's loss with labels in two parts of a batch, of unequal size, and torch's AdamW."""
    ours, bare = loaded_of(place, "mixtral"), loaded_of(place, "mixtral").model
    told: dict[int, dict[str, float]] = {}
    training = training_of(ours, tmp_path, told.__setitem__)
    recipe = Finetune(steps=3, lr=0.002, batch_size=3, accumulate=2, clip_norm=100.0, autocast="none", validate_every=0)
    recipe.recover(ours.model, training)

    bare.train().requires_grad_(True)
    matrices, others = ([w for w in bare.parameters() if (w.ndim > 1) == wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer, order = (
        torch.optim.AdamW(groups, betas=(0.9, 0.95)),
        WindowOrder(training.tokens.stream("train"), 32, 3, 0),
    )
    for step in range(3):
        for group in optimizer.param_groups:
            group["lr"] = 0.002 * lr_factor(step, 3, recipe.warmup, recipe.final_lr)
        optimizer.zero_grad()
        batch, losses, balances = order.batch(step), 0.0, 0.0
        for part, share in ((batch[:2], 2 / 3), (batch[2:], 1 / 3)):
            output = stock_loss(bare, part)
            (output.loss * share).backward()
            losses, balances = losses + share * output.loss.item(), balances + share * output.aux_loss.item()
        optimizer.step()
    assert told[3]["train/loss"] == pytest.approx(losses, rel=1e-5)
    assert told[3]["train/router_aux_loss"] == pytest.approx(balances, rel=1e-5)
    for name, weight in weights_of(bare).items():
        torch.testing.assert_close(weights_of(ours.model)[name], weight, rtol=0, atol=1e-6, msg=name)


def balance_in(training: TrainingContext, asked: float | None) -> tuple[Balance, list[str]]:
    return balance_of(asked, False, training), training.pruned.warnings


def test_where_there_is_no_load_balance_to_train_on(place: Path, folder: Path, tmp_path: Path) -> None:
    """A dense model has none, and Llama 4's class computes none whatever its config says; which is told."""
    mixtral, llama4 = (training_of(loaded_of(place, name), tmp_path) for name in ("mixtral", "llama4_text"))
    dense = training_of(HubModel(name=str(folder)).load(CPU, 0), tmp_path)
    assert balance_in(mixtral, None) == (Balance(0.05), [])
    assert balance_in(mixtral, 0.5) == (Balance(0.5), [])
    assert balance_in(mixtral, 0.0) == (NO_BALANCE, [])
    assert balance_in(dense, None) == balance_in(dense, 0.0) == (NO_BALANCE, [])
    balance, (note,) = balance_in(llama4, None)
    assert balance == NO_BALANCE
    assert "coefficient 0.001" in note
    assert "llama4_text" in note
    for training in (dense, llama4):
        with pytest.raises(Refused, match=r"recovery\.router_aux_loss=0\.1 .* type llama.*: give null"):
            balance_of(0.1, False, training)
    student = mixtral.dense.model
    without = Finetune(router_aux_loss=0.0).loss(mixtral)(student, BATCH)
    assert without.balance is None
    assert math.isclose(
        without.total.item(),
        stock_loss(student, BATCH).loss.item() - 0.05 * stock_loss(student, BATCH).aux_loss.item(),
        rel_tol=1e-6,
    )


# The shipped mixture, and where its training began.


def test_the_shipped_mixture_is_small_and_safe_and_has_the_dense_models_tokenizer() -> None:
    assert sum(path.stat().st_size for path in TINY_MOE.iterdir()) <= 8e6
    assert {path.suffix for path in TINY_MOE.iterdir()} == {".json", ".safetensors"}
    assert {tensor.dtype for tensor in load_file(TINY_MOE / "model.safetensors").values()} == {torch.bfloat16}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (TINY_MOE / name).read_bytes() == (TINY / name).read_bytes()


def test_the_shipped_mixture_has_the_dense_models_attention_and_eight_experts() -> None:
    loaded, dense = TinyMoe().load(CPU, seed=0), Tiny().config()
    config = loaded.model.config
    assert (loaded.name, loaded.family, loaded.licence) == ("tiny_moe", "mixtral", "apache-2.0")
    assert (config.num_local_experts, config.num_experts_per_tok) == (8, 2)
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
                 "vocab_size", "max_position_embeddings", "rms_norm_eps", "rope_parameters"):  # fmt: skip
        assert getattr(config, name) == getattr(dense, name), name
    assert config.router_aux_loss_coef > 0


def tokens_of_experts(model: Any, windows: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Losses of each window, and the share of routed tokens that each expert has, by block: its router's own choice."""
    shares, hooks = list[Tensor](), list[Any]()
    for router in (block.mlp.gate for block in model.model.layers):
        share = torch.zeros(len(router.weight))
        shares.append(share)

        def count(module: Any, inputs: Any, output: Any, share: Tensor = share) -> None:
            share += torch.bincount(output[2].flatten(), minlength=len(share))

        hooks.append(router.register_forward_hook(count))
    losses = measure_losses(model, windows, 16, CPU, Console(quiet=True))
    for hook in hooks:
        hook.remove()
    return losses, [share / share.sum() for share in shares]


@pytest.mark.parametrize("count", [48, pytest.param(10**6, marks=pytest.mark.slow)])
def test_the_shipped_mixture_is_trained_and_uses_every_expert(count: int) -> None:
    """On windows spread over the test split, or on all; other Pythons have slightly other text."""
    loaded = TinyMoe().load(CPU, seed=0)
    tokens = Tokens(Stdlib().corpus(), loaded.tokenizer)
    windows = tokens.windows("test", 256)
    spread = windows[torch.linspace(0, len(windows) - 1, min(count, len(windows))).long()]
    losses, shares = tokens_of_experts(loaded.model, spread)
    quality = quality_of(losses, tokens.bytes_per_token("test"))
    assert 0.9 < quality.bits_per_byte < (BITS_PER_BYTE if count > len(windows) else BITS_PER_BYTE + 0.1)
    assert len(shares) == 6
    for share in shares:
        assert len(share) == 8
        assert share.min() >= 1 / 32


def test_channels_are_dealt_out_to_experts_of_equal_size_by_what_they_read() -> None:
    generator = torch.Generator().manual_seed(0)
    directions = torch.eye(5)[torch.arange(20) % 4]  # four rows along one direction, four along another ...
    rows = directions * torch.rand(20, 1, generator=generator) + 0.01 * torch.randn(20, 5, generator=generator)
    owners = deal_out(rows, 4)
    assert sorted(owners.tolist()) == sorted([0, 1, 2, 3] * 5)
    for first in range(4):
        assert len(set(owners[first::4].tolist())) == 1
    assert torch.equal(deal_out(rows, 4), owners)
    assert deal_out(torch.ones(6, 5), 3).bincount().tolist() == [2, 2, 2]


def test_a_router_is_moved_until_every_expert_has_as_many_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(4000, 16, generator=generator) + 1
    router = torch.randn(8, 16, generator=generator)
    before, after = (
        (inputs @ rows.T).topk(2).indices.flatten().bincount(minlength=8) / 8000
        for rows in (router, balanced(router, inputs, 2))
    )
    assert before.min() < 0.05
    assert after.min() > 0.11
    assert after.max() < 0.14


@pytest.mark.parametrize(("experts", "top_k", "missed"), [(1, 1, 1e-3), (4, 2, 0.4)])
@torch.no_grad()
def test_experts_begin_as_what_the_dense_mlp_adds(experts: int, top_k: int, missed: float, tmp_path: Path) -> None:
    """One expert of all channels is the dense MLP; two of four miss 0.36 of it on other text, and 0.5 without a fit."""
    dense = HubModel(name=str(make_folder(tmp_path / "dense"))).load(CPU, 0).model
    generator = torch.Generator().manual_seed(6)
    windows, others = (torch.randint(4, 300, (16, 64), generator=generator) for _ in range(2))
    shape = {**dense.config.to_dict(), "model_type": "mixtral", "sliding_window": None}
    shape |= {"num_local_experts": experts, "num_experts_per_tok": top_k, "intermediate_size": 48 // experts}
    mixture = MixtralForCausalLM(MixtralConfig(**shape)).eval()
    split_channels(dense, mixture, windows)
    for name, weight in mixture.named_parameters():
        assert ".mlp." in name or torch.equal(weight, dense.get_parameter(name))
    states = dense(input_ids=others, output_hidden_states=True).hidden_states
    for sparse, full, entering in zip(mixture.model.layers, dense.model.layers, states, strict=False):
        inputs = full.post_attention_layernorm(entering)
        wanted = full.mlp(inputs)
        assert float((sparse.mlp(inputs) - wanted).square().sum() / wanted.square().sum()) < missed


def test_the_shipped_mixture_is_pruned_as_any_model_is(cli: Cli, corpus: Path, tmp_path: Path) -> None:
    done = cli("model=tiny_moe", "method=wanda", "amount=0.5", "dataset=text", f"dataset.path={corpus}",
               "dataset.seq_len=32", "dataset.calibration.n_samples=8", "measure=quality_only",
               "measure.max_windows=4", "tracking=none", "hydra.run.dir=run", HF_HUB_OFFLINE="1")  # fmt: skip
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert (summary["model"]["name"], summary["metrics"]["amount/realized"]) == ("tiny_moe", 0.5)
    assert summary["metrics"]["size/dense_disk_mb"] < 16
