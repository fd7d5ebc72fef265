"""Surgery is right when the sliced model computes what the dense one does with the same units zeroed.

Of families that name their parts as Llama does; of the others, and what holds for all: test_families.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CPU, FAMILIES, copied, logits, make_folder
from torch import Tensor
from transformers import AutoModelForCausalLM

from prune_lab.errors import Refused
from prune_lab.methods.structured import Structured
from prune_lab.models.anatomy import Anatomy
from prune_lab.models.export import check_reload, save_model
from prune_lab.models.load import HubModel, Loaded
from prune_lab.pruning.calibration import Calibrator
from prune_lab.pruning.pruned import Pruned

# A Llama with biases everywhere: those of down and o belong to no unit and must stay.
VARIANTS = {**{family: {} for family in FAMILIES}, "llama with biases": {"attention_bias": True, "mlp_bias": True}}
# Both kinds of units at once in every variant; each kind alone in a Llama with biases, where all of them can be seen.
UNITS = [(variant, ["mlp", "heads"]) for variant in VARIANTS]
UNITS += [("llama with biases", [kind]) for kind in ("mlp", "heads")]
every_kind = pytest.mark.parametrize(("variant", "units"), UNITS)
MLP, HEADS, QUERY_PER_KV, HEAD_DIM = 48, 2, 2, 8
WINDOWS = torch.randint(300, (6, 24), generator=torch.Generator().manual_seed(7))  # to calibrate on


@pytest.fixture(scope="module")
def dense_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Loaded]:
    """One small model of each family, loaded in float32; to be copied, never changed."""
    place = tmp_path_factory.mktemp("structured")
    folders = {name: make_folder(place / name, name.split()[0], **changes) for name, changes in VARIANTS.items()}
    return {name: HubModel(name=str(folder)).load(CPU, seed=0) for name, folder in folders.items()}


def prune(loaded: Loaded, seed: int = 0, **keys: Any) -> Pruned:
    method = Structured(**{"physical": True, **keys})
    return method.prune(Anatomy(loaded.model), method.amount, seed)


def weights(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def mlp_norms(block: Any, order: int) -> Tensor:
    """The norm over all weights of each MLP channel, one channel at a time."""
    mlp = block.mlp
    parts = [(mlp.gate_proj.weight[i], mlp.up_proj.weight[i], mlp.down_proj.weight[:, i]) for i in range(MLP)]
    return torch.stack([torch.linalg.vector_norm(torch.cat(part), ord=order) for part in parts])


def head_norms(block: Any, order: int) -> Tensor:
    """The norm over all weights of each KV group, one group at a time."""
    att, norms = block.self_attn, []
    for group in range(HEADS):
        q = range(group * QUERY_PER_KV * HEAD_DIM, (group + 1) * QUERY_PER_KV * HEAD_DIM)
        kv = range(group * HEAD_DIM, (group + 1) * HEAD_DIM)
        rows = [att.q_proj.weight[q], att.k_proj.weight[kv], att.v_proj.weight[kv], att.o_proj.weight[:, q]]
        norms.append(torch.linalg.vector_norm(torch.cat([row.flatten() for row in rows]), ord=order))
    return torch.stack(norms)


@torch.no_grad()
def zero_by_hand(model: Any, units: list[str], drop_mlp: int, drop_heads: int, order: int = 2) -> None:
    """The definition of the masked-dense model, with plain indexing: weights and biases of the dropped units are 0."""
    for block in model.model.layers:
        if "mlp" in units:
            for i in mlp_norms(block, order).argsort(stable=True)[:drop_mlp].tolist():
                for linear in (block.mlp.gate_proj, block.mlp.up_proj):
                    linear.weight[i] = 0
                    if linear.bias is not None:
                        linear.bias[i] = 0
                block.mlp.down_proj.weight[:, i] = 0
        if "heads" in units:
            att = block.self_attn
            for g in head_norms(block, order).argsort(stable=True)[:drop_heads].tolist():
                for linear, heads in ((att.q_proj, QUERY_PER_KV), (att.k_proj, 1), (att.v_proj, 1)):
                    rows = slice(g * heads * HEAD_DIM, (g + 1) * heads * HEAD_DIM)
                    linear.weight[rows] = 0
                    if linear.bias is not None:
                        linear.bias[rows] = 0
                att.o_proj.weight[:, g * QUERY_PER_KV * HEAD_DIM : (g + 1) * QUERY_PER_KV * HEAD_DIM] = 0


@every_kind
def test_sliced_equals_masked(dense_models: dict[str, Loaded], variant: str, units: list[str]) -> None:
    """fp32, 1e-5, against the package's own masks and against a model zeroed by hand."""
    dense = dense_models[variant]
    sliced, masked, by_hand = copied(dense), copied(dense), copied(dense)
    prune(sliced, units=tuple(units), amount=0.5)
    prune(masked, units=tuple(units), amount=0.5, physical=False)
    zero_by_hand(by_hand.model, units, drop_mlp=24, drop_heads=1)
    found = logits(sliced.model)
    torch.testing.assert_close(found, logits(masked.model), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found, logits(by_hand.model), atol=1e-5, rtol=1e-5)
    assert (found - logits(dense.model)).abs().max() > 0.01  # something was removed that mattered


