"""Channels of the hidden size: what is left is the model with zeros in their place, by Minitron's score, refitted."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CPU, Cli, copied, logits, make_folder, story
from model_types import tiny_folder
from torch import Tensor
from trainings import interrupted, same, weights_of
from transformers import AutoModelForCausalLM

from prune_lab.errors import Refused
from prune_lab.measure.macs import count_macs
from prune_lab.measure.size import kv_cache_bytes
from prune_lab.methods.structured import Structured
from prune_lab.models.anatomy import Anatomy
from prune_lab.models.export import check_reload, save_model
from prune_lab.models.load import HubModel, Loaded
from prune_lab.pruning.calibration import Calibrator
from prune_lab.pruning.hidden import add_magnitudes
from prune_lab.pruning.pruned import Pruned
from prune_lab.recovery.finetune import Finetune
from prune_lab.recovery.optimizer import follow
from prune_lab.schedules import Iterative
from prune_lab.system.device import Device

WINDOWS = torch.randint(4, 300, (6, 24), generator=torch.Generator().manual_seed(7))
HIDDEN = 32
# Without an epsilon to speak of, so that nothing but rounding is between a cut model and one with zeros.
EXACT = {"rms_norm_eps": 1e-12}
WIDE = {"num_attention_heads": 8, "head_dim": 8}  # more rows in q than channels of the states
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama with a head of its own": ("llama", {"tie_word_embeddings": False}),
    "llama as wide everywhere": ("llama", {"intermediate_size": HIDDEN}),
    "llama with wide heads": ("llama", WIDE),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 8}),
    "phi3": ("phi3", {}),
    "gemma": ("gemma", {"head_dim": 8}),
    "gemma with a head of its own": ("gemma", {"head_dim": 8, "tie_word_embeddings": False}),
    "gemma2": ("gemma2", {"head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0}),
    "gemma3_text": ("gemma3_text", {"head_dim": 8, "query_pre_attn_scalar": 8}),
}


def load(place: Path, variant: str = "llama", **changes: Any) -> Loaded:
    family, own = VARIANTS[variant]
    if not place.exists():
        make_folder(place, family, **{**EXACT, **own, **changes})
    loaded = HubModel(name=str(place)).load(CPU, seed=0)
    loaded.model.config.pad_token_id = None
    return loaded


def method(**keys: Any) -> Structured:
    return Structured(**{"units": ("hidden",), "amount": 0.25, "score": "minitron", **keys})


def prune(loaded: Loaded, **keys: Any) -> Pruned:
    made = method(**keys)
    made.check_model(Anatomy(loaded.model), [made.amount])
    return made.prune(Anatomy(loaded.model), made.amount, 0, Calibrator(WINDOWS))


@torch.no_grad()
def inputs_of(model: Any, names: list[str], windows: Tensor = WINDOWS) -> dict[str, Tensor]:
    """Inputs of Linears, (windows, tokens, in)."""
    found: dict[str, Tensor] = {}

    def note(name: str, args: Any) -> None:
        found[name] = args[0].clone()

    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: note(name, args))
        for name in names
    ]
    model(input_ids=windows, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


def kept_of(dense: Any, cut: Any) -> Tensor:
    """The channels that stayed, by the columns of the embeddings."""
    was, now = (model.get_input_embeddings().weight.detach() for model in (dense, cut))
    if "gemma" in dense.config.model_type:  # it embeds times the root of the hidden size
        now = now * (cut.config.hidden_size / dense.config.hidden_size) ** 0.5
        near = torch.stack([(was - column[:, None]).abs().amax(0) for column in now.T])
        assert near.amin(1).max() < 1e-6
        return near.argmin(1)
    return torch.tensor([int((was == column[:, None]).all(0).nonzero()[0, 0]) for column in now.T])


@torch.no_grad()
def zero_by_hand(model: Any, gone: list[int]) -> None:
    """Zeroes what writes channels of the states: columns of the embedding, rows and biases of o_proj and down_proj.

    Whatever the matrices that read them hold there, they read zeros.
    """
    untied = model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight.clone()
    model.get_input_embeddings().weight[:, gone] = 0
    assert untied == torch.equal(model.get_output_embeddings().weight, head)
    for block in model.model.layers:
        for writer in (block.self_attn.o_proj, block.mlp.down_proj):
            writer.weight[gone] = 0
            if writer.bias is not None:
                writer.bias[gone] = 0


def test_the_score_is_minitrons() -> None:
    """Two windows of two tokens and three channels; the figures are from the definition, worked out by hand."""
    states = torch.tensor([[[1.0, -2, 0], [3, 0, 1]], [[-1, 1, 2], [1, 3, -2]]])
    sums = torch.zeros(3)
    add_magnitudes(sums, states)
    torch.testing.assert_close(sums.sqrt(), torch.tensor([2.236068, 2.236068, 2.061553]))
    one_by_one = torch.zeros(3)
    for window in states:
        add_magnitudes(one_by_one, window[None])
    torch.testing.assert_close(one_by_one, sums)


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_channels_of_lowest_score_go(tmp_path: Path, batch_size: int) -> None:
    """The score is summed over the inputs of attention and MLP of each block, not over the last norm's outputs."""
    dense = load(tmp_path / "m")
    cut = copied(dense)
    names = [f"model.layers.{block}.{name}" for block in (0, 1) for name in ("self_attn.k_proj", "mlp.up_proj")]
    score = [0.0] * HIDDEN
    for states in inputs_of(dense.model, names).values():
        for channel in range(HIDDEN):
            means = [float(window[:, channel].abs().mean()) for window in states]
            score[channel] += sum(mean**2 for mean in means) ** 0.5
    wanted = sorted(sorted(range(HIDDEN), key=lambda channel: score[channel])[8:])
    method().prune(Anatomy(cut.model), 0.25, 0, Calibrator(WINDOWS, batch_size=batch_size))
    assert kept_of(dense.model, cut.model).tolist() == wanted


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_cut_model_is_the_model_with_zeros_in_their_place(tmp_path: Path, variant: str) -> None:
    dense = load(tmp_path / "m", variant)
    cut, masked = copied(dense), copied(dense)
    pruned = prune(cut)
    gone = sorted(set(range(HIDDEN)) - set(kept_of(dense.model, cut.model).tolist()))
    assert len(gone) == 8
    zero_by_hand(masked.model, gone)
    wanted = logits(masked.model)
    torch.testing.assert_close(logits(cut.model), wanted, atol=2e-5, rtol=1e-4)
    assert (wanted - logits(dense.model)).abs().max() > 0.01
    # In stock transformers, with its heads as they were.
    save_model(cut, tmp_path / "export")
    check_reload(cut.model, tmp_path / "export", WINDOWS[:1])
    again, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "export", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    torch.testing.assert_close(logits(again.eval()), logits(cut.model), atol=1e-6, rtol=0)
    was, now = dense.model.config, again.config
    assert now.hidden_size == 24
    heads = "num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size"
    assert [getattr(now, field) for field in heads] == [getattr(was, field) for field in heads]
    assert now.head_dim == (getattr(was, "head_dim", None) or HIDDEN // 4)
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    prompt = {"input_ids": WINDOWS[:1, :5], "attention_mask": torch.ones(1, 5)}
    ids = [again.generate(**prompt, use_cache=cache, **options) for cache in (True, False)]
    assert torch.equal(*ids)
    # A row of the table has what left its module.
    for row in pruned.rows:
        before, after = (sum(p.numel() for p in m.model.get_submodule(row.layer).parameters()) for m in (dense, cut))
        assert row.removed == before - after, row
    sizes = [sum(p.numel() for p in loaded.model.parameters()) for loaded in (dense, cut)]
    assert sum(row.removed for row in pruned.rows) == sizes[0] - sizes[1]
    assert pruned.realized == pytest.approx(0.25)
    if "llama" in variant:
        assert kv_cache_bytes(Anatomy(cut.model)) == kv_cache_bytes(Anatomy(dense.model))
        linears = sum(m.weight.numel() for m in again.modules() if isinstance(m, torch.nn.Linear))
        attention = 2 * 10 * sum(block.self_attn.o_proj.in_features for block in again.model.layers)
        assert count_macs(Anatomy(cut.model), 10).total == linears + attention


@pytest.mark.parametrize("tie", [True, False])
def test_a_number_that_a_llama_cannot_hold_makes_a_mistral(tmp_path: Path, tie: bool) -> None:
    """4 heads divide 32 and not 26."""
    dense = load(tmp_path / "m", tie_word_embeddings=tie)
    cut, masked = copied(dense), copied(dense)
    pruned = prune(cut, amount=6 / 32)
    assert any("the compressed model is a MistralForCausalLM" in note for note in pruned.warnings)
    zero_by_hand(masked.model, sorted(set(range(HIDDEN)) - set(kept_of(dense.model, cut.model).tolist())))
    save_model(cut, tmp_path / "export")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32).eval()
    assert (again.config.model_type, again.config.hidden_size, again.config.head_dim) == ("mistral", 26, 8)
    torch.testing.assert_close(logits(again), logits(masked.model), atol=2e-5, rtol=1e-4)
    with_biases = load(tmp_path / "b", "llama with biases")
    with pytest.raises(
        Refused, match=r"leaves 26 of 32 channels.*attention_bias=True; possible are .*24 \(amount=0.25"
    ):
        method(amount=6 / 32).check_model(Anatomy(with_biases.model), [6 / 32])


