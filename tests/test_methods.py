"""What every pruning method promises, checked for each option of conf/method and each family of models."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ALL_FAMILIES, CPU, ROOT, make_folder
from omegaconf import OmegaConf
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from prune_lab.config.parts import build
from prune_lab.errors import Refused
from prune_lab.methods.base import Method
from prune_lab.methods.weights import WeightMethod
from prune_lab.models.anatomy import Anatomy
from prune_lab.models.load import HubModel
from prune_lab.pruning.calibration import Calibrator
from prune_lab.pruning.pruned import Pruned
from prune_lab.pruning.refit_targets import TARGETS
from prune_lab.system.device import Device

# But those of experts, of which these families have none (test_experts.py, test_active_experts.py), and those whose
# counts take the place of an amount (test_shape.py).
OWN_TESTS = {"experts", "active_experts", "shape", "damage"}
OPTIONS = sorted({path.stem for path in (ROOT / "conf" / "method").glob("*.yaml")} - OWN_TESTS)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
WINDOWS = torch.randint(300, (6, 24), generator=torch.Generator().manual_seed(7))
MLP = 48
# By hand, not by the package: where the decoder blocks are, how many KV groups a block has, and what its config says.
BLOCKS = {"gpt2": "transformer.h", "opt": "model.decoder.layers", "gpt_neox": "gpt_neox.layers"}
GROUPS = {"gpt2": 4, "opt": 4, "gpt_neox": 4}
FIXED_HEADS = tuple(GROUPS)  # families whose stock config holds no other number of heads
READERS = ("down_proj", "o_proj", "out_proj", "c_proj", "fc2", "dense_4h_to_h", "dense")  # units are their inputs


@functools.cache
def shipped(option: str) -> Any:
    return OmegaConf.load(ROOT / "conf" / "method" / f"{option}.yaml")


def method(option: str, amount: float = 0.5, **keys: Any) -> Any:
    """The method that conf/method/`option`.yaml describes, with other keys if given, built as a run builds it."""
    root = OmegaConf.create({"amount": amount, "method": OmegaConf.merge(shipped(option), keys)})
    return build(root.method, "method")


def prunes(built: Method) -> bool:
    return "amount" not in built.not_applicable


def has(option: str, key: str) -> bool:
    return hasattr(method(option), key)


Keys = dict[str, Any]
Case = tuple[str, Keys]
WEIGHT_OPTIONS = [name for name in OPTIONS if isinstance(method(name), WeightMethod) and prunes(method(name))]
UNIT_OPTIONS = [name for name in OPTIONS if has(name, "units")]
# Every option as it is shipped, and again with each scope, score and kind of unit that matters to it. allocation=global
# is scope=global by another name, and a score is the same one through `unstructured`: a test of their own says so.
CASES: list[Case] = [(name, {}) for name in OPTIONS]
for scope in ("row", "layer", "global"):
    CASES += [(n, {"scope": scope}) for n in WEIGHT_OPTIONS if scope in method(n).scopes and method(n).scope != scope]
CASES += [(name, {"allocation": "owl"}) for name in ("magnitude", "sparsegpt", "wanda")]
CASES += [("magnitude", {"allocation": "sensitivity"}), ("depth", {"by": "perplexity"})]
CASES += [("unstructured", {"score": s}) for s in ("taylor2", "wifv")]
CASES += [(name, {"units": ["mlp", "heads"]}) for name in UNIT_OPTIONS] + [
    ("structured", {"score": "l2", "refit": "none"})
]
PRUNING = [(name, keys) for name, keys in CASES if prunes(method(name))]
OF_WEIGHTS = [(name, keys) for name, keys in PRUNING if name in WEIGHT_OPTIONS]
# Methods that leave every shape: whole units too, zeroed.
IN_PLACE = OF_WEIGHTS + [(name, keys | {"physical": False}) for name, keys in PRUNING if name in UNIT_OPTIONS]
SCORED = [(name, keys) for name, keys in IN_PLACE if name != "sparsegpt"]  # values that stay are as they were


def name_of(part: str | Keys) -> str:
    return part if isinstance(part, str) else ",".join(f"{k}={part[k]}" for k in part)


def cases(of: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("option", "keys"), of, ids=name_of)


# Families differ in where the weights lie: one shipped option of each kind (a score, a solver, units, blocks) meets all
# of them. Other options meet Llama and GPT-2, whose matrices are transposed; other keys of an option one of the two.
WIDE = ("wanda", "sparsegpt", "structured", "depth")


def families(of: list[Case]) -> pytest.MarkDecorator:
    pairs = []
    for number, (name, keys) in enumerate(of):
        wide = name in WIDE and set(keys) <= {"physical", "units"}
        some = ["llama", "gpt2"] if set(keys) <= {"physical"} else [["llama", "gpt2"][number % 2]]
        pairs += [(family, name, keys) for family in (ALL_FAMILIES if wide else some)]
    return pytest.mark.parametrize(("family", "option", "keys"), pairs, ids=name_of)


def linears(model: Any) -> dict[str, Any]:
    """The Linears inside the decoder blocks, found without the package's help."""
    prefix = BLOCKS.get(model.config.model_type, "model.layers")
    found = model.named_modules()
    return {n: m for n, m in found if isinstance(m, nn.Linear | Conv1D) and n.startswith(f"{prefix}.")}