@every_kind
def test_every_block_and_the_config_hold_the_same_count(
    dense_models: dict[str, Loaded], variant: str, units: list[str]
) -> None:
    loaded = copied(dense_models[variant])
    prune(loaded, units=tuple(units), amount=0.5)
    mlp, heads = (MLP // 2 if "mlp" in units else MLP), (HEADS // 2 if "heads" in units else HEADS)
    config = loaded.model.config
    assert config.intermediate_size == mlp
    assert (config.num_key_value_heads, config.num_attention_heads) == (heads, heads * QUERY_PER_KV)
    for block in loaded.model.model.layers:
        att = block.self_attn
        for linear, rows, columns in (
            (block.mlp.gate_proj, mlp, 32), (block.mlp.up_proj, mlp, 32), (block.mlp.down_proj, 32, mlp),
            (att.q_proj, heads * QUERY_PER_KV * HEAD_DIM, 32), (att.k_proj, heads * HEAD_DIM, 32),
            (att.v_proj, heads * HEAD_DIM, 32), (att.o_proj, 32, heads * QUERY_PER_KV * HEAD_DIM),
        ):  # fmt: skip
            assert linear.weight.shape == (rows, columns) == (linear.out_features, linear.in_features)
            assert linear.bias is None or linear.bias.shape == (rows,)


def test_biases_leave_with_their_rows(dense_models: dict[str, Loaded]) -> None:
    """q, k and v of Qwen2 have biases; one that stayed, or went to another head, would shift every key."""
    dense, cut = dense_models["qwen2"].model, copied(dense_models["qwen2"])
    prune(cut, units=("heads",), amount=0.5)
    for before, after in zip(dense.model.layers, cut.model.model.layers, strict=True):
        kept = int(head_norms(before, 2).argmax())
        for name, heads in (("q_proj", QUERY_PER_KV), ("k_proj", 1), ("v_proj", 1)):
            rows = slice(kept * heads * HEAD_DIM, (kept + 1) * heads * HEAD_DIM)
            was, now = before.self_attn.get_submodule(name), after.self_attn.get_submodule(name)
            assert now.bias.abs().min() > 0
            assert torch.equal(now.bias, was.bias[rows])
            assert torch.equal(now.weight, was.weight[rows])


def test_the_bias_makes_up_for_what_units_gave_on_average(dense_models: dict[str, Loaded]) -> None:
    """FLAP's compensation by hand: what the dropped inputs of the first block's down projection gave on average."""
    dense, cut = dense_models["llama with biases"].model, copied(dense_models["llama with biases"])
    rows: list[Tensor] = []
    down = dense.model.layers[0].mlp.down_proj
    hook = down.register_forward_pre_hook(lambda _, args: rows.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        dense(input_ids=WINDOWS, use_cache=False)
    hook.remove()
    method = Structured(amount=0.5, score="wifv", refit="bias")
    method.prune(Anatomy(cut.model), 0.5, 0, Calibrator(WINDOWS))
    score = (down.weight.square() * rows[0].var(dim=0)).sum(0)
    gone = score.argsort()[: MLP // 2]
    shift = down.weight[:, gone] @ rows[0].mean(0)[gone]
    assert shift.abs().max() > 0.01
    found = cut.model.model.layers[0].mlp.down_proj.bias
    torch.testing.assert_close(found, down.bias + shift, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def plant(block: Any, channel: int, value: float, single: bool) -> None:
    """Gives a channel one weight of `value`, or `value` everywhere."""
    for lines in (block.mlp.gate_proj.weight[channel], block.mlp.up_proj.weight[channel]):
        lines.fill_(0 if single else value)
    block.mlp.down_proj.weight[:, channel] = 0 if single else value
    if single:
        block.mlp.up_proj.weight[channel, 7] = value


@pytest.mark.parametrize(("score", "gone"), [("l2", 9), ("l1", 5)])
def test_norms_choose_as_computed_by_hand(dense_models: dict[str, Loaded], score: str, gone: int) -> None:
    """Channel 5: a single 4 (l1 4, l2 4). Channel 9: 96 weights of 0.1 (l1 9.6, l2 0.98). The others are larger."""
    loaded = copied(dense_models["llama"])
    for block in loaded.model.model.layers:
        for linear in (block.mlp.gate_proj, block.mlp.up_proj, block.mlp.down_proj):
            torch.nn.init.ones_(linear.weight)
        plant(block, 5, 4.0, single=True)
        plant(block, 9, 0.1, single=False)
    before = weights(loaded.model)
    pruned = prune(loaded, amount=1 / MLP, score=score)
    assert pruned.realized == pytest.approx(1 / MLP)
    stay = [i for i in range(MLP) if i != gone]
    for index, block in enumerate(loaded.model.model.layers):
        name = f"model.layers.{index}.mlp"
        assert torch.equal(block.mlp.gate_proj.weight, before[f"{name}.gate_proj.weight"][stay])
        assert torch.equal(block.mlp.up_proj.weight, before[f"{name}.up_proj.weight"][stay])
        assert torch.equal(block.mlp.down_proj.weight, before[f"{name}.down_proj.weight"][:, stay])


@pytest.mark.parametrize("score", ["l2", "l1"])
def test_each_block_drops_its_own_planted_channels(dense_models: dict[str, Loaded], score: str) -> None:
    """Small in gate alone is not small: the channel 20 of each block, whose gate is zero, must stay."""
    loaded, planted = copied(dense_models["qwen3"]), ([3, 17, 40], [0, 21, 47])
    with torch.no_grad():
        for block, channels in zip(loaded.model.model.layers, planted, strict=True):
            for channel in channels:
                block.mlp.gate_proj.weight[channel] *= 0.1
                block.mlp.up_proj.weight[channel] *= 0.1
                block.mlp.down_proj.weight[:, channel] *= 0.1
            block.mlp.gate_proj.weight[20] = 0
    before = weights(loaded.model)
    prune(loaded, amount=3 / MLP, score=score)
    for index, channels in enumerate(planted):
        stay = [i for i in range(MLP) if i not in channels]
        found = loaded.model.model.layers[index].mlp.up_proj.weight
        assert torch.equal(found, before[f"model.layers.{index}.mlp.up_proj.weight"][stay])


def test_random_units_follow_the_seed(dense_models: dict[str, Loaded]) -> None:
    models = [copied(dense_models["llama"]) for _ in range(3)]
    for loaded, seed in zip(models, (1, 1, 2), strict=True):
        prune(loaded, seed=seed, score="random", amount=0.5)
    first, same, other = (weights(loaded.model) for loaded in models)
    assert all(torch.equal(first[name], same[name]) for name in first)
    gates = [name for name in first if name.endswith("gate_proj.weight")]
    assert all(not torch.equal(first[name], other[name]) for name in gates)
    assert not torch.equal(first[gates[0]], first[gates[1]])


@every_kind
def test_an_export_loads_and_generates_in_stock_transformers(
    dense_models: dict[str, Loaded], variant: str, units: list[str], tmp_path: Path
) -> None:
    loaded = copied(dense_models[variant])
    prune(loaded, units=tuple(units), amount=0.5)
    save_model(loaded, tmp_path / "export")
    prompt = torch.tensor([[11, 250, 7, 93]])
    check_reload(loaded.model, tmp_path / "export", prompt)
    again, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "export", dtype=torch.float32, use_safetensors=True, output_loading_info=True
    )
    assert not any(report.values()), report
    torch.testing.assert_close(logits(again.eval()), logits(loaded.model), atol=1e-6, rtol=0)
    given = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    for model in (again, loaded.model):  # the sliced model in memory must decode as well as its export
        ids = [model.generate(prompt, use_cache=cache, **given) for cache in (True, False)]
        assert ids[0].shape == (1, 16)
        assert torch.equal(*ids)


def many_heads(folder: Path, family: str) -> Loaded:
    """8 query heads of 4 in 4 KV groups at hidden 32: 3 groups are 6 heads, and 32 % 6 is not 0."""
    made = make_folder(folder, family, num_attention_heads=8, num_key_value_heads=4, head_dim=4)
    return HubModel(name=str(made)).load(CPU, seed=0)


# Their stock configs want the query heads to divide hidden_size. So does Llama's, which goes on as a Mistral then.
STRICT = ("gemma2", "gemma3_text")


@pytest.mark.parametrize("family", STRICT)
@pytest.mark.parametrize("units", [("heads",), ("mlp", "heads")], ids="+".join)
def test_head_counts_a_config_cannot_hold_are_refused(tmp_path: Path, units: tuple[str, ...], family: str) -> None:
    """The message names the counts that are possible, and nothing has been cut."""
    loaded = many_heads(tmp_path / family, family)
    before = weights(loaded.model)
    with pytest.raises(
        Refused,
        match=r"3 of 4 KV groups.*must divide hidden_size=32; .*1 \(amount=0\.75\), 2 \(amount=0\.5\), 4 \(amount=0\)",
    ):
        prune(loaded, units=units, amount=0.25)
    after = weights(loaded.model)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert loaded.model.config.num_attention_heads == 8
    with pytest.raises(Exception, match=r"divisible|multiple"):  # what stock transformers says of 3 groups
        make_folder(tmp_path / "three", family, num_attention_heads=6, num_key_value_heads=3, head_dim=4)


@pytest.mark.parametrize("amount", [0.5, 0.75])
def test_head_counts_named_as_possible_are_possible(tmp_path: Path, amount: float) -> None:
    loaded = many_heads(tmp_path / "llama", "llama")
    assert prune(loaded, units=("heads",), amount=amount).realized == amount
    save_model(loaded, tmp_path / "export")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32).eval()
    torch.testing.assert_close(logits(again), logits(loaded.model), atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(STRICT)))
def test_other_families_hold_what_a_llama_cannot(tmp_path: Path, family: str) -> None:
    loaded = many_heads(tmp_path / family, family)
    masked = copied(loaded)
    assert prune(loaded, units=("heads",), amount=0.25).realized == 0.25
    prune(masked, units=("heads",), amount=0.25, physical=False)
    torch.testing.assert_close(logits(loaded.model), logits(masked.model), atol=1e-5, rtol=1e-5)
    save_model(loaded, tmp_path / "export")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32).eval()
    assert again.config.num_key_value_heads == 3
    torch.testing.assert_close(logits(again), logits(loaded.model), atol=1e-6, rtol=0)