@pytest.mark.parametrize(("round_to", "kept"), [(None, 26), (8, 24), (16, 32), (1, 26)])
def test_round_to_keeps_a_multiple(tmp_path: Path, round_to: int | None, kept: int) -> None:
    loaded = load(tmp_path / "m", "mistral")
    pruned = prune(loaded, amount=0.2, round_to=round_to, score="random")
    assert loaded.model.config.hidden_size == kept
    assert pruned.realized == pytest.approx(1 - kept / HIDDEN)


def solved_by_hand(of_dense: Tensor, of_cut: Tensor, weight: Tensor, kept: Tensor) -> Tensor:
    """Least squares in float64, the ridge as further rows: |X W^T - X' W'^T|^2 + ridge |W' - W_K|^2."""
    x, smaller = (states.flatten(0, 1).double() for states in (of_dense, of_cut))
    ridge = 0.01 * smaller.square().sum(0).mean()
    rows = torch.cat([smaller, ridge.sqrt() * torch.eye(len(kept), dtype=torch.float64)])
    wanted = torch.cat([x @ weight.double().T, ridge.sqrt() * weight[:, kept].double().T])
    return torch.linalg.lstsq(rows, wanted).solution.T


@pytest.mark.parametrize("variant", ["llama", "llama with biases", "llama with a head of its own", "phi3"])
def test_the_refit_is_least_squares(tmp_path: Path, variant: str) -> None:
    """Of the first attention, whose states are the embedding's in both models; the head where it is not tied."""
    dense = load(tmp_path / "m", variant)
    cut, refitted = copied(dense), copied(dense)
    prune(cut)
    notes = prune(refitted, refit="inputs").warnings
    kept = kept_of(dense.model, cut.model)
    attention = "model.layers.0.self_attn."
    for name in ("qkv_proj",) if variant == "phi3" else ("q_proj", "k_proj", "v_proj"):
        before, after = (inputs_of(m.model, [attention + name])[attention + name] for m in (dense, cut))
        weight = dense.model.get_submodule(attention + name).weight
        wanted = solved_by_hand(before, after, weight, kept).float()
        found = refitted.model.get_submodule(attention + name).weight
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-3)
        assert (found - weight[:, kept]).abs().max() > 0.01
    head, was = refitted.model.lm_head.weight, dense.model.lm_head.weight[:, kept]
    is_tied = dense.model.config.tie_word_embeddings
    assert torch.equal(head, was) == is_tied
    assert any("lm_head.weight (tied to the embedding)" in note for note in notes) == is_tied
    embedding = refitted.model.get_input_embeddings().weight
    assert torch.equal(embedding, dense.model.get_input_embeddings().weight[:, kept])


