"""A Llama whose config refuses its number of query heads goes on as a Mistral, which computes what the Llama does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CPU, Cli, copied, logits, make_folder, story
from trainings import interrupted, same, training_of, weights_of
from transformers import AutoModelForCausalLM

from prune_lab.errors import Refused
from prune_lab.methods.structured import Structured
from prune_lab.models.anatomy import Anatomy
from prune_lab.models.export import check_reload, save_model
from prune_lab.models.load import HubModel, Loaded
from prune_lab.recovery.dropout import residual_dropout
from prune_lab.recovery.finetune import Finetune
from prune_lab.schedules import Iterative

# 8 query heads of 4 in 4 KV groups at hidden 32: 3 groups are 6 heads, and 32 % 6 is not 0.
SHAPE: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "another theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}},
    "llama3": {"rope_parameters": LLAMA3},
    "yarn": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0}},
    "a head of its own": {"tie_word_embeddings": False, "pretraining_tp": 2},
}


def llama(folder: Path, **changes: Any) -> Loaded:
    if not folder.exists():
        make_folder(folder, **SHAPE, **changes)
    return HubModel(name=str(folder)).load(CPU, seed=0)


@pytest.mark.parametrize("changes", ROPES.values(), ids=list(ROPES))
def test_a_mistral_computes_what_the_masked_llama_does(tmp_path: Path, changes: dict[str, Any]) -> None:
    cut = llama(tmp_path / "llama", **changes)
    masked = copied(cut)
    keys: dict[str, Any] = {"units": ("mlp", "heads"), "amount": 0.25}
    pruned = Structured(**keys).prune(Anatomy(cut.model), 0.25, 0)
    Structured(**keys, physical=False).prune(Anatomy(masked.model), 0.25, 0)
    assert any("the compressed model is a MistralForCausalLM" in note for note in pruned.warnings)
    save_model(cut, tmp_path / "export")
    check_reload(cut.model, tmp_path / "export", torch.tensor([[11, 250, 7, 93]]))
    again, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "export", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    config = again.config
    found = config.model_type, config.num_attention_heads, config.num_key_value_heads, config.head_dim
    assert found == ("mistral", 6, 3, 4)
    assert config.sliding_window is None
    assert config.rope_parameters == masked.model.config.rope_parameters
    assert not {"attention_bias", "mlp_bias", "pretraining_tp"} & config.to_dict().keys()
    wanted = logits(masked.model)
    torch.testing.assert_close(logits(again.eval()), wanted, atol=1e-6, rtol=0)
    torch.testing.assert_close(logits(cut.model), wanted, atol=1e-6, rtol=0)
    prompt = torch.tensor([[11, 250, 7, 93]])
    for cache in (True, False):  # generation goes past where llama3 and yarn begin to scale
        options = {"max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False, "use_cache": cache}
        attended = torch.ones_like(prompt)
        ids = [one.generate(prompt, attention_mask=attended, **options) for one in (again, masked.model)]
        assert torch.equal(*ids)


def test_a_count_that_a_llama_holds_leaves_it_a_llama(tmp_path: Path) -> None:
    loaded = llama(tmp_path / "llama")
    pruned = Structured(units=("heads",), amount=0.5).prune(Anatomy(loaded.model), 0.5, 0)
    assert type(loaded.model).__name__ == "LlamaForCausalLM"
    assert not pruned.warnings
    zeroed = llama(tmp_path / "llama")
    Structured(units=("heads",), amount=0.25, physical=False).prune(Anatomy(zeroed.model), 0.25, 0)
    assert type(zeroed.model).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize("setting", ["attention_bias", "mlp_bias"])
def test_biases_that_a_mistral_has_not_are_said(tmp_path: Path, setting: str) -> None:
    loaded = llama(tmp_path / "llama", **{setting: True})
    says = rf"3 of 4 KV groups.*hidden_size=32.*has no {setting}=True; possible are 1 .*2 .*4 \(amount=0\)"
    method = Structured(units=("heads",), amount=0.25)
    with pytest.raises(Refused, match=says):
        method.check(loaded.model.config, [0.25])
    with pytest.raises(Refused, match=says):
        method.check_model(Anatomy(loaded.model), [0.25])
    with pytest.raises(Refused, match=says):
        method.prune(Anatomy(loaded.model), 0.25, 0)
    assert loaded.model.config.num_attention_heads == 8


def test_what_a_mistral_computes_otherwise_is_refused_before_the_work(tmp_path: Path) -> None:
    """Tried on the model: here one whose frequencies are not those of its config."""
    loaded = llama(tmp_path / "llama")
    loaded.model.model.rotary_emb.inv_freq.mul_(3)
    method = Structured(units=("heads",), amount=0.25)
    with pytest.raises(Refused, match="as a mistral this model computes something else; give an amount"):
        method.check_model(Anatomy(loaded.model), [0.25])
    method.check_model(Anatomy(loaded.model), [0.5])
    assert type(loaded.model).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize("at", [10, 20], ids=["as a mistral", "with heads that a llama could hold again"])
def test_an_interrupted_training_goes_on_as_what_it_was(tmp_path: Path, at: int) -> None:
    """4, 3 and 2 KV groups: bit for bit the weights, the class and the notes that there are without interruption."""
    llama(tmp_path / "llama")
    recipe = Finetune(steps=24, batch_size=2, lr=0.01, checkpoint_every=9, validate_every=0, dropout=0.1)
    method = Structured(amount=0.5, units=("heads",))
    whole, cut, gone_on = interrupted(
        recipe, tmp_path / "llama", tmp_path, at, method=method, schedule=Iterative(start=0.25, rounds=2)
    )
    assert cut.saved == at // 9 * 9
    assert same(weights_of(whole.loaded.model), weights_of(gone_on.loaded.model))
    for ended in (whole, gone_on):
        assert type(ended.loaded.model).__name__ == "MistralForCausalLM"
        assert ended.loaded.model.config.num_key_value_heads == 2
        assert sum("is a MistralForCausalLM" in note for note in ended.training.pruned.warnings) == 1


def test_moments_of_the_optimizer_stay(tmp_path: Path) -> None:
    from prune_lab.recovery.optimizer import follow

    model = llama(tmp_path / "llama").model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters())
    model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step()
    with torch.no_grad():  # each weight's moment says where it was
        for weight in model.parameters():
            optimizer.state[weight]["exp_avg"].copy_(weight)
    pruned = Structured(amount=0.25, units=("heads",)).prune(Anatomy(model), 0.25, 0)
    follow(optimizer, model, pruned.cuts)
    assert {id(w) for group in optimizer.param_groups for w in group["params"]} == {id(w) for w in model.parameters()}
    assert all(torch.equal(optimizer.state[weight]["exp_avg"], weight) for weight in model.parameters())
    assert all(weight.requires_grad for weight in model.parameters())


def test_dropout_of_a_training_goes_on_in_a_mistral_and_ends(tmp_path: Path) -> None:
    model, tokens = llama(tmp_path / "llama").model, torch.arange(12)[None]
    with residual_dropout(model, 0.5):
        Structured(amount=0.25, units=("heads",)).prune(Anatomy(model), 0.25, 0)
        model.train()
        embedding = model.get_input_embeddings().weight.detach()
        assert (model.get_input_embeddings()(tokens) == 0).float().mean() > 0.3
        assert (embedding == 0).float().mean() < 0.1
        outputs = model.model.layers[1].mlp.down_proj(torch.ones(1, 48))
        assert (outputs == 0).float().mean() > 0.2
    assert (model.get_input_embeddings()(tokens) == 0).float().mean() < 0.1


def test_a_run_says_that_it_leaves_a_mistral(cli: Cli, tmp_path: Path) -> None:
    """In its summary, on its card and on the screen; its export can be pruned again, by the same counts."""
    llama(tmp_path / "llama")
    (tmp_path / "text.txt").write_text(story(1, 400))
    common = [
        "model=hf", "dataset=text", "dataset.path=text.txt", "dataset.seq_len=32", "dataset.calibration.n_samples=8",
        "measure=quality_only", "measure.max_windows=2", "method=structured", "method.units=[heads]", "export=hf",
        "tracking=none",
    ]  # fmt: skip
    done = cli(*common, f"model.name={tmp_path / 'llama'}", "amount=0.25", "hydra.run.dir=run")
    assert done.returncode == 0, done.stderr
    note = "the compressed model is a MistralForCausalLM"
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert sum(note in warning for warning in summary["warnings"]) == 1
    assert summary["model"]["family"] == "llama"
    assert note in (tmp_path / "run" / "export" / "README.md").read_text()
    assert note in " ".join((done.stdout + done.stderr).split())
    again = cli(*common, "model.name=run/export", "amount=0.34", "hydra.run.dir=again")
    assert again.returncode == 0, again.stderr
    config = json.loads((tmp_path / "again" / "export" / "config.json").read_text())
    assert (config["architectures"], config["num_key_value_heads"]) == (["MistralForCausalLM"], 2)


def test_a_training_has_the_mistral_from_the_pruning_on(tmp_path: Path) -> None:
    loaded = llama(tmp_path / "llama")
    kinds = list[str]()
    method = Structured(amount=0.25, units=("heads",))
    training = training_of(
        loaded, tmp_path, lambda step, values: kinds.append(type(loaded.model).__name__), method, Iterative(rounds=1),
        steps=4,
    )  # fmt: skip
    Finetune(steps=4, batch_size=2, validate_every=0).recover(loaded.model, training)
    assert set(kinds) == {"MistralForCausalLM"}