def test_a_llama_may_zero_what_it_cannot_hold(tmp_path: Path) -> None:
    loaded = many_heads(tmp_path / "llama", "llama")
    assert prune(loaded, units=("heads",), amount=0.25, physical=False).realized == 0.25


@pytest.mark.parametrize(
    ("width", "amount", "round_to", "kept"),
    [
        (48, 0.0, 16, 48),
        (48, 0.3, None, 34),  # 48 * 0.3 = 14.4 are 14
        (48, 0.3, 16, 32),
        (48, 0.3, 1, 34),
        (48, 0.55, 8, 24),  # 22 stay, nearest to 24
        (48, 0.9, 16, 16),  # 5 stay: at least one run of 16
        (44, 0.02, 16, 32),  # 43 stay, nearest to 48, which is more than there are
    ],
)
def test_round_to_keeps_a_multiple(tmp_path: Path, width: int, amount: float, round_to: int | None, kept: int) -> None:
    loaded = HubModel(name=str(make_folder(tmp_path / "model", intermediate_size=width))).load(CPU, seed=0)
    pruned = prune(loaded, amount=amount, round_to=round_to)
    assert loaded.model.config.intermediate_size == kept
    assert pruned.realized == pytest.approx(1 - kept / width)


@pytest.mark.parametrize("variant", ["llama with biases", "gemma2"])
@pytest.mark.parametrize("physical", [True, False])
def test_one_unit_of_each_kind_always_stays(
    dense_models: dict[str, Loaded], variant: str, physical: bool, tmp_path: Path
) -> None:
    loaded = copied(dense_models[variant])
    pruned = prune(loaded, units=("mlp", "heads"), amount=0.999, physical=physical)
    rows = {row.layer: row for row in pruned.rows}
    for index, block in enumerate(loaded.model.model.layers):
        assert int(block.mlp.gate_proj.weight.any(1).sum()) == 1
        assert int(block.self_attn.k_proj.weight.any(1).sum()) == HEAD_DIM
        gate, key = (rows[f"model.layers.{index}.{name}"] for name in ("mlp.gate_proj", "self_attn.k_proj"))
        assert gate.removed == gate.before // MLP * (MLP - 1)
        assert key.removed == key.before // HEADS
    assert logits(loaded.model).isfinite().all()


