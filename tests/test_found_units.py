"""Units that are found: channels and KV groups of any type, cut from the config's own model and compared with zeros."""

from __future__ import annotations

import copy
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ALL_FAMILIES, CPU, Cli, copied, logits, make_folder, story
from model_types import tiny_folder
from trainings import interrupted, same, weights_of
from transformers import AutoModelForCausalLM

from prune_lab.errors import Refused
from prune_lab.methods.structured import Structured
from prune_lab.models import found as found_layouts
from prune_lab.models import found_units
from prune_lab.models.anatomy import Anatomy
from prune_lab.models.export import check_reload, save_model
from prune_lab.models.families import FAMILIES
from prune_lab.models.found import forget_layout
from prune_lab.models.found_units import forget_units, units_of
from prune_lab.models.load import HubModel, Loaded
from prune_lab.pruning.calibration import Calibrator
from prune_lab.pruning.pruned import Pruned
from prune_lab.recovery.finetune import Finetune
from prune_lab.schedules import Iterative

WINDOWS = torch.randint(4, 300, (6, 24), generator=torch.Generator().manual_seed(7))
# Types of every class with the groups of units that they have, and how many sets of units are in each.
GROUPS: dict[str, dict[str, int]] = {
    "olmo2": {"mlp": 3},  # a norm spans all heads
    "cohere": {"mlp": 3, "heads": 3},
    "glm": {"mlp": 3, "heads": 3},  # gate and up in one matrix; biases
    "starcoder2": {"mlp": 3, "heads": 3},
    "gptj": {"mlp": 3},  # heads of another size, were there fewer
    "falcon": {"mlp": 3},
    "recurrent_gemma": {"mlp": 3},  # the config has twice the width
    "bert": {"mlp": 3},
    "mixtral": {"mlp": 12, "heads": 3},  # experts in one tensor
    "gpt_oss": {"mlp": 16, "heads": 4},  # the other way round, interleaved, with biases and sinks
    "dbrx": {"mlp": 12},  # experts stacked in two dimensions
    "qwen2_moe": {"mlp:moe_intermediate_size": 12, "mlp:shared_expert_intermediate_size": 3, "heads": 3},
    "deepseek_v3": {"mlp:intermediate_size": 1, "mlp:moe_intermediate_size": 10, "heads": 3},  # shared experts of it
    "llama4_text": {"mlp:intermediate_size": 10, "mlp:intermediate_size_mlp": 2, "heads": 4},
    "minicpm3": {"mlp": 3, "heads": 3},  # latent attention
    "gemma3": {"mlp": 4, "heads": 4},  # a wrapper
    "qwen3_5_text": {"mlp": 4, "heads:num_attention_heads": 2, "heads:linear_num_key_heads": 2},
    "bamba": {"mlp": 4, "heads": 2},  # blocks that cannot be called alone
    "lfm2": {"mlp": 4, "heads": 2},
    "granitemoehybrid": {"mlp:intermediate_size": 16, "mlp:shared_intermediate_size": 4, "heads": 2},
    "laguna": {
        "mlp:intermediate_size": 1, "mlp:moe_intermediate_size": 12, "mlp:shared_expert_intermediate_size": 3,
        "heads": 4,
    },  # counts of heads for each block
}  # fmt: skip
FAST = (
    "cohere", "recurrent_gemma", "bert", "mixtral", "gpt_oss", "deepseek_v3", "gemma3", "qwen3_5_text",
)  # fmt: skip
SLOW = (pytest.mark.slow, pytest.mark.process)
# Types without units of a kind, and what is said of it.
NONE = {
    ("bloom", "mlp"): "no field of the config holds the number of MLP channels",
    ("bitnet", "mlp"): "outputs of a block's matrices move what several of them share",
    ("olmo2", "heads"): "outputs of a block's matrices move what several of them share",
    ("gptj", "heads"): "no field of the config holds the number of KV groups",
    ("mamba2", "mlp"): "no MLP channels are found",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("units")


def loaded_of(place: Path, model_type: str) -> Loaded:
    """A small model of a type, to be changed."""
    folder = place / model_type
    return HubModel(name=str(folder if folder.exists() else tiny_folder(folder, model_type))).load(CPU, seed=0)


def prune(loaded: Loaded, **keys: Any) -> Pruned:
    method = Structured(**{"amount": 0.5, **keys})
    calibrator = Calibrator(WINDOWS) if method.calibrated else None
    return method.prune(Anatomy(loaded.model), method.amount, 0, calibrator)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_of_a_described_family_the_same_units_are_found(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the same counts can be held; but for heads of families in which fewer would be other heads: none are."""
    described = Anatomy(AutoModelForCausalLM.from_pretrained(make_folder(tmp_path, family)).eval())
    wanted = {
        kind: (
            described.unit_count(kind),
            [[(p.name, p.side, p.widths) for p in of] for of in described.unit_linears(kind)],
        )
        for kind in described.family.kinds
    }
    if family == "phi3":  # its queries, keys and values are rows of one matrix
        del wanted["query_heads"]
    possible = {kind: described.possible_counts(kind, near=1) for kind in wanted}
    of_sets = {kind: [(s.units, s.groups) for s in described.unit_sets(kind)] for kind in wanted}
    monkeypatch.delitem(FAMILIES, family)
    found = Anatomy(described.model)
    for kind, (count, of_blocks) in wanted.items():
        if possible[kind] == [count]:
            with pytest.raises(Refused, match="cannot be removed"):
                found.unit_groups(kind)
            continue
        assert found.unit_groups(kind) == [kind]
        assert found.unit_count(kind) == count
        sets = found.unit_sets(kind)
        assert [(s.units, s.groups) for s in sets] == of_sets[kind]
        assert [s.block for s in sets] == list(range(len(described.blocks)))
        for s, parts in zip(sets, of_blocks, strict=True):
            assert sorted((p.name, p.side, p.widths) for p in s.parts) == sorted(parts)
            assert s.parts[-1].name == parts[-1][0]
        held = [n for n in range(1, count + 1) if found.can_hold(kind, n)] if count < 9 else possible[kind]
        assert held == possible[kind]


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "gemma3_text"])
@pytest.mark.parametrize("keys", [{"score": "obs", "refit": "inputs"}, {"score": "wifv", "refit": "bias"}, {}])
def test_of_a_described_family_the_same_units_go(
    family: str, keys: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    described = HubModel(name=str(make_folder(tmp_path / "m", family))).load(CPU, seed=0)
    units = ("mlp",) if family == "gpt2" else ("mlp", "heads")
    other = copied(described)
    wanted = prune(described, units=units, **keys)
    monkeypatch.delitem(FAMILIES, family)
    pruned = prune(other, units=units, **keys)
    assert {(row.layer, row.before, row.removed) for row in pruned.rows} == {
        (row.layer, row.before, row.removed) for row in wanted.rows
    }
    for (name, mine), theirs in zip(other.model.named_parameters(), described.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5, msg=name)
    assert other.model.config.to_dict() == described.model.config.to_dict()


def some_slow(types: Iterable[str], fast: Container[str]) -> list[Any]:
    """Types as parameters of a test, those that are not `fast` for the slow suite."""
    return [name if name in fast else pytest.param(name, marks=SLOW) for name in types]


@pytest.mark.parametrize("model_type", some_slow(GROUPS, FAST))
def test_units_of_a_type(model_type: str, place: Path, tmp_path: Path) -> None:
    """What is cut is what has zeros in the place of half of its units, and what stock transformers reads."""
    dense = loaded_of(place, model_type)
    others = ("experts", "query_heads")  # tests of their own: test_experts.py, test_query_heads.py
    groups = {name: group for name, group in units_of(dense.model).groups.items() if group.kind not in others}
    assert {name: len(group.sets) for name, group in groups.items()} == GROUPS[model_type]
    units = tuple(dict.fromkeys(group.kind for group in groups.values()))
    cut, masked = copied(dense), copied(dense)
    pruned = prune(cut, units=units, score="wifv", refit="inputs")
    prune(masked, units=units, score="wifv", refit="inputs", physical=False)
    torch.testing.assert_close(logits(cut.model), logits(masked.model), rtol=1e-4, atol=1e-4)
    sizes = [sum(p.numel() for p in model.parameters()) for model in (dense.model, cut.model)]
    in_rows = sum(row.removed for row in pruned.rows)
    beside = (
        sum(  # biases, sinks and the like of fused experts, which are in no row
            tensor.numel() for name, tensor in dense.model.named_parameters()
        )
        - sizes[1]
        - in_rows
    )
    assert 0 <= beside < 0.02 * sizes[0]
    assert pruned.realized == pytest.approx(0.5, abs=0.02)
    save_model(cut, tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    torch.testing.assert_close(logits(again), logits(cut.model))
    check_reload(cut.model, tmp_path / "saved", WINDOWS[:1])


@pytest.mark.parametrize(("model_type", "kind"), NONE)
def test_a_kind_that_cannot_go_is_refused_with_the_reason(model_type: str, kind: str, place: Path) -> None:
    loaded = loaded_of(place, model_type)
    with pytest.raises(Refused, match=rf"method.units=\[{kind}\].*{model_type}.*{NONE[model_type, kind]}"):
        prune(loaded, units=(kind,))


def test_channels_of_interleaved_experts_by_hand(place: Path) -> None:
    """gpt-oss: gate and up alternate in the columns of one tensor, with a bias; each expert loses its lowest norms."""
    loaded = loaded_of(place, "gpt_oss")
    experts = loaded.model.model.layers[1].mlp.experts
    dense = {name: tensor.detach().clone() for name, tensor in experts.named_parameters()}
    prune(loaded, units=("mlp",), score="l2")
    experts = loaded.model.model.layers[1].mlp.experts
    width = dense["down_proj"].shape[1]
    for expert in range(len(dense["down_proj"])):
        inner, outer = dense["gate_up_proj"][expert], dense["down_proj"][expert]  # (hidden, 2 width), (width, hidden)
        squares = inner[:, 0::2].square().sum(0) + inner[:, 1::2].square().sum(0) + outer.square().sum(1)
        kept = squares.argsort()[width // 2 :].sort().values
        both = torch.stack([2 * kept, 2 * kept + 1], 1).flatten()
        assert torch.equal(experts.down_proj[expert], outer[kept])
        assert torch.equal(experts.gate_up_proj[expert], inner[:, both])
        assert torch.equal(experts.gate_up_proj_bias[expert], dense["gate_up_proj_bias"][expert][both])
    assert torch.equal(experts.down_proj_bias, dense["down_proj_bias"])


def test_shared_experts_keep_the_same_share_where_one_field_holds_both(place: Path) -> None:
    """deepseek-v3 multiplies the width of its shared expert by their number: two here."""
    model = copy.deepcopy(loaded_of(place, "deepseek_v3").model)
    config = copy.deepcopy(model.config)
    config.n_shared_experts = 2
    wide = AutoModelForCausalLM.from_config(config).eval()
    group = units_of(wide).groups["mlp:moe_intermediate_size"]
    assert {s.multiple for s in group.sets} == {1, 2}
    before = wide.config.moe_intermediate_size
    Structured(amount=0.5, score="l1").prune(Anatomy(wide), 0.5, 0)
    assert wide.config.moe_intermediate_size == before // 2
    shared = wide.model.layers[-1].mlp.shared_experts
    assert shared.up_proj.weight.shape[0] == 2 * wide.config.moe_intermediate_size


def test_a_count_that_a_config_cannot_hold_is_refused_with_those_that_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Llama's query heads must divide its hidden size: of 4 groups 3 are not possible."""
    folder = make_folder(tmp_path / "m", hidden_size=64, num_attention_heads=8, num_key_value_heads=4, head_dim=8)
    loaded = HubModel(name=str(folder)).load(CPU, seed=0)
    monkeypatch.delitem(FAMILIES, "llama")
    with pytest.raises(Refused, match=r"leaves 3 of 4 KV groups.*possible are 1 \(amount=0.75\), 2 \(amount=0.5\)"):
        Structured(amount=0.25, units=("heads",)).check_model(Anatomy(loaded.model), [0.25])
    Structured(amount=0.25, units=("heads",), physical=False).check_model(Anatomy(loaded.model), [0.25])


def test_a_target_of_the_dense_model_is_refused(place: Path) -> None:
    loaded = loaded_of(place, "mixtral")
    with pytest.raises(Refused, match=r"method.refit=residual.*give method.refit=inputs"):
        Structured(refit="residual").check_model(Anatomy(loaded.model), [0.5])


def test_an_expert_that_saw_hardly_a_token_loses_its_lowest_norms(place: Path) -> None:
    loaded = loaded_of(place, "qwen3_moe")
    block = loaded.model.model.layers[1].mlp
    with torch.no_grad():  # the same two experts get every token
        block.gate.weight.zero_()
    dense = {name: tensor.detach().clone() for name, tensor in block.experts.named_parameters()}
    pruned = prune(loaded, score="obs", refit="inputs")
    unseen = [int(name.rpartition(".")[2]) for name in pruned.unseen if "layers.1.mlp.experts.down_proj" in name]
    assert len(unseen) == 2
    assert any("pruned by magnitude" in warning for warning in pruned.warnings)
    experts = loaded.model.model.layers[1].mlp.experts
    for expert in unseen:
        gate, up = dense["gate_up_proj"][expert].chunk(2)
        down = dense["down_proj"][expert]
        squares = gate.square().sum(1) + up.square().sum(1) + down.square().sum(0)
        kept = squares.argsort()[len(squares) // 2 :].sort().values
        assert torch.equal(experts.down_proj[expert], down[:, kept])
        assert torch.equal(experts.gate_up_proj[expert], torch.cat([gate[kept], up[kept]]))


@pytest.mark.parametrize("model_type", ["mixtral", "gemma3"])
def test_an_interrupted_training_goes_on_after_units_were_cut(model_type: str, place: Path, tmp_path: Path) -> None:
    """The moments of an optimizer are cut as the weights are: bit for bit what it is without the interruption."""
    loaded_of(place, model_type)
    recipe = Finetune(steps=24, batch_size=2, lr=0.01, checkpoint_every=9, validate_every=0)
    method = Structured(amount=0.5, units=("mlp", "heads"), score="l2")
    whole, cut, gone_on = interrupted(
        recipe, place / model_type, tmp_path, 20, method=method, schedule=Iterative(start=0.25, rounds=2)
    )
    assert cut.saved == 18
    assert same(weights_of(whole.loaded.model), weights_of(gone_on.loaded.model))
    text_of = whole.loaded.model.config.get_text_config()
    assert text_of.num_key_value_heads == 1
    assert sum(p.numel() for p in whole.loaded.model.parameters()) < sum(
        p.numel() for p in loaded_of(place, model_type).model.parameters()
    )


def test_moments_of_an_optimizer_follow_a_cut_of_experts(place: Path) -> None:
    from prune_lab.recovery.optimizer import follow

    model = loaded_of(place, "mixtral").model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters())
    model(input_ids=WINDOWS.long(), labels=WINDOWS.long()).loss.backward()
    optimizer.step()
    parameters = dict(model.named_parameters())
    with torch.no_grad():  # each weight's moment says where it was
        for weight in parameters.values():
            optimizer.state[weight]["exp_avg"].copy_(weight)
    pruned = Structured(amount=0.5, units=("mlp", "heads"), score="l2").prune(Anatomy(model), 0.5, 0)
    follow(optimizer, model, pruned.cuts)
    now = dict(model.named_parameters())
    assert now["model.embed_tokens.weight"] is parameters["model.embed_tokens.weight"]
    assert {id(w) for group in optimizer.param_groups for w in group["params"]} == {id(w) for w in now.values()}
    for name, weight in now.items():
        assert torch.equal(optimizer.state[weight]["exp_avg"], weight), name


def test_the_command_line_cuts_a_mixture_and_its_export_is_read(cli: Cli, place: Path, tmp_path: Path) -> None:
    loaded_of(place, "qwen2_moe")
    (tmp_path / "text.txt").write_text(story(1, 400))
    done = cli(
        "model=hf", f"model.name={place / 'qwen2_moe'}", "dataset=text", "dataset.path=text.txt", "dataset.seq_len=32",
        "dataset.calibration.n_samples=8", "measure=quality_only", "measure.max_windows=2", "method=structured",
        "method.units=[mlp,heads]", "amount=0.5", "export=hf", "hydra.run.dir=run",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "export")
    assert again.config.moe_intermediate_size == 24
    assert again.config.num_key_value_heads == 1


def test_units_that_are_not_there_are_refused_before_the_work(cli: Cli, place: Path, tmp_path: Path) -> None:
    loaded_of(place, "bloom")
    (tmp_path / "text.txt").write_text(story(1, 400))
    done = cli("model=hf", f"model.name={place / 'bloom'}", "dataset=text", "dataset.path=text.txt",
               "method=structured", "dataset.seq_len=32", "dataset.calibration.n_samples=8",
               "measure=quality_only")  # fmt: skip
    assert done.returncode == 2
    assert "MLP channels of this bloom model cannot be removed" in done.stderr
    assert "calibrating" not in done.stderr


def test_what_was_found_is_kept_by_config_and_not_where_weights_hide_it(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded_of(place, "gpt_oss").model
    found = found_anew(model), units_of(model)
    hidden = copy.deepcopy(model)
    forget_layout(hidden)
    forget_units(hidden)
    other_config = copy.deepcopy(hidden)
    other_config.config.initializer_range = 1e-4
    with torch.no_grad():
        for block in hidden.model.layers:
            block.self_attn.v_proj.weight.zero_()  # then no query or key moves anything
            block.self_attn.v_proj.bias.zero_()
    looked = list[str]()
    monkeypatch.setattr(found_units, "find_sets", lambda *args: looked.append("units") or [])
    monkeypatch.setattr(found_layouts, "_find_blocks", lambda model: looked.append("blocks") or "model.layers")
    again = copy.deepcopy(model)
    forget_layout(again)
    forget_units(again)
    assert (found_layouts.layout_of(again), units_of(again)) == found
    assert looked == []
    units_of(other_config)
    assert looked == ["blocks", "units"]
    monkeypatch.undo()
    with torch.no_grad():
        hidden.config.initializer_range = 2e-4  # of which nothing was kept
    assert "heads" in units_of(hidden).why_not
    whole = copy.deepcopy(model)
    whole.config.initializer_range = 2e-4
    forget_layout(whole)
    forget_units(whole)
    assert units_of(whole).groups.keys() == found[1].groups.keys()


def test_what_weights_decide_is_not_kept_for_other_models(place: Path) -> None:
    """A cap of logits is nothing to small ones: a model of the same config with large ones must be looked at."""
    model = loaded_of(place, "recurrent_gemma").model
    found = []
    for scale in (1e-3, 1e3):
        other = copy.deepcopy(model)
        forget_layout(other)
        with torch.no_grad():
            other.model.final_norm.weight.fill_(scale - 1)  # it multiplies by 1 + weight
        found.append(found_layouts.layout_of(other))
    assert [layout.whole_logits for layout in found] == [False, True]
    assert found[0].matrices == found[1].matrices


def found_anew(model: Any) -> found_layouts.Layout:
    forget_layout(model)
    forget_units(model)
    return found_layouts.layout_of(model)


@pytest.mark.parametrize(("amount", "said"), [(0.125, "leaves 84 of 96 channels of each expert"), (0.25, None)])
def test_widths_that_grouped_products_do_not_take_are_refused(amount: float, said: str | None, place: Path) -> None:
    """Stock transformers with such experts raises in its default implementation, in float32 and in bfloat16."""
    loaded = loaded_of(place, "mixtral")
    method, before = Structured(amount=amount), loaded.model.config.intermediate_size
    if said is None:
        method.check_model(Anatomy(loaded.model), [amount])
        method.prune(Anatomy(loaded.model), amount, 0)
        assert loaded.model.config.intermediate_size == before * 3 // 4
        return
    with pytest.raises(Refused, match=rf"{said}.*give method\.round_to=8"):
        method.check_model(Anatomy(loaded.model), [amount])
    config = copy.deepcopy(loaded.model.config)
    config.intermediate_size = 84
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    with pytest.raises(RuntimeError, match="multiple of 16 bytes"):
        model(input_ids=torch.arange(4, 20)[None])
    Structured(amount=amount, physical=False).check_model(Anatomy(loaded.model), [amount])
