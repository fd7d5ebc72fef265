"""What every pruning method promises, checked for each option of conf/method and each family of models."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CPU, FAMILIES, ROOT, make_folder
from omegaconf import OmegaConf
from torch import Tensor, nn

from prune_lab.config import build
from prune_lab.device import Device
from prune_lab.errors import Refused
from prune_lab.methods.base import Method, Pruned, WeightMethod
from prune_lab.models.anatomy import Anatomy
from prune_lab.models.load import HubModel

OPTIONS = sorted(path.stem for path in (ROOT / "conf" / "method").glob("*.yaml"))
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def method(option: str, amount: float = 0.5, **keys: Any) -> Any:
    """The method that conf/method/`option`.yaml describes, with other keys if given, built as a run builds it."""
    node = OmegaConf.load(ROOT / "conf" / "method" / f"{option}.yaml")
    root = OmegaConf.create({"amount": amount, "method": OmegaConf.merge(node, keys)})
    return build(root.method, "method")


def prunes(built: Method) -> bool:
    return "amount" not in built.not_applicable


WEIGHT_OPTIONS = [name for name in OPTIONS if isinstance(method(name), WeightMethod) and prunes(method(name))]
# Every option as it is shipped, and again with each scope or with whole units zeroed in place.
CASES: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in OPTIONS]
CASES += [(name, {"scope": "global"}) for name in WEIGHT_OPTIONS]
CASES += [(name, {"units": ["mlp", "heads"]}) for name in OPTIONS if hasattr(method(name), "units")]
IN_PLACE = [(name, keys | ({"physical": False} if hasattr(method(name), "physical") else {})) for name, keys in CASES]
CASE = pytest.mark.parametrize(("option", "keys"), CASES, ids=str)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One small model of each family, its output head untied so that it could be pruned by mistake."""
    place = tmp_path_factory.mktemp("methods")
    made = {family: make_folder(place / family, family, tie_word_embeddings=False) for family in FAMILIES}
    return {family: HubModel(name=str(folder)).load(CPU, seed=0).model for family, folder in made.items()}


def coarse(model: Any, dtype: torch.dtype) -> Any:
    """A copy whose weights have a few dozen magnitudes and no zeros: heavy ties, and every zero is a pruned weight."""
    model = copy.deepcopy(model).to(dtype)
    with torch.no_grad():
        for weight in linears(model).values():
            weight.copy_(weight.sign() * (weight.abs() * 10).ceil().clamp(min=1) / 10)
            assert weight.abs().unique().numel() < 60
    return model


def linears(model: Any) -> dict[str, Tensor]:
    """The weights of the Linears inside the decoder blocks, found without the package's help."""
    return {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("model.layers.")
    }


def prune(built: Method, model: Any, amount: float | None = None, seed: int = 0) -> Pruned:
    return built.prune(Anatomy(model), built.amount if amount is None else amount, seed)


def zeros(model: Any) -> dict[str, Tensor]:
    return {name: weight == 0 for name, weight in linears(model).items()}


@torch.no_grad()
def logits(model: Any) -> Tensor:
    tokens = torch.randint(300, (2, 16), generator=torch.Generator().manual_seed(3))
    return model(input_ids=tokens, use_cache=False).logits


def test_every_option_is_here() -> None:
    """The contract must not shrink unseen: the first options, and those that prune weights."""
    assert {"none", "magnitude", "random", "structured"} <= set(OPTIONS)
    assert {"magnitude", "random"} <= set(WEIGHT_OPTIONS)
    assert "none" not in WEIGHT_OPTIONS


@CASE
@pytest.mark.parametrize("family", FAMILIES)
def test_amount_0_changes_nothing(models: dict[str, Any], family: str, option: str, keys: dict[str, Any]) -> None:
    """The export is that of method=none, its config too; the reference code's `W <= sorted[0]` removes a weight."""
    model = copy.deepcopy(models[family])
    pruned = prune(method(option, amount=0.0, **keys), model)
    before, after = models[family].state_dict(), model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(logits(models[family]), logits(model))
    assert pruned.realized == 0
    assert model.config.to_dict() == models[family].config.to_dict()