@every_kind
def test_the_table_counts_what_left_the_model(dense_models: dict[str, Loaded], variant: str, units: list[str]) -> None:
    """Per Linear against the sizes of its own tensors, biases with their rows."""
    dense, loaded = dense_models[variant], copied(dense_models[variant])
    pruned = prune(loaded, units=tuple(units), amount=0.5)
    names = {"mlp": ("gate_proj", "up_proj", "down_proj"), "heads": ("q_proj", "k_proj", "v_proj", "o_proj")}
    wanted = {name for unit in units for name in names[unit]}
    assert {row.layer.rpartition(".")[2] for row in pruned.rows} == wanted
    assert len(pruned.rows) == 2 * len(wanted)
    for row in pruned.rows:
        was, now = (sum(p.numel() for p in m.model.get_submodule(row.layer).parameters()) for m in (dense, loaded))
        assert row.removed == was - now
    left = [sum(p.numel() for p in m.model.parameters()) for m in (dense, loaded)]
    assert sum(row.removed for row in pruned.rows) == left[0] - left[1]
    assert pruned.realized == pytest.approx(0.5)


@pytest.mark.parametrize("amount", [0.1, 0.25, 0.6, 0.98])
def test_the_realised_amount_is_a_whole_number_of_units(dense_models: dict[str, Loaded], amount: float) -> None:
    loaded = copied(dense_models["mistral"])
    pruned = prune(loaded, amount=amount)
    units = round(pruned.realized * MLP, 6)
    assert units == int(units) == MLP - loaded.model.config.intermediate_size
    assert abs(units - amount * MLP) <= 0.5