def matrices(model: Any) -> dict[str, Tensor]:
    """Their weights, as views of shape (out, in): GPT-2's Conv1D holds (in, out)."""
    return {
        n: m.weight.detach() if isinstance(m, nn.Linear) else m.weight.detach().T for n, m in linears(model).items()
    }


def zeros(model: Any) -> dict[str, Tensor]:
    return {name: weight == 0 for name, weight in matrices(model).items()}


def coarse(model: Any) -> Any:
    """A model whose weights have a few dozen magnitudes and no zeros: heavy ties, and every zero is a pruned weight."""
    for weight in matrices(model).values():
        weight.copy_(weight.sign() * (weight.abs() * 10).ceil().clamp(min=1) / 10)
        assert weight.abs().unique().numel() < 60
        assert (weight != 0).all()
    return model


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return HubModel(name=str(folder)).load(Device(CPU.torch_device, dtype), seed=0).model


def prune(built: Method, model: Any, amount: float | None = None, seed: int = 5, propagate: str = "dense") -> Pruned:
    calibrator = Calibrator(WINDOWS, propagate, batch_size=4) if built.calibrated else None
    return built.prune(Anatomy(model), built.amount if amount is None else amount, seed, calibrator)


Made = tuple[Any, Pruned]
Dense = Callable[..., Any]
Make = Callable[..., Made]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Dense:
    """A small model of a family with coarse weights, its output head untied so that it could be pruned by mistake.

    Each is loaded once: to be copied, never changed.
    """
    place, known = tmp_path_factory.mktemp("methods"), dict[Any, Any]()

    def get(family: str, dtype: torch.dtype = torch.float32) -> Any:
        if (family, dtype) not in known:
            folder = place / family
            if not folder.exists():
                make_folder(folder, family, tie_word_embeddings=False)
            known[family, dtype] = coarse(load(folder, dtype))
        return known[family, dtype]

    return get


@pytest.fixture(scope="module")
def make(dense: Dense) -> Make:
    """What a case makes of a family's model, statistics being those of the dense one: to be looked at, never changed.

    Several tests look at the same result, so each is made once.
    """
    known = dict[Any, Made]()

    def get(family: str, option: str, keys: Keys, amount: float = 0.5) -> Made:
        key = family, option, str(keys), amount
        if key not in known:
            model = copy.deepcopy(dense(family))
            known[key] = model, prune(method(option, amount=amount, **keys), model)
        return known[key]

    return get


def fit(family: str, keys: Keys) -> Keys:
    """The keys, with units only zeroed where a stock config cannot hold fewer heads."""
    return keys | {"physical": False} if "heads" in keys.get("units", ()) and family in FIXED_HEADS else keys


@torch.no_grad()
def logits(model: Any) -> Tensor:
    tokens = torch.randint(300, (2, 16), generator=torch.Generator().manual_seed(3))
    return model(input_ids=tokens, use_cache=False).logits