@CASE
@pytest.mark.parametrize("family", FAMILIES)
def test_only_linears_in_blocks_are_touched(
    models: dict[str, Any], family: str, option: str, keys: dict[str, Any]
) -> None:
    """Never embeddings, output head or norms, and the biases of what is pruned weight by weight neither."""
    model = copy.deepcopy(models[family])
    pruned = prune(method(option, amount=0.5, **keys), model)
    inside, biases_too = set(linears(model)), not isinstance(method(option), WeightMethod)
    after = model.state_dict()
    for name, tensor in models[family].state_dict().items():
        if name in inside or (biases_too and name.endswith("proj.bias")):
            continue
        assert torch.equal(tensor, after[name]), name
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert torch.equal(models[family].state_dict()[name], after[name])
    assert {f"{row.layer}.weight" for row in pruned.rows} <= inside


@CASE
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("amount", [0.1, 0.5, 0.7])
def test_the_realised_amount_is_the_requested_one(
    models: dict[str, Any], dtype: torch.dtype, amount: float, option: str, keys: dict[str, Any]
) -> None:
    """Within one unit per comparison group, where a threshold would take thousands of ties: counted in the tensors."""
    if "heads" in keys.get("units", ()):
        amount = 0.5  # of two KV groups
    dense = coarse(models["llama"], dtype)
    model = copy.deepcopy(dense)
    built = method(option, amount=amount, **keys)
    pruned = prune(built, model)
    after, total, gone = linears(model), 0, 0
    for name, weight in linears(dense).items():
        assert after[name].dtype == dtype
        removed = weight.numel() - int(after[name].count_nonzero())
        rows = [row for row in pruned.rows if f"{row.layer}.weight" == name]
        assert removed == sum(row.removed for row in rows)
        total, gone = total + sum(row.before for row in rows), gone + removed
        if isinstance(built, WeightMethod) and prunes(built) and built.scope == "layer":
            assert abs(removed - amount * weight.numel()) <= 1
    assert pruned.realized == pytest.approx(gone / total if total else 0)
    if isinstance(built, WeightMethod):
        assert abs(gone - amount * total) <= len(after)
        assert (gone == 0) is not prunes(built)
    else:
        units = model.config.intermediate_size
        assert abs(units - (1 - amount) * dense.config.intermediate_size) <= 1
        assert abs(pruned.realized - amount) <= 1 / 48