@pytest.mark.parametrize("variant", VARIANTS)
def test_not_physical_keeps_every_shape(dense_models: dict[str, Loaded], variant: str) -> None:
    dense, masked = dense_models[variant], copied(dense_models[variant])
    config = masked.model.config.to_dict()
    pruned = prune(masked, units=("mlp", "heads"), amount=0.5, physical=False)
    before, after = weights(dense.model), weights(masked.model)
    assert {name: t.shape for name, t in before.items()} == {name: t.shape for name, t in after.items()}
    assert masked.model.config.to_dict() == config
    for row in pruned.rows:
        zeros = int((after[f"{row.layer}.weight"] == 0).sum())
        assert zeros == before[f"{row.layer}.weight"].numel() // 2
        assert torch.equal(pruned.masks.keep[row.layer], after[f"{row.layer}.weight"] != 0)
        if f"{row.layer}.bias" in after and "o_proj" not in row.layer and "down_proj" not in row.layer:
            assert torch.equal(after[f"{row.layer}.bias"] != 0, after[f"{row.layer}.weight"].any(1))


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"units": ()}, r"units=\[\] must be one or more of mlp, heads"),
        ({"units": ("mlp", "mlp")}, "units="),
        ({"units": ("blocks",)}, r"units=\['blocks'\]"),
        ({"score": "l3"}, "score='l3' is not one of l2, l1, random"),
        ({"round_to": 0}, "round_to=0 must be at least 1"),
        ({"amount": 1.0}, r"amount=1.0 is outside \[0, 1\)"),
    ],
)
def test_wrong_keys_are_refused(keys: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Structured(**keys)