def same(before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
    return list(before) == list(after) and all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def hooks(model: Any) -> list[int]:
    return [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]


def half_up(amount: float, size: int) -> int:
    """The number to remove of a group: rounded, half up."""
    return int(amount * size + 0.5)


def comparison_groups(built: WeightMethod, zero: dict[str, Tensor]) -> list[Tensor]:
    """The zeros of a model, as 1-D pieces that the method ranks by themselves: as its paper defines them."""
    if "global" in (built.scope, built.allocation):
        return [torch.cat([of.flatten() for of in zero.values()])]
    pieces = list[Tensor]()
    for of in zero.values():
        if built.scope == "row":
            pieces += list(of)
        elif built.scope == "window":
            pieces += [of[:, first : first + 128].flatten() for first in range(0, of.shape[1], 128)]
        else:
            pieces.append(of.flatten())
    return pieces


# The contract.


def test_every_option_is_here() -> None:
    """The contract must not shrink unseen."""
    assert {
        "depth", "magnitude", "none", "random", "ria", "sensitivity", "sparsegpt", "structured", "taylor",
        "unstructured", "wanda", "wifv",
    } <= set(OPTIONS)  # fmt: skip
    assert {"magnitude", "random", "ria", "sparsegpt", "unstructured", "wanda"} <= set(WEIGHT_OPTIONS)
    assert {"structured", "taylor", "wifv"} <= set(UNIT_OPTIONS)
    assert {name for name in OPTIONS if not prunes(method(name))} == {"none", "sensitivity"}
    assert all(case in CASES for case in [("magnitude", {"scope": "row"}), ("wanda", {"scope": "global"})])


@families(CASES)
def test_amount_0_changes_nothing(dense: Dense, family: str, option: str, keys: Keys) -> None:
    """The export is that of method=none, its config too; the reference code's `W <= sorted[0]` removes a weight.

    The calibration passes blocks on as pruned, as shipped: nor may looking at a model change it.
    """
    model = copy.deepcopy(dense(family))
    pruned = prune(method(option, amount=0.0, **keys), model, propagate="pruned")
    assert same(dense(family).state_dict(), model.state_dict())
    assert torch.equal(logits(dense(family)), logits(model))
    assert pruned.realized == 0
    assert model.config.to_dict() == dense(family).config.to_dict()
    assert hooks(model) == hooks(dense(family))


@families(PRUNING)
def test_only_linears_in_blocks_are_touched(dense: Dense, make: Make, family: str, option: str, keys: Keys) -> None:
    """Never embeddings, output head or norms, nor the biases of what is pruned weight by weight.

    Of structures, a bias goes with its row; one behind the units changes only where it is to make up for them.
    """
    before, (model, pruned) = dense(family), make(family, option, fit(family, keys))
    built, inside = method(option, **keys), linears(before)
    was, now = before.state_dict(), model.state_dict()
    of_table = {row.layer for row in pruned.rows}
    assert of_table <= set(inside)
    free = {f"{name}.weight" for name in of_table}
    if option in UNIT_OPTIONS:
        free |= {f"{n}.bias" for n in of_table if built.refit != "none" or n.rpartition(".")[2] not in READERS}
    prefix = BLOCKS.get(family, "model.layers")
    for name, tensor in was.items():
        if option == "depth" and name.startswith(f"{prefix}."):
            continue  # a block that stays is as it was, by another number: below
        assert name in free or torch.equal(tensor, now[name]), name
    assert torch.equal(before.get_input_embeddings().weight, model.get_input_embeddings().weight)
    assert torch.equal(before.get_output_embeddings().weight, model.get_output_embeddings().weight)
    assert not same(was, now)
    if option == "depth":
        dropped = {row.layer.removeprefix(f"{prefix}.").split(".")[0] for row in pruned.rows if row.removed}
        stay = [block for number, block in before.get_submodule(prefix).named_children() if number not in dropped]
        for block, left in zip(stay, model.get_submodule(prefix), strict=True):
            assert same(block.state_dict(), left.state_dict())


# Of 16 bits: each case meets one of them in turn, and the options as they are shipped meet all.
SITES = [("llama", torch.float16, 0.1), ("llama", torch.bfloat16, 0.5), ("gpt2", torch.float16, 0.7)]


def check_amount(built: Method, family: str, amount: float, before: Any, model: Any, pruned: Pruned) -> None:
    """Counted in the tensors, by the definition of each kind of method; and the table says the same."""
    was, now, rows = matrices(before), matrices(model), {row.layer: row for row in pruned.rows}
    assert len(rows) == len(pruned.rows)
    if isinstance(built, WeightMethod):
        assert set(rows) == set(was)
        gone, sizes = 0, 0
        for name, zero in zeros(model).items():
            assert (rows[name].before, rows[name].removed) == (zero.numel(), int(zero.sum()))
            gone, sizes = gone + int(zero.sum()), sizes + zero.numel()
        assert pruned.realized == pytest.approx(gone / sizes)
        groups = comparison_groups(built, zeros(model))
        assert abs(gone - amount * sizes) <= len(groups) / 2
        if built.allocation in ("uniform", "global"):
            assert [int(group.sum()) for group in groups] == [half_up(amount, len(group)) for group in groups]
        return
    if hasattr(built, "units"):
        counts = {"mlp": MLP, "heads": GROUPS.get(family, 2)}
        expected = {kind: min(half_up(amount, counts[kind]), counts[kind] - 1) for kind in built.units}
        for name, row in rows.items():
            kind, linear = "heads" if "att" in name else "mlp", linears(before)[name]
            owned = linear.weight.numel()
            if name.rpartition(".")[2] in READERS:
                left = int(now[name].any(0).sum())
                assert left * counts[kind] == (counts[kind] - expected[kind]) * was[name].shape[1]
            elif linear.bias is not None:  # a unit has its own entries of it
                owned += linear.bias.numel()
            assert (row.before, row.removed * counts[kind]) == (owned, owned * expected[kind])
        assert {"heads" if "att" in name else "mlp" for name in rows} == set(built.units)
        assert pruned.realized == sum(row.removed for row in rows.values()) / sum(row.before for row in rows.values())
        return
    blocks = len(before.get_submodule(BLOCKS.get(family, "model.layers")))
    gone = min(half_up(amount, blocks), blocks - 1)
    assert len(model.get_submodule(BLOCKS.get(family, "model.layers"))) == model.config.num_hidden_layers
    assert model.config.num_hidden_layers == blocks - gone
    assert pruned.realized == pytest.approx(gone / blocks)


@cases(PRUNING)
def test_the_realised_amount_is_the_requested_one(dense: Dense, make: Make, option: str, keys: Keys) -> None:
    """Exact in each comparison group, where a threshold would take thousands of ties; at 0.5 in every family, below."""
    for amount in (0.1, 0.95):
        check_amount(method(option, **keys), "llama", amount, dense("llama"), *make("llama", option, keys, amount))


@pytest.mark.parametrize(
    ("family", "dtype", "amount", "option", "keys"),
    [
        (*site, name, keys)
        for number, (name, keys) in enumerate(PRUNING)
        for site in (SITES if name in WIDE and not keys else [SITES[number % 3]])
    ],
    ids=lambda part: part if isinstance(part, str) else str(part),
)
def test_the_realised_amount_is_the_requested_one_in_16_bits(
    dense: Dense, family: str, dtype: torch.dtype, amount: float, option: str, keys: Keys
) -> None:
    """As shipped: later blocks are calibrated on what the pruned ones pass on."""
    model, built = copy.deepcopy(dense(family, dtype)), method(option, amount=amount, **fit(family, keys))
    pruned = prune(built, model, propagate="pruned")
    assert all(weight.dtype == dtype for weight in model.state_dict().values())
    check_amount(built, family, amount, dense(family, dtype), model, pruned)


@pytest.mark.parametrize("option", [name for name in OPTIONS if not prunes(method(name))])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_removes_nothing_says_so_at_any_amount(dense: Dense, dtype: torch.dtype, option: str) -> None:
    model = copy.deepcopy(dense("llama", dtype))
    pruned = prune(method(option, amount=0.7), model)
    assert (pruned.rows, pruned.realized, pruned.masks.keep) == ([], 0, {})
    assert same(dense("llama", dtype).state_dict(), model.state_dict())


@families(PRUNING)
def test_every_family_loses_the_requested_amount(
    dense: Dense, make: Make, family: str, option: str, keys: Keys
) -> None:
    keys = fit(family, keys)
    check_amount(method(option, **keys), family, 0.5, dense(family), *make(family, option, keys))


@cases(SCORED)
def test_zeros_nest_across_amounts(make: Make, option: str, keys: Keys) -> None:
    """More of the same: whatever a lower amount prunes, a higher one does too, given the same statistics and seed."""
    found = [zeros(make("llama", option, keys, amount)[0]) for amount in (0.1, 0.5, 0.95)]
    for fewer, more in itertools.pairwise(found):
        assert not any((fewer[name] & ~more[name]).any() for name in fewer)
    first, last = (sum(int(zero.sum()) for zero in of.values()) for of in (found[0], found[-1]))
    assert first < last


@pytest.mark.parametrize("option", WEIGHT_OPTIONS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_zeros_stay_when_pruned_on(make: Make, dense: Dense, family: str, option: str) -> None:
    """From 0.3 to 0.6, by another seed, what is calibrated on having changed: zeros count, not twice, and are held."""
    first, pruned = make(family, option, {}, 0.3)
    model = copy.deepcopy(first)
    further = prune(method(option), model, 0.6, seed=6, propagate="pruned")
    check_amount(method(option), family, 0.6, dense(family), model, further)
    for name, keep in pruned.masks.keep.items():
        assert not (further.masks.keep[name] & ~keep).any()
        assert not linears(model)[name].weight[~keep].any()


@cases([(name, keys) for name, keys in SCORED if not method(name, **keys).calibrated])
def test_amounts_are_cumulative(make: Make, option: str, keys: Keys) -> None:
    """Pruning on to 0.6 what was pruned to 0.3 is pruning to 0.6 at once, for methods that look at weights alone."""
    steps = copy.deepcopy(make("llama", option, keys, 0.3)[0])
    prune(method(option, **keys), steps, 0.6)
    assert same(make("llama", option, keys, 0.6)[0].state_dict(), steps.state_dict())


@families(IN_PLACE)
def test_masks_are_where_the_zeros_are_and_hold_them(
    dense: Dense, make: Make, family: str, option: str, keys: Keys
) -> None:
    model, pruned = make(family, option, keys)
    assert set(pruned.masks.keep) == {row.layer for row in pruned.rows}
    moved = copy.deepcopy(model)
    for name, keep in pruned.masks.keep.items():
        weight, before = linears(model)[name].weight, linears(dense(family))[name].weight
        assert torch.equal(keep, weight != 0)
        is_updated = option == "sparsegpt" or method(option, **keys).refit in TARGETS
        assert is_updated or torch.equal(weight, before * keep)  # what stays is as it was
        linears(moved)[name].weight.data.add_(1000)  # what an optimizer with momentum does
    pruned.masks.hold(moved)
    for name, weight in matrices(moved).items():
        assert torch.equal(weight == 0, matrices(model)[name] == 0)


@cases([(name, keys) for name, keys in PRUNING if name in UNIT_OPTIONS or name == "depth"])
def test_a_cut_leaves_no_masks(make: Make, option: str, keys: Keys) -> None:
    """A mask of the old shape would break the first optimizer step of a recovery."""
    assert not make("llama", option, keys)[1].masks.keep


@pytest.mark.parametrize("pattern", [None, "2:4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sparsegpt_ranks_128_columns_of_all_rows_together(
    tmp_path: Path, dtype: torch.dtype, pattern: str | None
) -> None:
    """300 inputs are windows of 128, 128 and 44; each loses the amount, rounded by itself."""
    before = coarse(load(make_folder(tmp_path / "wide", intermediate_size=300), dtype))
    model, built = copy.deepcopy(before), method("sparsegpt", amount=0.33, pattern=pattern)
    pruned = prune(built, model)
    if pattern is None:
        check_amount(built, "llama", 0.33, before, model, pruned)
        sizes = {len(group) for group in comparison_groups(built, zeros(model))}
        assert sizes == {32 * 32, 16 * 32, 300 * 32, 32 * 128, 32 * 44}
    else:
        assert all((z.reshape(-1, 4).sum(1) == 2).all() for z in zeros(model).values())


@pytest.mark.parametrize(("amount", "allocation"), [(0.0, "uniform"), (0.0, "owl"), (0.3, "uniform"), (0.3, "owl")])
def test_sparsegpt_says_what_it_zeroed_where_inputs_are_dead(dense: Dense, amount: float, allocation: str) -> None:
    """30 of 48 channels never fire: their weights go first, or stay, but none goes that mask and table call kept."""
    before = copy.deepcopy(dense("opt"))
    for block in before.model.decoder.layers:
        block.fc1.bias.data[:30] = -1000  # ReLU gives 0
    model = copy.deepcopy(before)
    pruned = prune(method("sparsegpt", amount=amount, allocation=allocation), model)
    removed = {row.layer: row.removed for row in pruned.rows}
    for name, zero in zeros(model).items():
        assert torch.equal(pruned.masks.keep[name], ~zero), name
        assert removed[name] == int(zero.sum())
    assert amount or same(before.state_dict(), model.state_dict())


GRADIENTS = [(n, keys) for n, keys in CASES if n in ("taylor", "unstructured") and "taylor" in method(n, **keys).score]


@cases(GRADIENTS)
def test_no_gradient_is_left_behind(make: Make, option: str, keys: Keys) -> None:
    """Nor of what is not pruned (embeddings, output head, norms, biases): together they are as large as the model."""
    model, _ = make("llama", option, keys)
    assert [name for name, parameter in model.named_parameters() if parameter.grad is not None] == []


# Selection, against a plain sort.


def lowest(scores: list[float], count: int) -> list[int]:
    """The definition: a stable sort, the lower index first among equals."""
    return sorted(range(len(scores)), key=lambda i: (scores[i], i))[:count]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keys", [{"scope": "row"}, {"scope": "layer"}, {"scope": "global"}, {"allocation": "global"}])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_magnitude_is_a_plain_sort(dense: Dense, family: str, keys: Keys, dtype: torch.dtype) -> None:
    before = copy.deepcopy(dense(family, dtype))
    list(matrices(before).values())[-2].mul_(0.25)  # one matrix much smaller than the others: the scopes then differ
    model = copy.deepcopy(before)
    prune(method("magnitude", amount=0.3, **keys), model)
    found, sizes = zeros(model), {name: weight.abs() for name, weight in matrices(before).items()}
    if "global" in keys.values():
        together = torch.cat([size.flatten() for size in sizes.values()]).tolist()
        gone = torch.cat([zero.flatten() for zero in found.values()]).nonzero().flatten().tolist()
        assert gone == sorted(lowest(together, half_up(0.3, len(together))))
        shares = [float(zero.float().mean()) for zero in found.values()]
        assert max(shares) > 2 * min(shares)
        return
    for name, size in sizes.items():
        pairs = (
            zip(size, found[name], strict=True) if keys["scope"] == "row" else [(size.flatten(), found[name].flatten())]
        )
        for values, zero in pairs:
            assert zero.nonzero().flatten().tolist() == sorted(lowest(values.tolist(), half_up(0.3, len(values))))


@pytest.mark.parametrize("option", ["magnitude", "wanda"])
def test_allocation_global_is_scope_global(make: Make, option: str) -> None:
    """One ranking of all weights, by either key, whatever the scope beside it."""
    expected = make("llama", option, {"scope": "global"})[0].state_dict()
    assert same(make("llama", option, {"allocation": "global"})[0].state_dict(), expected)
    assert same(make("llama", option, {"allocation": "global", "scope": "row"})[0].state_dict(), expected)


@pytest.mark.parametrize("score", ["magnitude", "random", "wanda", "ria"])
def test_a_score_is_the_same_under_its_own_name(make: Make, score: str) -> None:
    keys = {"score": score, "scope": method(score).scope, "refit": "none"}
    named = make("llama", "unstructured", keys)[0].state_dict()
    assert same(named, make("llama", score, {})[0].state_dict())


@cases([(name, keys) for name, keys in OF_WEIGHTS if keys.get("allocation") in ("owl", "sensitivity")])
def test_an_allocation_gives_blocks_amounts_of_their_own(make: Make, option: str, keys: Keys) -> None:
    """The same one in each Linear of a block, another one in the next block; the notes say which."""
    model, pruned = make("llama", option, keys)
    shares = []
    for block in range(2):
        of_block = [z for name, z in zeros(model).items() if name.startswith(f"model.layers.{block}.")]
        shares.append(sum(int(z.sum()) for z in of_block) / sum(z.numel() for z in of_block))
        groups = comparison_groups(method(option, **keys), {str(i): z for i, z in enumerate(of_block)})
        assert all(abs(int(group.sum()) - shares[-1] * len(group)) <= 1 for group in groups)
    assert abs(shares[0] - shares[1]) > 0.01
    assert any(note.startswith(f"{keys['allocation']} gives the blocks") for note in pruned.warnings)


# Patterns.


PATTERNS = [("llama", pattern, option) for pattern in ("2:4", "1:4", "4:8") for option in WEIGHT_OPTIONS]
PATTERNS += [(family, "2:4", "wanda") for family in ALL_FAMILIES if family != "llama"] + [("gpt2", "1:4", "sparsegpt")]


@pytest.mark.parametrize(("family", "pattern", "option"), PATTERNS)
def test_a_pattern_keeps_n_of_each_m(dense: Dense, family: str, pattern: str, option: str) -> None:
    """N kept of M consecutive inputs of an output row, in every matrix, whatever the amount, which a note says."""
    model, (n, m) = copy.deepcopy(dense(family)), map(int, pattern.split(":"))
    pruned = prune(method(option, amount=0.3, pattern=pattern), model, propagate="pruned")
    assert all(((weight != 0).reshape(-1, m).sum(1) == n).all() for weight in matrices(model).values())
    assert pruned.realized == 1 - n / m
    assert pruned.warnings == [f"method.pattern={pattern} fixes the amount at {1 - n / m:g}; amount=0.3 was not used"]
    assert all(torch.equal(keep, linears(model)[name].weight != 0) for name, keep in pruned.masks.keep.items())


@pytest.mark.parametrize("option", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_pattern_holds_in_16_bits(dense: Dense, option: str, dtype: torch.dtype) -> None:
    model = copy.deepcopy(dense("llama", dtype))
    assert prune(method(option, pattern="1:4"), model).realized == 0.75
    assert all((zero.reshape(-1, 4).sum(1) == 3).all() for zero in zeros(model).values())


def test_a_pattern_keeps_the_largest(dense: Dense) -> None:
    """The later of equals, since of equals the first goes."""
    model = copy.deepcopy(dense("gpt2"))
    prune(method("magnitude", pattern="1:4"), model)
    for name, weight in matrices(dense("gpt2")).items():
        rows = weight.abs().reshape(-1, 4).tolist()
        expected = [3 - row[::-1].index(max(row)) for row in rows]
        assert (~zeros(model)[name]).reshape(-1, 4).nonzero()[:, 1].tolist() == expected


def test_a_pattern_that_is_the_requested_amount_needs_no_note(dense: Dense) -> None:
    assert prune(method("magnitude", amount=0.5, pattern="2:4"), copy.deepcopy(dense("llama"))).warnings == []


@pytest.mark.parametrize("option", ["magnitude", "sparsegpt"])
@pytest.mark.parametrize(
    ("family", "width", "layer"),
    [
        ("llama", "intermediate_size", r"model\.layers\.0\.mlp\.down_proj"),
        ("gpt2", "n_inner", r"transformer\.h\.0\.mlp\.c_proj"),
    ],
)
def test_inputs_that_no_pattern_fits_are_refused(
    tmp_path: Path, option: str, family: str, width: str, layer: str
) -> None:
    """46 inputs are not a multiple of 4: the layer is named, and nothing has been pruned."""
    model = load(make_folder(tmp_path / "model", family, **{width: 46}))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(Refused, match=rf"pattern=2:4: {layer} has 46 inputs, not a multiple of 4"):
        prune(method(option, pattern="2:4"), model)
    assert same(before, model.state_dict())


# Random.


def test_random_follows_the_seed(dense: Dense) -> None:
    def pruned_with(seed: int) -> dict[str, Tensor]:
        model = copy.deepcopy(dense("llama"))
        torch.manual_seed(seed + 100)  # the global generator must not matter
        prune(method("random"), model, seed=seed)
        return zeros(model)

    first, other = pruned_with(1), pruned_with(2)
    torch.rand(1)
    again = pruned_with(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(not torch.equal(first[name], other[name]) for name in first)
    same_shape = [first[f"model.layers.{i}.mlp.up_proj"] for i in (0, 1)]
    assert not torch.equal(*same_shape)  # each matrix has its own draw


@cases([("random", {}), ("unstructured", {"score": "random"})])
def test_random_is_not_magnitude(dense: Dense, make: Make, option: str, keys: Keys) -> None:
    """The control curve: what it removes has the mean magnitude of the whole."""
    sizes = torch.cat([weight.abs().flatten() for weight in matrices(dense("llama")).values()])
    gone = torch.cat([zero.flatten() for zero in zeros(make("llama", option, keys)[0]).values()])
    assert float(sizes[gone].mean()) == pytest.approx(float(sizes.mean()), rel=0.05)


def test_random_prunes_alike_in_every_number_type(dense: Dense) -> None:
    found = []
    for dtype in DTYPES:
        model = copy.deepcopy(dense("llama", dtype))
        assert matrices(model)["model.layers.0.mlp.up_proj"].dtype == dtype
        prune(method("random"), model)
        found.append(zeros(model))
    assert all(torch.equal(found[0][key], other[key]) for other in found[1:] for key in other)


@cases(PRUNING)
def test_pruning_twice_gives_the_same_bits(dense: Dense, make: Make, option: str, keys: Keys) -> None:
    """Given seed and calibration text, whatever torch's own generator is at."""
    model = copy.deepcopy(dense("llama"))
    torch.manual_seed(99)
    prune(method(option, **keys), model)
    assert same(make("llama", option, keys)[0].state_dict(), model.state_dict())


# What makes no sense is refused before anything loads.


@pytest.mark.parametrize("amount", [-0.1, 1.0, 1.5, float("nan")])
def test_amounts_outside_0_to_1_are_refused_when_built(amount: float) -> None:
    """By every option: a class with a check of its own must not forget it."""
    for option in OPTIONS:
        with pytest.raises(Refused, match=rf"^method\.amount={amount} is outside \[0, 1\)"):
            method(option, amount=amount)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"scope": "column"}, r"^method\.scope='column' is not one of (row, layer, global|window, row)$"),
        ({"pattern": "5:4"}, r"^method\.pattern='5:4'.* N must be from 1 to M"),
        ({"pattern": "2of4"}, r"^method\.pattern='2of4' is not of the form N:M"),
        ({"allocation": "even"}, r"^method\.allocation='even' is not one of uniform, global, owl, sensitivity"),
        ({"allocation": "owl", "pattern": "2:4"}, r"^method\.allocation='owl' with pattern='2:4': a pattern takes the"),
        ({"allocation": "sensitivity", "pattern": "2:4"}, r"^method\.allocation='sensitivity' with pattern='2:4'"),
        ({"allocation": "global", "pattern": "2:4"}, r"^method\.allocation='global'"),
        ({"sparsity": 0.5}, r"^method\.sparsity: no such key"),
    ],
    ids=str,
)
def test_wrong_keys_are_refused_when_built(keys: Keys, says: str) -> None:
    for option in WEIGHT_OPTIONS:
        with pytest.raises(Refused, match=says):
            method(option, **keys)


@pytest.mark.parametrize("allocation", ["owl", "sensitivity"])
def test_one_ranking_of_all_weights_has_no_other_allocation(allocation: str) -> None:
    says = rf"^method\.allocation='{allocation}' with scope=global: one ranking over all blocks is itself an allocation"
    for option in (name for name in WEIGHT_OPTIONS if "global" in method(name).scopes):
        with pytest.raises(Refused, match=says):
            method(option, scope="global", allocation=allocation)
        assert method(option, scope="global", allocation="global").is_global


@pytest.mark.parametrize(
    ("option", "keys", "says"),
    [
        ("sparsegpt", {"scope": "layer"}, r"scope='layer' is not one of window, row"),
        ("sparsegpt", {"scope": "global"}, r"scope='global' is not one of window, row"),
        ("sparsegpt", {"allocation": "global"}, r"allocation='global': .*no one ranking.*uniform, owl, sensitivity"),
        (
            "unstructured",
            {"score": "l2"},
            r"score='l2' is not one of magnitude, random, wanda, moe_pruner, ria, taylor, taylor2, wifv",
        ),
        (
            "structured",
            {"score": "magnitude"},
            r"score='magnitude' is not one of l2, l1, random, wanda, ria, taylor, tay",
        ),
        ("taylor", {"score": "hessian"}, r"score='hessian' is not one of"),
        ("wifv", {"units": ["block"]}, r"units=\['block'\] must be one or more of mlp, heads"),
        ("structured", {"round_to": 0}, r"round_to=0 must be at least 1"),
        ("depth", {"by": "norm"}, r"by='norm' is not one of bi, angle, perplexity, kl"),
        ("sensitivity", {"score": "l2"}, r"score='l2' is not one of random, wanda, ria, taylor, taylor2, wifv"),
        ("sensitivity", {"parts": ["weights", "norms"]}, r"parts=\['weights', 'norms'\] must be some of weights, mlp"),
        ("sensitivity", {"amounts": []}, r"amounts=\[\] must rise, each between 0 and 1"),
        ("magnitude", {"score": "wanda"}, r"score: no such key"),
    ],
    ids=str,
)
def test_keys_of_one_option_are_refused_with_what_is_allowed(option: str, keys: Keys, says: str) -> None:
    with pytest.raises(Refused, match=rf"^method\.{says}"):
        method(option, **keys)


@pytest.mark.parametrize("keys", [{"allocation": "owl"}, {"allocation": "global"}, {"scope": "global"}], ids=str)
def test_units_take_no_allocation_over_blocks_and_the_refusal_says_why(keys: Keys) -> None:
    says = rf"^method\.{next(iter(keys))}.*single weights.*a stock config holds one width"
    for option in UNIT_OPTIONS:
        with pytest.raises(Refused, match=says):
            method(option, **keys)