@pytest.mark.parametrize(("option", "keys"), IN_PLACE, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_zeros_nest_across_amounts(models: dict[str, Any], family: str, option: str, keys: dict[str, Any]) -> None:
    """More of the same: whatever a lower amount prunes, a higher one does too, given the same seed."""
    found = []
    for amount in (0.1, 0.4, 0.7, 0.9):
        model = coarse(models[family], torch.float32)
        prune(method(option, amount=amount, **keys), model, seed=5)
        found.append(zeros(model))
    for fewer, more in itertools.pairwise(found):
        assert all(not (fewer[name] & ~more[name]).any() for name in fewer)
    if prunes(method(option)):
        assert sum(int(z.sum()) for z in found[0].values()) < sum(int(z.sum()) for z in found[-1].values())


@pytest.mark.parametrize(("option", "keys"), [case for case in IN_PLACE if case[0] in WEIGHT_OPTIONS], ids=str)
def test_amounts_are_cumulative(models: dict[str, Any], option: str, keys: dict[str, Any]) -> None:
    """Pruning on to 0.6 what was pruned to 0.3 is pruning to 0.6 at once: zeros are not counted twice."""
    steps, at_once = coarse(models["llama"], torch.float32), coarse(models["llama"], torch.float32)
    built = method(option, amount=0.6, **keys)
    for amount in (0.3, 0.6):
        prune(built, steps, amount)
    prune(built, at_once)
    assert all(torch.equal(linears(steps)[name], weight) for name, weight in linears(at_once).items())


@pytest.mark.parametrize("option", WEIGHT_OPTIONS)
def test_masks_are_where_the_zeros_are_and_hold_them(models: dict[str, Any], option: str) -> None:
    model = coarse(models["qwen2"], torch.float32)
    dense = {name: weight.clone() for name, weight in linears(model).items()}
    pruned = prune(method(option), model)
    assert {f"{name}.weight" for name in pruned.masks.keep} == set(dense)
    for name, keep in pruned.masks.keep.items():
        weight = linears(model)[f"{name}.weight"]
        assert torch.equal(keep, weight != 0)
        assert torch.equal(weight, dense[f"{name}.weight"] * keep)  # what stays is as it was
    with torch.no_grad():
        for weight in linears(model).values():
            weight.add_(1)  # what an optimizer with momentum does
    pruned.masks.hold(model)
    assert all(torch.equal(linears(model)[f"{name}.weight"] == 0, ~keep) for name, keep in pruned.masks.keep.items())


def lowest(scores: list[float], count: int) -> list[int]:
    """The definition: a stable sort, the lower index first among equals."""
    return sorted(range(len(scores)), key=lambda i: (scores[i], i))[:count]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_magnitude_is_a_plain_sort(models: dict[str, Any], scope: str, dtype: torch.dtype) -> None:
    dense = coarse(models["llama"], dtype)
    with torch.no_grad():  # one matrix much smaller than the others: the scopes then differ
        linears(dense)["model.layers.1.mlp.up_proj.weight"].mul_(0.25)
    model = copy.deepcopy(dense)
    prune(method("magnitude", amount=0.3, scope=scope), model)
    before = {name: weight.abs().flatten().tolist() for name, weight in linears(dense).items()}
    after = {name: zero.flatten() for name, zero in zeros(model).items()}
    if scope == "layer":
        for name, magnitudes in before.items():
            count = int(0.3 * len(magnitudes) + 0.5)
            assert after[name].nonzero().flatten().tolist() == sorted(lowest(magnitudes, count))
    else:
        together = [value for magnitudes in before.values() for value in magnitudes]
        found = torch.cat(list(after.values())).nonzero().flatten().tolist()
        assert found == sorted(lowest(together, int(0.3 * len(together) + 0.5)))
        shares = [float(zero.float().mean()) for zero in after.values()]
        assert max(shares) > 2 * min(shares)


@pytest.mark.parametrize("option", WEIGHT_OPTIONS)
@pytest.mark.parametrize(("pattern", "kept"), [("2:4", 2), ("1:4", 1)])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_pattern_keeps_n_of_each_m(models: dict[str, Any], family: str, option: str, pattern: str, kept: int) -> None:
    """N kept of M consecutive inputs of an output row, in every matrix, whatever the amount."""
    model = coarse(models[family], torch.bfloat16)
    pruned = prune(method(option, amount=0.3, pattern=pattern), model)
    for weight in linears(model).values():
        for row in weight.tolist():
            assert {sum(value != 0 for value in row[i : i + 4]) for i in range(0, len(row), 4)} == {kept}
    assert pruned.realized == 1 - kept / 4


def test_a_pattern_keeps_the_largest(models: dict[str, Any]) -> None:
    dense, model = models["llama"], copy.deepcopy(models["llama"])
    prune(method("magnitude", pattern="1:4"), model)
    for name, weight in linears(dense).items():
        rows = weight.abs().reshape(-1, 4).tolist()
        assert (~zeros(model)[name]).reshape(-1, 4).nonzero()[:, 1].tolist() == [row.index(max(row)) for row in rows]


@pytest.mark.parametrize("option", WEIGHT_OPTIONS)
@pytest.mark.parametrize(("pattern", "amount", "note"), [("2:4", 0.5, False), ("2:4", 0.6, True), ("1:4", 0.5, True)])
def test_a_pattern_fixes_the_amount(
    models: dict[str, Any], option: str, pattern: str, amount: float, note: bool
) -> None:
    """Said in a note where the requested amount differs, and only there."""
    pruned = prune(method(option, amount=amount, pattern=pattern), copy.deepcopy(models["llama"]))
    assert pruned.realized == {"2:4": 0.5, "1:4": 0.75}[pattern]
    assert len(pruned.notes) == note
    for text in pruned.notes:
        assert f"method.pattern={pattern} fixes the amount at {pruned.realized:g}" in text
        assert f"amount={amount:g} was not used" in text


@pytest.mark.parametrize("option", WEIGHT_OPTIONS)
def test_inputs_that_no_pattern_fits_are_refused(tmp_path: Path, option: str) -> None:
    """down_proj has 46 inputs, not a multiple of 4: the layer is named, and nothing has been pruned."""
    folder = make_folder(tmp_path / "model", intermediate_size=46)
    model = HubModel(name=str(folder)).load(CPU, seed=0).model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(Refused, match=r"pattern=2:4: model\.layers\.0\.mlp\.down_proj has 46 inputs"):
        prune(method(option, pattern="2:4"), model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_random_follows_the_seed(models: dict[str, Any]) -> None:
    def pruned_with(seed: int) -> dict[str, Tensor]:
        model = copy.deepcopy(models["llama"])
        torch.manual_seed(seed + 100)  # the global generator must not matter
        prune(method("random"), model, seed=seed)
        return zeros(model)

    first, other = pruned_with(1), pruned_with(2)
    torch.rand(1)
    again = pruned_with(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(not torch.equal(first[name], other[name]) for name in first)
    same_shape = [first[f"model.layers.{i}.mlp.up_proj.weight"] for i in (0, 1)]
    assert not torch.equal(*same_shape)  # each matrix has its own draw


def test_random_is_not_magnitude(models: dict[str, Any]) -> None:
    """The control curve: what it removes has the mean magnitude of the whole."""
    model = copy.deepcopy(models["llama"])
    prune(method("random"), model)
    dense = torch.cat([weight.detach().abs().flatten() for weight in linears(models["llama"]).values()])
    gone = torch.cat([zero.flatten() for zero in zeros(model).values()])
    assert float(dense[gone].mean()) == pytest.approx(float(dense.mean()), rel=0.05)


def test_random_prunes_alike_in_every_number_type(tmp_path: Path) -> None:
    name = str(make_folder(tmp_path / "model"))
    found = []
    for dtype in DTYPES:
        model = HubModel(name=name).load(Device(CPU.torch_device, dtype), seed=0).model
        assert linears(model)["model.layers.0.mlp.up_proj.weight"].dtype == dtype
        prune(method("random"), model)
        found.append(zeros(model))
    assert all(torch.equal(found[0][key], other[key]) for other in found[1:] for key in other)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("amount", [-0.1, 1.0, 1.5, float("nan")])
def test_amounts_outside_0_to_1_are_refused_when_built(option: str, amount: float) -> None:
    with pytest.raises(Refused, match=rf"method\.amount={amount} is outside \[0, 1\)"):
        method(option, amount=amount)


@pytest.mark.parametrize("option", WEIGHT_OPTIONS)
@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"scope": "row"}, r"method\.scope='row' is none of layer, global"),
        ({"pattern": "5:4"}, r"method\.pattern='5:4'"),
        ({"sparsity": 0.5}, r"method\.sparsity: no such key"),
    ],
)
def test_wrong_keys_are_refused_when_built(option: str, keys: dict[str, Any], says: str) -> None:
    with pytest.raises(Refused, match=says):
        method(option, **keys)
