"""Blocks of layouts that are found: what is left is the model with them bypassed, or they stay."""

from __future__ import annotations

import copy
import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CPU, Cli, copied, make_folder
from model_types import tiny_folder, tiny_model
from safetensors.torch import load_file
from test_found import TEXT, text  # noqa: F401 - a fixture
from torch import Tensor
from trainings import interrupted, same, training_of, weights_of
from transformers import AutoModelForCausalLM

from prune_lab.errors import Refused
from prune_lab.methods.depth import Depth
from prune_lab.models import fewer_blocks_config, found, removable_blocks
from prune_lab.models.anatomy import Anatomy
from prune_lab.models.export import check_reload, save_model
from prune_lab.models.families import FAMILIES
from prune_lab.models.load import HubModel, Loaded
from prune_lab.models.resize import dense_count, keep_blocks, original_blocks, shape_of
from prune_lab.pruning.block_importance import _distances, block_influence
from prune_lab.pruning.calibration import Calibrator
from prune_lab.pruning.pruned import Pruned
from prune_lab.pruning.surgery import take_shape
from prune_lab.recovery.finetune import Finetune
from prune_lab.recovery.optimizer import adamw, follow
from prune_lab.schedules import Iterative
from prune_lab.system.device import Device

WINDOWS = torch.randint(4, 300, (6, 24), generator=torch.Generator().manual_seed(7))
# Every way in which a config speaks of its blocks, and every kind of layout.
TYPES = [
    "olmo2", "gemma3", "qwen3_5", "gemma4", "mixtral", "deepseek_v3", "laguna", "ernie4_5_moe", "llama4", "bamba",
    "nemotron_h", "lfm2_moe", "recurrent_gemma", "gpt_neo", "granite_swa", "bert", "bart", "mamba2", "dbrx",
    "gemma3n_text", "zamba2", "got_ocr2", "codegen", "longcat_flash",
]  # fmt: skip
SLOW = (pytest.mark.slow, pytest.mark.process)
# Blocks that can go, of types of which others cannot.
SOME = {
    "minicpm3": [],  # scales by the number of blocks
    "diffllama": [2],  # a block's number enters
    "beam": [3],
    "hy_v4": [0, 2],  # a block takes what the one before chose
    "zamba": [0, 1, 3, 4],  # two blocks share their tensors
    "modernbert-decoder": [1, 2, 3],  # the first has no norm
    "rwkv": [1, 2],  # the first has one more
    "jamba": [3],  # kinds by a period
    "gemma4_text": [0, 1, 2],  # the last must see everything
    "minimax": [1, 2, 3],  # stock transformers takes the length of the cache from the first
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("types")


def folder_of(place: Path, model_type: str) -> Path:
    folder = place / model_type
    return folder if folder.exists() else tiny_folder(folder, model_type)


def loaded_of(place: Path, model_type: str, dtype: torch.dtype = torch.float32) -> Loaded:
    return HubModel(name=str(folder_of(place, model_type))).load(Device(torch.device("cpu"), dtype), seed=0)


def prune(model: Any, amount: float, by: str = "bi", **keys: Any) -> Pruned:
    return Depth(amount=amount, by=by).prune(Anatomy(model), amount, 0, Calibrator(WINDOWS, **keys))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=WINDOWS.long(), use_cache=False).logits


@torch.no_grad()
def same_but_for_rounding(found: Tensor, wanted: Tensor) -> bool:
    """Tensors elsewhere in memory, such as per-layer embeddings that were cut, may be added up in another order."""
    return float((found - wanted).abs().max()) <= 2e-6 * float(wanted.abs().max())


def logits_without(model: Any, gone: list[int]) -> Tensor:
    """Logits of a model each of whose blocks in `gone` gives the states that it is given."""

    def undo(_: Any, args: Any, kwargs: Any, out: Any) -> Any:
        states = args[0] if args else kwargs["hidden_states"]
        return (states, *out[1:]) if isinstance(out, tuple) else states

    blocks = model.get_submodule(found.layout_of(model).blocks)
    hooks = [blocks[index].register_forward_hook(undo, with_kwargs=True) for index in gone]
    try:
        return logits(model)
    finally:
        for hook in hooks:
            hook.remove()


