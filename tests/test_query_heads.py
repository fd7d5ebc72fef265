"""Query heads within KV groups: each group loses the same number, and its key and value stay."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CPU, FAMILIES, Cli, copied, logits, make_folder, story
from model_types import tiny_folder
from torch import Tensor
from trainings import interrupted, same, weights_of
from transformers import AutoModelForCausalLM

from prune_lab.errors import Refused
from prune_lab.methods.structured import Structured
from prune_lab.models.anatomy import Anatomy
from prune_lab.models.export import check_reload, save_model
from prune_lab.models.found_units import units_of
from prune_lab.models.load import HubModel, Loaded
from prune_lab.pruning.calibration import Calibrator
from prune_lab.pruning.pruned import Pruned
from prune_lab.recovery.finetune import Finetune
from prune_lab.schedules import Iterative

GROUPS, OF_GROUP, HEAD_DIM, HIDDEN = 2, 4, 4, 32
SHAPE: dict[str, Any] = {"num_attention_heads": GROUPS * OF_GROUP, "num_key_value_heads": GROUPS, "head_dim": HEAD_DIM}
WINDOWS = torch.randint(4, 300, (6, 24), generator=torch.Generator().manual_seed(7))
# One of four goes of each group where 6 heads can be held, else two; Llama goes on as a Mistral with 6.
STRICT = ("gemma2", "gemma3_text")
VARIANTS: dict[str, dict[str, Any]] = {**{family: {} for family in FAMILIES}, "phi3": {}}
VARIANTS["llama with biases"] = {"attention_bias": True}
GONE = {variant: 2 if variant in (*STRICT, "llama with biases") else 1 for variant in VARIANTS}
FOUND = ("cohere", "qwen3_moe", "gpt_oss", "gemma3", "qwen3_5_text", "laguna")
MORE = ("glm", "starcoder2", "mixtral", "bamba", "lfm2", "granitemoehybrid")  # in the slow suite
SCORES: list[dict[str, Any]] = [
    {"score": "obs", "refit": "inputs"}, {"score": "wifv", "refit": "bias"}, {"score": "taylor"}, {"score": "random"},
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("query_heads")


def loaded_of(place: Path, variant: str) -> Loaded:
    """A small model of 8 query heads in 2 KV groups, to be changed."""
    folder = place / variant
    if not folder.exists():
        make_folder(folder, variant.split()[0], **SHAPE, **VARIANTS[variant])
    return HubModel(name=str(folder)).load(CPU, seed=0)


def prune(loaded: Loaded, **keys: Any) -> Pruned:
    method = Structured(**{"units": ("query_heads",), **keys})
    calibrator = Calibrator(WINDOWS) if method.calibrated else None
    method.check(loaded.model.config, [method.amount])
    method.check_model(Anatomy(loaded.model), [method.amount])
    return method.prune(Anatomy(loaded.model), method.amount, 0, calibrator)


def queries(attention: Any) -> Tensor:
    """Rows of the query heads, (heads x head_dim, hidden); Phi-3 has keys and values behind them."""
    fused = getattr(attention, "qkv_proj", None)
    weight: Tensor = attention.q_proj.weight if fused is None else fused.weight[: GROUPS * OF_GROUP * HEAD_DIM]
    return weight


@torch.no_grad()
def zero_by_hand(model: Any, gone: int) -> list[list[int]]:
    """Zeroes in each KV group the heads of lowest L2 norm, by plain indexing; returns those of each block."""
    found = []
    for block in model.model.layers:
        att, of_block = block.self_attn, list[int]()
        for group in range(GROUPS):
            norms = {}
            for head in range(group * OF_GROUP, (group + 1) * OF_GROUP):
                at = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
                norms[head] = float(queries(att)[at].square().sum() + att.o_proj.weight[:, at].square().sum())
            of_block += sorted(norms, key=lambda head: norms[head])[:gone]
        for head in of_block:
            at = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
            queries(att)[at] = 0
            att.o_proj.weight[:, at] = 0
            if getattr(att, "q_proj", None) is not None and att.q_proj.bias is not None:
                att.q_proj.bias[at] = 0
        found.append(sorted(of_block))
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_cut_and_masked_are_zeroed_by_hand(variant: str, place: Path, tmp_path: Path) -> None:
    """In fp32; and stock transformers reads the export with the same logits, and generates alike with its cache."""
    cut, gone = loaded_of(place, variant), GONE[variant]
    dense, masked, by_hand = copied(cut), copied(cut), copied(cut)
    pruned = prune(cut, amount=gone / OF_GROUP)
    prune(masked, amount=gone / OF_GROUP, physical=False)
    zero_by_hand(by_hand.model, gone)
    expected = logits(by_hand.model)
    assert (expected - logits(dense.model)).abs().max() > 0.01
    torch.testing.assert_close(logits(masked.model), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(cut.model), expected, atol=1e-5, rtol=1e-5)
    config, heads = cut.model.config, GROUPS * (OF_GROUP - gone)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (heads, GROUPS, HEAD_DIM)
    assert config.model_type == ("mistral" if variant == "llama" else variant.split()[0])
    sizes = [sum(p.numel() for p in one.model.parameters()) for one in (dense, cut)]
    assert sum(row.removed for row in pruned.rows) == sizes[0] - sizes[1]
    assert pruned.realized == gone / OF_GROUP
    for before, after in zip(dense.model.model.layers, cut.model.model.layers, strict=True):
        keys = [[p for n, p in block.self_attn.named_parameters() if n[0] in "kv"] for block in (before, after)]
        assert all(torch.equal(was, now) for was, now in zip(*keys, strict=True))
    save_model(cut, tmp_path / "export")
    check_reload(cut.model, tmp_path / "export", WINDOWS[:1])
    again, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "export", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    torch.testing.assert_close(logits(again.eval()), expected, atol=1e-5, rtol=1e-5)
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones(1, 6)}
    ids = [again.generate(WINDOWS[:1, :6], use_cache=cache, **options) for cache in (True, False)]
    assert torch.equal(*ids)


@pytest.mark.parametrize("keys", SCORES, ids=lambda keys: str(keys["score"]))
@pytest.mark.parametrize("variant", ["llama", "llama with biases", "phi3"])
def test_cut_equals_masked_by_every_kind_of_score(variant: str, keys: dict[str, Any], place: Path) -> None:
    cut = loaded_of(place, variant)
    masked = copied(cut)
    pruned = prune(cut, amount=0.5, units=("query_heads", "mlp"), **keys)
    held = prune(masked, amount=0.5, units=("query_heads", "mlp"), physical=False, **keys)
    torch.testing.assert_close(logits(cut.model), logits(masked.model), atol=1e-5, rtol=1e-5)
    assert pruned.realized == held.realized == 0.5
    for block in range(2):
        kept = held.masks.keep[f"model.layers.{block}.self_attn.o_proj"].all(0).view(GROUPS, OF_GROUP, HEAD_DIM)
        assert kept.all(-1).sum(1).tolist() == [OF_GROUP // 2] * GROUPS
    assert all(held.masks.keep[name].shape == masked.model.get_submodule(name).weight.shape for name in held.masks.keep)


def test_the_refit_is_least_squares_over_all_columns_that_stay(place: Path) -> None:
    """Of the first block, from the inputs of a stock forward pass, with the ridge solved as rows of their own."""
    loaded = loaded_of(place, "qwen2")
    output, rows = loaded.model.model.layers[0].self_attn.o_proj, list[Tensor]()
    weight = output.weight.detach().clone()
    hook = output.register_forward_pre_hook(lambda _, args: rows.append(args[0].flatten(0, 1).double()))
    loaded.model(input_ids=WINDOWS, use_cache=False)
    hook.remove()
    held = prune(loaded, amount=0.25, score="obs", refit="inputs", physical=False)
    kept = held.masks.keep["model.layers.0.self_attn.o_proj"].all(0)
    assert kept.sum() == 6 * HEAD_DIM
    inputs, dense = rows[0].detach(), weight.double()
    ridge = (0.01 * inputs.square().sum(0).mean()).sqrt() * torch.eye(len(kept), dtype=torch.float64)
    some = torch.cat([inputs, ridge])
    wanted = torch.linalg.lstsq(some[:, kept], some @ dense.T).solution.T
    found = loaded.model.model.layers[0].self_attn.o_proj.weight
    torch.testing.assert_close(found[:, kept].double(), wanted, atol=1e-4, rtol=1e-4)
    assert not found[:, ~kept].any()


@pytest.mark.parametrize("keys", [{}, {"score": "obs", "refit": "inputs"}], ids=["norms", "obs"])
def test_in_steps_what_went_stays_gone(keys: dict[str, Any], place: Path) -> None:
    for physical in (False, True):
        loaded, counts = loaded_of(place, "mistral"), list[int]()
        for amount in (0.25, 0.5, 0.75, 0.8):
            method = Structured(amount=amount, physical=physical, units=("query_heads",), **keys)
            realized = method.prune(Anatomy(loaded.model), amount, 0, Calibrator(WINDOWS)).realized
            used = loaded.model.model.layers[1].self_attn.o_proj.weight.any(0).view(GROUPS, -1, HEAD_DIM).any(-1)
            counts += set(used.sum(1).tolist())
            assert realized == 1 - counts[-1] / OF_GROUP
        assert counts == [3, 2, 1, 1]


@pytest.mark.parametrize("model_type", [*FOUND, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_query_heads_of_a_type_that_is_found(model_type: str, place: Path, tmp_path: Path) -> None:
    folder = place / model_type
    cut = HubModel(name=str(tiny_folder(folder, model_type))).load(CPU, seed=0)
    masked, dense = copied(cut), copied(cut)
    assert units_of(cut.model).groups["query_heads"].count == 2
    keys: dict[str, Any] = {"amount": 0.5, "score": "obs", "refit": "inputs"}
    pruned = prune(cut, **keys)
    held = prune(masked, physical=False, **keys)
    expected = logits(masked.model)
    torch.testing.assert_close(logits(cut.model), expected, rtol=1e-4, atol=1e-4)
    assert (expected - logits(dense.model)).abs().max() > 1e-3
    assert pruned.realized == 0.5
    text_of = cut.model.config.get_text_config()
    assert (text_of.num_attention_heads, text_of.num_key_value_heads) == (2, 2)
    readers = [keep.all(0) for keep in held.masks.keep.values() if keep.any(1).all()]
    assert readers
    assert all(kept.view(2, 2, -1).all(-1).sum(1).tolist() == [1, 1] for kept in readers)
    save_model(cut, tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    torch.testing.assert_close(logits(again), logits(cut.model))


@pytest.mark.parametrize(("model_type", "says"), [
    ("deepseek_v3", "every query head has its own KV head"), ("bert", "every query head has its own KV head"),
    ("phi4_multimodal", "queries, keys and values are rows of one matrix"),
])  # fmt: skip
def test_types_without_such_units_say_why(model_type: str, says: str, place: Path) -> None:
    loaded = HubModel(name=str(tiny_folder(place / model_type, model_type))).load(CPU, seed=0)
    with pytest.raises(Refused, match=rf"method.units=\[query_heads\]: .*{says}"):
        Structured(units=("query_heads",)).check_model(Anatomy(loaded.model), [0.5])


def test_an_interrupted_training_goes_on_with_the_heads_that_stayed(place: Path, tmp_path: Path) -> None:
    """4, 3 and 2 query heads in each group: a Mistral since 3."""
    loaded_of(place, "llama")
    recipe = Finetune(steps=24, batch_size=2, lr=0.01, checkpoint_every=9, validate_every=0)
    method = Structured(amount=0.5, units=("query_heads",))
    whole, cut, gone_on = interrupted(
        recipe, place / "llama", tmp_path, 20, method=method, schedule=Iterative(start=0.25, rounds=2)
    )
    assert cut.saved == 18
    assert same(weights_of(whole.loaded.model), weights_of(gone_on.loaded.model))
    config = gone_on.loaded.model.config
    assert (config.model_type, config.num_attention_heads, config.num_key_value_heads) == ("mistral", 4, 2)


def test_nine_heads_in_three_groups_become_six(cli: Cli, tmp_path: Path) -> None:
    """The heads of SmolLM2-135M, on the command line; 6 do not divide 63. Its export loses a KV group then."""
    make_folder(tmp_path / "m", hidden_size=63, num_attention_heads=9, num_key_value_heads=3, head_dim=8)
    (tmp_path / "text.txt").write_text(story(1, 400))
    common = [
        "model=hf", "dataset=text", "dataset.path=text.txt", "dataset.seq_len=32", "dataset.calibration.n_samples=8",
        "measure=quality_only", "measure.max_windows=2", "method=structured", "export=hf", "tracking=none",
    ]  # fmt: skip
    done = cli(
        *common, f"model.name={tmp_path / 'm'}", "method.units=[query_heads]", "amount=0.3333", "hydra.run.dir=run"
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert any("MistralForCausalLM" in warning for warning in summary["warnings"])
    config = json.loads((tmp_path / "run" / "export" / "config.json").read_text())
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (6, 3, 8)
    again = cli(*common, "model.name=run/export", "method.units=[heads]", "amount=0.34", "hydra.run.dir=again")
    assert again.returncode == 0, again.stderr
    config = json.loads((tmp_path / "again" / "export" / "config.json").read_text())
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (4, 2)