def test_a_look_at_the_hidden_size_leaves_the_number_type_of_the_config(tmp_path: Path) -> None:
    """What is tried is computed in float32; the config of the model, and of its export, says what its weights are."""
    model = (
        HubModel(name=str(make_folder(tmp_path / "dense"))).load(Device(torch.device("cpu"), torch.bfloat16), 0).model
    )
    before, anatomy = copy.deepcopy(model.config.to_dict()), Anatomy(model)
    assert anatomy.can_hold("hidden", 24)
    Structured(amount=0.25, units=("hidden",), score="random", refit="none").check_model(anatomy, [0.25])
    assert model.config.to_dict() == before
    Structured(amount=0.25, units=("hidden",), score="random", refit="none").prune(anatomy, 0.25, 0)
    assert model.config.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_passes_in_parts_give_the_same_refit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the gram matrices of all norms are too much for one pass."""
    from prune_lab.pruning import hidden

    at_once, in_parts = (load(tmp_path / "m", "llama with a head of its own") for _ in range(2))
    prune(at_once, refit="inputs")
    monkeypatch.setattr(hidden, "_AT_ONCE", 2 * 2 * HIDDEN**2)
    prune(in_parts, refit="inputs")
    assert same(weights_of(at_once.model), weights_of(in_parts.model))


def test_random_channels_follow_the_seed(tmp_path: Path) -> None:
    dense = load(tmp_path / "m")
    chosen = []
    for seed in (1, 1, 2):
        cut = copied(dense)
        method(score="random").prune(Anatomy(cut.model), 0.25, seed)
        chosen.append(kept_of(dense.model, cut.model).tolist())
    assert chosen[0] == chosen[1] != chosen[2]


# Types that are found, with the parameters inside their blocks that write the states, by the end of their names.
FOUND = {
    "mixtral": {"o_proj.weight": 0, "experts.down_proj": 1},
    "qwen2_moe": {"o_proj.weight": 0, "experts.down_proj": 1, "shared_expert.down_proj.weight": 0},
    "qwen3_5_text": {"o_proj.weight": 0, "out_proj.weight": 0, "down_proj.weight": 0},  # norms of 1 + weight
    "glm": {"o_proj.weight": 0, "down_proj.weight": 0},
}


@pytest.mark.parametrize("model_type", FOUND)
def test_channels_of_a_type_that_is_found(model_type: str, tmp_path: Path) -> None:
    dense = HubModel(name=str(tiny_folder(tmp_path / "m", model_type))).load(CPU, seed=0)
    for module in dense.model.modules():
        for name in {"eps", "variance_epsilon"} & vars(module).keys():
            setattr(module, name, 0.0)
    cut, masked = copied(dense), copied(dense)
    prune(cut)
    for module in cut.model.modules():  # it was built of the config
        for name in {"eps", "variance_epsilon"} & vars(module).keys():
            setattr(module, name, 0.0)
    kept = kept_of(dense.model, cut.model)
    gone = sorted(set(range(64)) - set(kept.tolist()))
    with torch.no_grad():
        masked.model.get_input_embeddings().weight[:, gone] = 0
        for name, parameter in masked.model.named_parameters():
            for end, dim in FOUND[model_type].items():
                if name.endswith(f".{end}") or name.endswith(f".mlp.{end}"):
                    parameter.index_fill_(dim, torch.tensor(gone), 0)
    torch.testing.assert_close(logits(cut.model), logits(masked.model), atol=2e-5, rtol=1e-3)
    assert (logits(cut.model) - logits(dense.model)).abs().max() > 0.01


@pytest.mark.parametrize(
    ("family", "says"),
    [
        ("gpt2", "c_attn.weight of shape .* would be"),
        ("opt", "another set of tensors"),
        ("gpt_neox", "query_key_value.weight of shape .* would be"),
    ],
)
def test_families_whose_channels_cannot_go_are_refused_with_the_reason(family: str, says: str, tmp_path: Path) -> None:
    loaded = HubModel(name=str(make_folder(tmp_path / "m", family))).load(CPU, seed=0)
    before = weights_of(loaded.model)
    with pytest.raises(
        Refused, match=rf"channels of the hidden size of this {family} model cannot be removed: .*{says}"
    ):
        method().check_model(Anatomy(loaded.model), [0.25])
    assert same(before, weights_of(loaded.model))


def test_a_gemma_in_bfloat16_is_the_same_but_for_rounding(tmp_path: Path) -> None:
    """The root by which it multiplies what it embeds is rounded, of 24 channels as of 32."""
    place = make_folder(tmp_path / "m", "gemma3_text", **EXACT, head_dim=8, query_pre_attn_scalar=8)
    cut, dense = (HubModel(name=str(place)).load(Device(torch.device("cpu"), torch.bfloat16), seed=0) for _ in range(2))
    whole = HubModel(name=str(place)).load(CPU, seed=0)
    smaller = copied(whole)
    for loaded in (cut, smaller):
        prune(loaded, score="random")  # the same channels of both
    gone = sorted(set(range(HIDDEN)) - set(kept_of(whole.model, smaller.model).tolist()))
    zero_by_hand(dense.model, gone)
    found, wanted = logits(cut.model).float(), logits(dense.model).float()
    assert (found - wanted).norm() < 0.03 * wanted.norm()


def test_a_count_with_which_what_is_rounded_differs_is_refused_before_the_work(tmp_path: Path) -> None:
    """A RecurrentGemma embeds times the root of its hidden size in bfloat16: exact of 64 and 16, of 48 not."""
    loaded = HubModel(name=str(tiny_folder(tmp_path / "m", "recurrent_gemma"))).load(CPU, seed=0)
    before = weights_of(loaded.model)
    with pytest.raises(Refused, match=r"with 48 of 64 channels the recurrent_gemma model is not .*; give another"):
        method().check_model(Anatomy(loaded.model), [0.25])
    assert same(before, weights_of(loaded.model))
    assert prune(loaded, amount=0.75).realized == pytest.approx(0.75)


@pytest.mark.parametrize("model_type", ["cohere", "starcoder2"])
def test_norms_that_subtract_a_mean_are_refused(model_type: str, tmp_path: Path) -> None:
    loaded = HubModel(name=str(tiny_folder(tmp_path / "m", model_type))).load(CPU, seed=0)
    with pytest.raises(Refused, match="norms subtract a mean"):
        method().check_model(Anatomy(loaded.model), [0.25])


def test_half_of_the_channels_need_not_be_possible(tmp_path: Path) -> None:
    """18 is no multiple of 4 heads, which a Llama with biases must have; 32 is."""
    place = tmp_path / "m"
    loaded = load(place, "llama with biases", hidden_size=36, head_dim=8)
    assert prune(loaded, amount=4 / 36).realized == pytest.approx(4 / 36)
    assert (loaded.model.config.model_type, loaded.model.config.hidden_size) == ("llama", 32)


def test_a_score_of_norms_is_refused_where_none_is_read(tmp_path: Path) -> None:
    """Olmo 2 has norms behind attention and MLP alone."""
    loaded = HubModel(name=str(tiny_folder(tmp_path / "m", "olmo2"))).load(CPU, seed=0)
    with pytest.raises(Refused, match=r"method.score=minitron.*give method.score=random"):
        method().check_model(Anatomy(loaded.model), [0.25])
    assert prune(loaded, score="random").realized == pytest.approx(0.25)


def test_a_config_that_says_another_size_of_heads_keeps_it(tmp_path: Path) -> None:
    """Cut twice: the second time the size of the heads is no quotient any more."""
    loaded = load(tmp_path / "m", "qwen2")
    prune(loaded)
    prune(loaded, amount=0.5)
    assert (loaded.model.config.hidden_size, loaded.model.config.head_dim) == (16, 8)
    assert loaded.model.model.layers[0].self_attn.q_proj.weight.shape == (32, 16)


@pytest.mark.parametrize("variant", ["llama", "llama with a head of its own"])
def test_an_interrupted_training_goes_on_with_fewer_channels(variant: str, tmp_path: Path) -> None:
    load(tmp_path / "m", variant)
    recipe = Finetune(steps=24, batch_size=2, lr=0.01, checkpoint_every=9, validate_every=0)
    whole, cut, gone_on = interrupted(
        recipe, tmp_path / "m", tmp_path, 20, method=method(refit="inputs", amount=0.375),
        schedule=Iterative(start=0.25, rounds=2),
    )  # fmt: skip
    assert cut.saved == 18
    assert same(weights_of(whole.loaded.model), weights_of(gone_on.loaded.model))
    for ended in (whole, gone_on):
        config = ended.loaded.model.config
        assert (config.model_type, config.hidden_size, config.head_dim) == ("mistral", 20, 8)
        assert ended.training.pruned.realized == pytest.approx(0.375)


def test_moments_of_an_optimizer_lose_the_same_channels(tmp_path: Path) -> None:
    loaded = load(tmp_path / "m", "llama as wide everywhere")
    model, dense = loaded.model.requires_grad_(True), copied(loaded).model
    optimizer = torch.optim.AdamW(model.parameters())
    model(input_ids=WINDOWS, labels=WINDOWS).loss.backward()
    optimizer.step()
    with torch.no_grad():  # each weight's moment says where it was
        for weight, was in zip(model.parameters(), dense.parameters(), strict=True):
            weight.copy_(was)
            optimizer.state[weight]["exp_avg"].copy_(weight)
    pruned = method(score="random").prune(Anatomy(model), 0.25, 0)
    follow(optimizer, model, pruned.cuts)
    assert {id(w) for group in optimizer.param_groups for w in group["params"]} == {id(w) for w in model.parameters()}
    for name, weight in model.named_parameters():
        scale = (32 / 24) ** 0.5 if "norm" in name else 1
        torch.testing.assert_close(optimizer.state[weight]["exp_avg"] * scale, weight.detach(), msg=name)


def test_the_command_line_removes_channels(cli: Cli, tmp_path: Path) -> None:
    load(tmp_path / "m")
    (tmp_path / "text.txt").write_text(story(1, 400))
    common = [
        "model=hf", f"model.name={tmp_path / 'm'}", "dataset=text", "dataset.path=text.txt", "dataset.seq_len=32",
        "dataset.calibration.n_samples=8", "measure=quality_only", "measure.max_windows=2", "tracking=none",
        "method=structured", "method.units=[hidden]",
    ]  # fmt: skip
    done = cli(*common, "method.score=minitron", "amount=0.2", "export=hf", "hydra.run.dir=run")
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["metrics"]["amount/realized"] == pytest.approx(6 / 32)
    assert summary["protocol"]["calibration"]["solved_width"] == HIDDEN
    assert any("is a MistralForCausalLM" in warning for warning in summary["warnings"])
    table = (tmp_path / "run" / "layers.csv").read_text()
    assert "model.embed_tokens,9600,1800" in table
    assert "model.norm,32,6" in table
    assert json.loads((tmp_path / "run" / "export" / "config.json").read_text())["hidden_size"] == 26
    recovery = ["recovery=finetune", "recovery.steps=4", "recovery.batch_size=2"]
    refused = cli(*common, "method.score=minitron", "amount=0.2", "recovery=reconstruct")
    assert refused.returncode == 2
    assert "more channels than method.units=[hidden] leaves; give recovery=finetune" in " ".join(refused.stderr.split())
    trained = cli(*common, "method.score=random", "method.refit=none", "amount=0.25", *recovery, "hydra.run.dir=tuned")
    assert trained.returncode == 0, trained.stderr