def gone_of(pruned: Pruned) -> list[int]:
    (note,) = [warning for warning in pruned.warnings if warning.startswith("blocks removed of ")]
    return [int(part) for part in note.rpartition(": ")[2].split(", ")]


@pytest.mark.parametrize(
    ("family", "by"),
    [("llama", "bi"), ("gemma2", "angle"), ("gpt2", "kl"), ("gpt_neox", "perplexity"), ("phi3", "bi"),
     ("gemma3_text", "bi")],
)  # fmt: skip
def test_of_a_described_family_the_same_blocks_go(
    family: str, by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice, as in a schedule, with the same table; what is left has the same logits, bit by bit."""
    more = {"n_layer": 5} if family == "gpt2" else {"num_hidden_layers": 5}
    described = HubModel(name=str(make_folder(tmp_path / "m", family, **more))).load(CPU, seed=0)
    other = copied(described)
    wanted = [prune(described.model, amount, by) for amount in (0.2, 0.6)]
    monkeypatch.delitem(FAMILIES, family)
    got = [prune(other.model, amount, by) for amount in (0.2, 0.6)]
    assert [gone_of(pruned) for pruned in got] == [gone_of(pruned) for pruned in wanted]
    assert [sorted(map(str, pruned.rows)) for pruned in got] == [sorted(map(str, pruned.rows)) for pruned in wanted]
    assert (
        sum(row.before for row in got[1].rows) == sum(row.before for row in got[0].rows) == 5 * _size_of_a_block(family)
    )
    assert original_blocks(Anatomy(other.model)) == original_blocks(Anatomy(described.model))
    assert dense_count(Anatomy(other.model), "blocks") == 5
    assert torch.equal(logits(other.model), logits(described.model))
    assert other.model.config.to_dict() == described.model.config.to_dict()


def _size_of_a_block(family: str) -> int:
    """Weights of the matrices of a block of make_folder, by hand: queries and outputs, keys and values, the MLP."""
    groups, matrices = (32, 2) if family.startswith("gpt") else (16, 3)
    return 2 * 32 * 32 + 2 * 32 * groups + matrices * 32 * 48


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_both_ways_through_the_blocks_give_the_same_figures(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Block by block, and by hooks in passes through the whole model."""
    model = HubModel(name=str(make_folder(tmp_path / "m", family))).load(CPU, seed=0).model
    calibrator = Calibrator(WINDOWS, batch_size=4)
    influence, distances = (of(calibrator, Anatomy(model)) for of in (block_influence, _distances))
    monkeypatch.delitem(FAMILIES, family)
    layout = found.layout_of(model)
    found.keep(model, found.Layout(layout.blocks, layout.matrices, one_by_one=False))
    assert block_influence(calibrator, Anatomy(model)) == pytest.approx(influence, rel=1e-5)
    assert torch.tensor(_distances(calibrator, Anatomy(model))) == pytest.approx(torch.tensor(distances), abs=1e-5)
    assert influence[0] != pytest.approx(influence[1], rel=1e-2)


@pytest.mark.parametrize("model_type", [*TYPES[:12], *(pytest.param(name, marks=SLOW) for name in TYPES[12:])])
def test_what_is_left_is_the_model_with_the_block_bypassed(model_type: str, place: Path, tmp_path: Path) -> None:
    """Each block alone, bit by bit, with the same parameters; stock transformers reads what is written."""
    dense = loaded_of(place, model_type)
    count, staying = len(Anatomy(dense.model).blocks), removable_blocks.blocks_that_stay(Anatomy(dense.model))
    can_go = [index for index in range(count) if index not in staying]
    assert len(can_go) == {"gemma4": 3, "gemma3n_text": 2, "zamba2": 4}.get(model_type, count)
    for gone in can_go:
        loaded = copied(dense)
        before = {id(parameter) for parameter in loaded.model.parameters()}
        parts = keep_blocks(Anatomy(loaded.model), [index for index in range(count) if index != gone])
        assert same_but_for_rounding(logits(loaded.model), logits_without(dense.model, [gone]))
        assert len(Anatomy(loaded.model).blocks) == count - 1
        mine = {id(parameter) for parameter in loaded.model.parameters()}
        assert mine - before == {id(part.new) for part in parts}
    save_model(loaded, tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    torch.testing.assert_close(logits(again), logits_without(dense.model, [gone]))
    check_reload(loaded.model, tmp_path / "saved", WINDOWS[:1])


@pytest.mark.parametrize(
    ("model_type", "by"),
    [("mixtral", "bi"), ("qwen3_5", "angle"), ("llama4", "bi"), ("bamba", "angle"), ("bamba", "kl"),
     ("nemotron_h", "angle"), ("gemma4", "perplexity"), ("longcat_flash", "bi")],
)  # fmt: skip
def test_several_blocks_go_and_the_layout_follows(model_type: str, by: str, place: Path) -> None:
    """The layout that is kept is the one that would be found; the table is of the dense model's matrices."""
    dense = loaded_of(place, model_type)
    model, names = copied(dense).model, dict(Anatomy(dense.model).linears())
    pruned = prune(model, 0.5, by)
    gone = gone_of(pruned)
    assert len(gone) == round(len(Anatomy(dense.model).blocks) / 2 + 0.1)
    assert same_but_for_rounding(logits(model), logits_without(dense.model, gone))
    assert {row.layer for row in pruned.rows} == set(names)
    prefixes = tuple(f"{Anatomy(dense.model).family.blocks}.{index}." for index in gone)
    assert {row.layer for row in pruned.rows if row.removed} == {name for name in names if name.startswith(prefixes)}
    kept, other = found.layout_of(model), copy.deepcopy(model)
    del other.__dict__[found._KEPT]
    again = found.layout_of(other)
    assert (kept.blocks, kept.left_alone) == (again.blocks, again.left_alone)
    assert kept.share == pytest.approx(again.share)
    places = [{(matrix.name, matrix.place) for of in layout.matrices for matrix in of} for layout in (kept, again)]
    assert places[0] == places[1]


@pytest.mark.parametrize("model_type", SOME)
def test_blocks_that_cannot_go_stay(model_type: str, place: Path) -> None:
    """With a reason; more than can go are refused before anything is scored, and the model is as it was."""
    model = loaded_of(place, model_type).model
    anatomy, before = Anatomy(model), logits(model)
    count, staying = len(anatomy.blocks), removable_blocks.blocks_that_stay(anatomy)
    assert [index for index in range(count) if index not in staying] == SOME[model_type]
    assert all(staying.values())
    amount = (len(SOME[model_type]) + 1) / count
    if amount < 1:
        first = next(iter(staying))
        with pytest.raises(Refused, match=rf"method.amount={amount:g}.*of {count} blocks.*Block {first} cannot: "):
            Depth(amount=amount).check_model(anatomy, [0.0, amount])
    assert len(Anatomy(model).blocks) == count
    assert torch.equal(logits(model), before)
    if SOME[model_type]:
        dense, most = copy.deepcopy(model), 1 if model_type == "rwkv" else len(SOME[model_type])
        gone = gone_of(prune(model, most / count))
        assert len(gone) == most
        assert set(gone) <= set(SOME[model_type])
        assert same_but_for_rounding(logits(model), logits_without(dense, gone))


def test_states_of_a_token_count_as_one(place: Path) -> None:
    """hy_v4's has several (hyper-connections): the cosine is of all their numbers, in either way through the blocks."""
    model = loaded_of(place, "hy_v4").model
    layout, seen, hooks = found.layout_of(model), dict[int, float](), list[Any]()

    def look(index: int, was: Tensor, now: Tensor) -> None:
        assert was.dim() == 4
        rows = [
            (was[w, t].double().flatten(), now[w, t].double().flatten()) for w in range(len(was)) for t in range(24)
        ]
        seen[index] = 1 - sum(float(a @ b / (a.norm() * b.norm())) for a, b in rows) / len(rows)

    for index, block in enumerate(Anatomy(model).blocks):
        hooks.append(block.register_forward_hook(lambda _, args, out, index=index: look(index, args[0], out[0])))
    logits(model)
    for hook in hooks:
        hook.remove()
    for one_by_one in (True, False):
        found.keep(model, found.Layout(layout.blocks, layout.matrices, one_by_one=one_by_one))
        if one_by_one and not layout.one_by_one:
            continue
        assert block_influence(Calibrator(WINDOWS), Anatomy(model)) == pytest.approx([*seen.values()], rel=1e-4)


def test_a_block_that_text_does_not_run_has_no_influence() -> None:
    """Cross-attention to images in Mllama's text part: nothing turns there, and it is the first that goes."""
    model = tiny_model("mllama")
    assert model.model.config.cross_attention_layers == [1]
    influence = block_influence(Calibrator(WINDOWS), Anatomy(model))
    assert influence[1] == 0 < min(influence[0], *influence[2:])
    distances = _distances(Calibrator(WINDOWS), Anatomy(model))
    assert distances[1][2] == pytest.approx(0, abs=1e-6)
    assert all(distances[place][place + 1] > 1e-3 for place in (0, 2, 3))
    for by in ("bi", "angle"):
        assert gone_of(prune(copy.deepcopy(model), 0.25, by)) == [1]


@pytest.mark.parametrize(
    ("model_type", "count", "keys"),
    [("falcon_h1", 2, {}), ("falcon_h1", 5, {}), ("mamba2", 2, {}), ("xmod", 2, {"languages": ["en_XX", "de_DE"]})],
)
def test_a_list_that_is_as_long_by_chance_stays(model_type: str, count: int, keys: dict[str, Any]) -> None:
    """Multipliers of parts of an MLP, limits, languages: the config is tried without their entries, and with."""
    model = tiny_model(model_type, num_hidden_layers=count, **keys)
    lists = {
        key: value for key, value in model.config.to_dict().items() if isinstance(value, list) and len(value) == count
    }
    dense = copy.deepcopy(model)
    keep_blocks(Anatomy(model), [*range(1, count)])
    assert same_but_for_rounding(logits(model), logits_without(dense, [0]))
    for key in {"mlp_multipliers", "ssm_multipliers", "time_step_limit", "languages"} & lists.keys():
        assert model.config.to_dict()[key] == lists[key]


def test_a_block_whose_tensors_others_have_too_stays() -> None:
    """Zamba's hybrid blocks share theirs, which are known by the first one's name: the others can go."""
    model = tiny_model(
        "zamba", num_hidden_layers=9, layers_block_type=["linear_attention", "linear_attention", "hybrid"] * 3
    )
    anatomy = Anatomy(model)
    assert removable_blocks.blocks_that_stay(anatomy) == {2: "block 8 has its tensors, too"}
    matrices = {matrix.name for matrix in found.layout_of(model).matrices[2]}
    keep_blocks(anatomy, [0, 1, 2, 3, 4, 6, 7, 8])
    assert {matrix.name for matrix in found.layout_of(model).matrices[2]} == matrices


def test_a_run_of_blocks_is_one_of_those_that_can_go(place: Path) -> None:
    """hy_v4's first and last can, but not in a row; a token has several states."""
    model = loaded_of(place, "hy_v4").model
    with pytest.raises(Refused, match=r"removes 2 in a row of 3 blocks.*only blocks 0, 2 can"):
        prune(model, 0.6, "angle")
    assert gone_of(prune(model, 0.34, "angle")) in ([0], [2])


def hybrid(place: Path) -> Any:
    """Each of its two attentions can go; without any, stock transformers has no length of the cache.

    They change the states least.
    """
    model = loaded_of(place, "qwen3_next").model
    kinds = model.config.layer_types
    assert kinds == ["linear_attention", "full_attention"] * 2
    with torch.no_grad():
        for index, block in enumerate(Anatomy(model).blocks):
            for name, weight in block.named_parameters():
                if name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight", "down_proj")):
                    weight.mul_(0.01 if kinds[index] == "full_attention" else 3)
    return model


@pytest.mark.parametrize("by", ["bi", "perplexity", "kl"])
@pytest.mark.parametrize("amount", [0.5, 0.75])
def test_of_blocks_that_cannot_go_together_one_stays(by: str, amount: float, place: Path) -> None:
    """The best of them goes, and the best of the others; the run says so, and was not refused beforehand."""
    model = hybrid(place)
    influence = block_influence(Calibrator(WINDOWS), Anatomy(model))
    assert sorted(range(4), key=lambda index: influence[index])[:2] in ([1, 3], [3, 1])
    Depth(amount=amount, by=by).check_model(Anatomy(model), [amount])
    wanted = copy.deepcopy(model)
    pruned = prune(model, amount, by)
    gone = gone_of(pruned)
    assert len(gone) == 4 * amount
    assert not {1, 3} <= {*gone}
    if by == "bi":
        best = sorted(range(4), key=lambda index: influence[index])
        assert gone == sorted([best[0], *best[2:]][: len(gone)])
        assert sum("would have gone, and cannot together: what is left" in note for note in pruned.warnings) == 1
    torch.testing.assert_close(logits(model), logits_without(wanted, gone), rtol=1e-4, atol=1e-4)


def test_runs_that_cannot_go_are_refused_before_the_work() -> None:
    """Each run of three has both attentions; three blocks that are no run can go."""
    kinds = ["conv", "full_attention", "full_attention", "conv"]
    model = tiny_model("lfm2", num_hidden_layers=4, layer_types=kinds)
    with pytest.raises(Refused, match=r"removes 3 of 4 blocks.* no 3 are found that can go together: blocks 0, 1, 2"):
        Depth(amount=0.75, by="angle").check_model(Anatomy(model), [0.5, 0.75])
    Depth(amount=0.75).check_model(Anatomy(model), [0.5, 0.75])
    assert gone_of(prune(model, 0.5, "angle")) in ([0, 1], [2, 3])  # the third run is that of both


def test_attention_of_another_window_is_seen_without_a_text_that_is_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A config whose kinds of attention do not move along gives the logits of a short text, and is another model."""
    kinds = ["full_attention", "sliding_attention", "sliding_attention"]
    model = tiny_model("ministral", layer_types=kinds, sliding_window=64)
    kept = fewer_blocks_config._of_fewer

    def of_fewer(key: str, value: Any, *rest: Any) -> Any:
        return value[: len(rest[1])] if key == "layer_types" else kept(key, value, *rest)

    monkeypatch.setattr(fewer_blocks_config, "_of_fewer", of_fewer)
    staying = removable_blocks.blocks_that_stay(Anatomy(model))
    assert staying.keys() == {0}
    assert "layer_type=full_attention in place of sliding_attention" in staying[0]


FIELDS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"num_hidden_layers": 5, "n_layer": 5, "num_attention_heads": 5}, {"num_hidden_layers": 3, "n_layer": 3}),
    ({"decoder_layers": 5, "encoder_layers": 5, "num_encoder_layers": 5}, {"decoder_layers": 3}),
    ({"layer_types": list("abcde")}, {"layer_types": list("ade")}),
    ({"sparsity": [0.1, 0.2, 0.3, 0.4, 0.5]}, {"sparsity": [0.1, 0.4, 0.5]}),
    ({"no_rope_layers": [1, 0, 1, 1, 0]}, {"no_rope_layers": [1, 1, 0]}),
    ({"moe_layers": [1, 3], "attn_layer_indices": [0, 2, 4]}, {"moe_layers": [1], "attn_layer_indices": [0, 2]}),
    ({"mlp_only_layers": [0, 1, 2, 3, 4]}, {"mlp_only_layers": [0, 1, 2]}),
    ({"per_layer_config": {"1": {"d": 1}, "4": {"d": 2}}}, {"per_layer_config": {"2": {"d": 2}}}),
    ({"first_k_dense_replace": 2, "num_dense_layers": 4}, {"first_k_dense_replace": 1, "num_dense_layers": 2}),
    ({"moe_layer_start_index": 1, "moe_layer_end_index": 3}, {"moe_layer_start_index": 1, "moe_layer_end_index": 1}),
    ({"max_window_layers": 28}, {}),
    ({"num_kv_shared_layers": 2}, {}),
    ({"num_kv_shared_layers": 3}, {"num_kv_shared_layers": 2}),
    ({"block_types": ["r", "r", "a"]}, {"block_types": ["r", "r", "r"]}),
    ({"attention_types": [[["g", "l"], 2], [["x"], 1]]}, {"attention_types": [[["g", "l", "x"], 1]]}),
    ({"text_config": {"num_hidden_layers": 5, "layer_types": list("abcde")}},
     {"text_config": {"num_hidden_layers": 3, "layer_types": list("ade")}}),
    ({"vision_config": {"num_hidden_layers": 5}}, {}),
    ({"eos_token_id": [4, 5, 6, 7, 8], "suppress_tokens": [0, 1, 2, 3, 4]}, {}),
    ({"id2label": {str(i): i for i in range(5)}}, {}),
    ({"mtp_layers_block_type": list("abcde"), "num_experts": 5, "num_nextn_predict_layers": 5}, {}),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "changed"), FIELDS, ids=lambda value: next(iter(value), "none"))
def test_a_config_says_which_blocks_are_left(fields: dict[str, Any], changed: dict[str, Any]) -> None:
    """By hand: of five blocks the second and third go."""
    data = copy.deepcopy(fields)
    fewer_blocks_config.fewer(data, 5, [0, 3, 4])
    assert data == fields | changed


def test_embeddings_of_each_block_lose_their_part_and_the_optimizer_follows(place: Path) -> None:
    """Gemma's per-layer embeddings: columns, and rows of their projection; moments of what stays are kept."""
    model = copied(loaded_of(place, "gemma4_text")).model.requires_grad_(True)
    optimizer = adamw(model, Finetune(steps=1))
    model(input_ids=WINDOWS.long(), labels=WINDOWS.long()).loss.backward()
    optimizer.step()
    tables = {"embed_tokens_per_layer.weight": 1, "per_layer_model_projection.weight": 0}
    before = {name: model.get_parameter(f"model.{name}").detach().clone() for name in tables}
    moments = {id(weight): state["exp_avg"].clone() for weight, state in optimizer.state.items()}
    olds = {name: id(model.get_parameter(f"model.{name}")) for name in tables}
    block = id(model.model.layers[3].self_attn.q_proj.weight)
    parts = keep_blocks(Anatomy(model), [1, 3])
    follow(optimizer, model, parts)
    assert len(parts) == 2
    for name, dim in tables.items():
        now, size = model.get_parameter(f"model.{name}"), before[name].shape[dim] // 4
        for wanted, got in ((before[name], now), (moments[olds[name]], optimizer.state[now]["exp_avg"])):
            pieces = wanted.split(size, dim)
            assert torch.equal(got, torch.cat([pieces[1], pieces[3]], dim))
    kept = model.model.layers[1].self_attn.q_proj.weight
    assert id(kept) == block
    assert torch.equal(optimizer.state[kept]["exp_avg"], moments[block])
    assert set(optimizer.state) == set(model.parameters()) == {p for g in optimizer.param_groups for p in g["params"]}


@pytest.mark.parametrize("model_type", ["gemma4_text", "deepseek_v3"])
def test_a_training_goes_on_after_a_pruning_in_its_midst(model_type: str, place: Path, tmp_path: Path) -> None:
    """Blocks go at steps 4 and 8; interrupted at 10, it ends in the same weights, of the same blocks."""
    recipe = Finetune(steps=12, batch_size=2, lr=1e-3, checkpoint_every=1, validate_every=0)
    method, schedule = Depth(amount=0.5), Iterative(start=0.34, rounds=2)
    whole, cut, again = interrupted(
        recipe, folder_of(place, model_type), tmp_path, 10, method=method, schedule=schedule
    )  # fmt: skip
    assert cut.saved > 8
    assert same(weights_of(whole.loaded.model), weights_of(again.loaded.model))
    shapes = [shape_of(Anatomy(ended.loaded.model)) for ended in (whole, again)]
    assert shapes[0] == shapes[1]
    assert len(shapes[0].blocks) == 2 if model_type == "gemma4_text" else 1
    assert torch.equal(logits(whole.loaded.model), logits(again.loaded.model))
    assert [str(row) for row in whole.training.pruned.rows] == [str(row) for row in again.training.pruned.rows]
    dense = loaded_of(place, model_type).model
    take_shape(Anatomy(dense), shapes[0])
    assert {n: p.shape for n, p in dense.named_parameters()} == {
        n: p.shape for n, p in whole.loaded.model.named_parameters()
    }


def test_blocks_go_in_a_training_of_a_model_that_was_loaded_in_bfloat16(place: Path, tmp_path: Path) -> None:
    """Weights are float32 meanwhile and buffers are not; what a type keeps in float32 is so afterwards, renumbered."""
    place_of, cpu = folder_of(place, "glm4_moe_lite"), Device(torch.device("cpu"), torch.bfloat16)
    dense, loaded = (HubModel(name=str(place_of)).load(cpu, seed=0) for _ in range(2))
    kept = {name for name, weight in dense.model.named_parameters() if weight.dtype == torch.float32}
    assert kept
    assert not any(".layers.0." in name for name in kept)
    keep_blocks(Anatomy(loaded.model), [1, 2])
    recipe = Finetune(steps=2, batch_size=2, validate_every=0)
    recipe.recover(loaded.model, training_of(dense, tmp_path, steps=2, device=cpu))
    wanted = {
        name.replace(f".layers.{old}.", f".layers.{old - 1}.") for old in (1, 2) for name in kept if f".{old}." in name
    }
    assert {name for name, weight in loaded.model.named_parameters() if weight.dtype == torch.float32} == wanted
    assert all(weight.dtype in (torch.float32, torch.bfloat16) for weight in loaded.model.parameters())


def test_buffers_have_the_number_type_that_was_loaded(place: Path, tmp_path: Path) -> None:
    """Gemma scales its embeddings by a number that is rounded to bfloat16, in a training too."""
    model = loaded_of(place, "gemma4_text", torch.bfloat16).model
    model.save_pretrained(tmp_path / "saved")  # as a run does of the dense model: its config then has the type's name
    for weight in model.parameters():
        weight.data = weight.data.float()
    scales = {name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith("embed_scale")}
    assert all(buffer.dtype == torch.bfloat16 for buffer in scales.values())
    assert len(scales) == 2
    keep_blocks(Anatomy(model), [1, 2, 3])
    for name, buffer in scales.items():
        assert model.get_buffer(name).dtype == buffer.dtype
        assert torch.equal(model.get_buffer(name), buffer)


def test_rounded_buffers_of_a_used_model_are_no_reason_to_stay(place: Path) -> None:
    """GPT-J rounds its table of positions when it runs in bfloat16, and keeps it so while its weights are float32."""
    model = loaded_of(place, "gptj", torch.bfloat16).model
    logits(model)
    for weight in model.parameters():
        weight.data = weight.data.float()
    assert removable_blocks.blocks_that_stay(Anatomy(model)) == {}


def test_the_command_line_removes_blocks_of_experts(cli: Cli, place: Path, tmp_path: Path, text: str) -> None:  # noqa: F811
    keys = [f"model.name={folder_of(place, 'mixtral')}", text, *TEXT, "measure=quality_only", "hydra.run.dir=run"]
    done = cli("model=hf", *keys, "method=depth", "amount=0.34", "export=hf")
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    (note,) = [warning for warning in summary["warnings"] if warning.startswith("blocks removed of 3")]
    gone = int(note.rpartition(": ")[2])
    config = json.loads((tmp_path / "run" / "export" / "config.json").read_text())
    assert config["num_hidden_layers"] == 2
    names = load_file(tmp_path / "run" / "export" / "model.safetensors")
    assert {name.split(".")[2] for name in names if ".layers." in name} == {"0", "1"}
    rows = list(csv.DictReader((tmp_path / "run" / "layers.csv").read_text().splitlines()))
    assert {row["layer"].split(".")[2] for row in rows if row["removed"] == row["before"]} == {str(gone)}
    assert {row["layer"] for row in rows if row["removed"] != "0" and row["left_alone"]} == {
        f"model.layers.{gone}.mlp.gate.weight"
    }


@pytest.mark.parametrize(
    ("model_type", "keys", "words"),
    [
        ("minicpm3", ["amount=0.5"], ["method.amount=0.5", "2 of 3 blocks", "none can", "Block 0 cannot"]),
        ("mixtral", ["method.refit=residual"], ["method.refit=residual", "mixtral", "method.refit=none", "llama"]),
    ],
)
def test_what_blocks_cannot_do_is_refused_before_anything_is_measured(
    model_type: str, keys: list[str], words: list[str], cli: Cli, place: Path, tmp_path: Path, text: str  # noqa: F811
) -> None:  # fmt: skip
    name = f"model.name={folder_of(place, model_type)}"
    done = cli("model=hf", name, text, *TEXT, "measure=quality_only", "method=depth", *keys)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "cache" / "baseline").exists()
    for word in words:
        assert word in done.stderr, done.stderr
