"""MoE-Pruner's score: the inputs of experts times the gates that the model itself gives, compared with naive loops."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CPU, copied, make_folder
from model_types import tiny_folder
from torch import Tensor
from transformers import AutoModelForCausalLM

from prune_lab.errors import Refused
from prune_lab.methods.unstructured import Unstructured
from prune_lab.models.anatomy import Anatomy
from prune_lab.models.load import HubModel, Loaded
from prune_lab.pruning.calibration import Calibrator
from prune_lab.pruning.expert_gates import why_no_gates

WINDOWS = torch.randint(4, 300, (6, 24), generator=torch.Generator().manual_seed(7))
TYPES = ("mixtral", "qwen3_moe", "deepseek_v3")
Gated = list[tuple[int, float]]  # experts of a token with their gates


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gates")


def loaded_of(place: Path, model_type: str) -> Loaded:
    """A small model of a type, to be changed; deepseek-v3's experts in groups, its choices corrected."""
    folder = place / model_type
    if not folder.exists():
        of = {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "routed_scaling_factor": 2.5}
        tiny_folder(folder, model_type, **(of if model_type == "deepseek_v3" else {}))
    loaded = HubModel(name=str(folder)).load(CPU, seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, buffer in loaded.model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.1)
    return loaded


def by_softmax(mlp: Any, x: Tensor, renormalised: bool) -> Gated:
    """The two best experts of a softmax over all."""
    shares = (mlp.gate.weight @ x).softmax(0)
    best = sorted(range(len(shares)), key=lambda expert: -float(shares[expert]))[:2]
    total = float(shares[best].sum()) if renormalised else 1.0
    return [(expert, float(shares[expert]) / total) for expert in best]


def by_groups(mlp: Any, x: Tensor) -> Gated:
    """deepseek-v3's: sigmoid, chosen with a correction among the best of two groups, summing to 1, times 2.5."""
    shares = (mlp.gate.weight @ x).sigmoid()
    corrected = shares + mlp.gate.e_score_correction_bias
    sums = [float(corrected[4 * group : 4 * group + 4].topk(2).values.sum()) for group in range(2)]
    group = max(range(2), key=lambda g: sums[g])
    best = sorted(range(4 * group, 4 * group + 4), key=lambda expert: -float(corrected[expert]))[:2]
    return [(expert, 2.5 * float(shares[expert] / shares[best].sum())) for expert in best]


def gates_by_hand(model: Any, mlp: Any, x: Tensor) -> Gated:
    if model.config.model_type == "deepseek_v3":
        return by_groups(mlp, x)
    return by_softmax(mlp, x, model.config.model_type == "mixtral" or model.config.norm_topk_prob)


def inputs_of(model: Any, name: str) -> Tensor:
    """What a module is given while all windows pass the model, (tokens, width)."""
    found: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: found.append(args[0].flatten(0, -2)))
    model(input_ids=WINDOWS, use_cache=False)
    hook.remove()
    return torch.cat(found)


def norms_by_hand(model: Any, block: int) -> dict[str, Tensor]:
    """Norms of the inputs of each expert's two matrices, each token's times its gate: a loop over tokens."""
    mlp = model.model.layers[block].mlp
    squares: dict[str, Tensor] = {}
    for x in inputs_of(model, f"model.layers.{block}.mlp"):
        for expert, gate in gates_by_hand(model, mlp, x):
            a, b = (mlp.experts.gate_up_proj[expert] @ x).chunk(2)
            for name, row in (("gate_up_proj", x), ("down_proj", torch.nn.functional.silu(a) * b)):
                key = f"model.layers.{block}.mlp.experts.{name}.{expert}"
                squares[key] = squares.get(key, 0) + (gate * row.double()) ** 2
    return {name: of.sqrt() for name, of in squares.items()}


def kept_of(score: Tensor, amount: float) -> Tensor:
    """Of each row all but the weights of lowest score."""
    count = int(score.shape[1] * amount + 0.5)
    return torch.ones_like(score, dtype=torch.bool).scatter_(1, score.argsort(dim=1, stable=True)[:, :count], False)


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@torch.no_grad()
def test_weights_of_experts_go_by_gated_inputs(model_type: str, implementation: str, place: Path) -> None:
    """Whatever the experts compute by; other matrices lose those that Wanda's score says."""
    loaded = loaded_of(place, model_type)
    loaded.model.set_experts_implementation(implementation)
    pruned = copied(loaded)
    method = Unstructured(score="moe_pruner", scope="row", amount=0.4)
    unseen = method.prune(Anatomy(pruned.model), 0.4, 0, Calibrator(WINDOWS, "dense", batch_size=4)).unseen
    seen, blocks = 0, [n for n, block in enumerate(loaded.model.model.layers) if hasattr(block.mlp, "experts")]
    for block in blocks:
        for name, norms in norms_by_hand(loaded.model, block).items():
            parameter, _, expert = name.rpartition(".")
            weight = loaded.model.get_parameter(parameter)[int(expert)]
            found = pruned.model.get_parameter(parameter)[int(expert)]
            score = weight.abs() * norms
            ordered = score.sort(1).values
            cut = int(weight.shape[1] * 0.4 + 0.5)
            clear = (ordered[:, cut] - ordered[:, cut - 1]) > 1e-4 * ordered[:, cut]  # rows without near ties
            if name in unseen:
                continue
            assert clear.float().mean() > 0.9
            assert torch.equal((found != 0)[clear], kept_of(score, 0.4)[clear]), name
            seen += 1
    assert seen > len(blocks) * 4
    name = f"model.layers.{blocks[0]}.self_attn.o_proj"
    weight = loaded.model.get_submodule(name).weight
    score = weight.abs() * inputs_of(loaded.model, name).norm(dim=0)
    found = pruned.model.get_submodule(name).weight != 0
    assert (found == kept_of(score, 0.4)).float().mean() > 0.999


@torch.no_grad()
def test_gates_change_what_goes(place: Path) -> None:
    """An expert whose tokens have unequal gates loses other weights than by Wanda's score."""
    loaded, masks = loaded_of(place, "mixtral"), []
    for score in ("moe_pruner", "wanda"):
        model = copy.deepcopy(loaded.model)
        Unstructured(score=score, scope="row").prune(Anatomy(model), 0.5, 0, Calibrator(WINDOWS, "dense"))
        masks.append({name: p != 0 for name, p in model.named_parameters() if p.dim() > 1})
    differing = {name for name in masks[0] if not torch.equal(masks[0][name], masks[1][name])}
    assert differing
    assert all(".experts." in name for name in differing)


@pytest.mark.parametrize(
    "keys",
    [{"pattern": "2:4"}, {"scope": "layer"}, {"allocation": "owl"}, {"refit": "inputs"}, {"scope": "global"}],
    ids=str,
)
def test_it_combines_with_the_other_keys(keys: dict[str, Any], place: Path) -> None:
    loaded = loaded_of(place, "qwen3_moe")
    method = Unstructured(**{"score": "moe_pruner", "scope": "row", **keys})
    windows = torch.randint(4, 300, (12, 48), generator=torch.Generator().manual_seed(8))
    pruned = method.prune(Anatomy(loaded.model), 0.5, 0, Calibrator(windows, "pruned", batch_size=4))
    assert pruned.realized == pytest.approx(0.5, abs=0.01)
    assert all(p.isfinite().all() for p in loaded.model.parameters())


@pytest.mark.parametrize("model_type", ["gpt_oss", "dbrx", "jamba", "nemotron_h", "ernie4_5_moe"])
def test_gates_of_other_layouts_are_seen(model_type: str, place: Path) -> None:
    """Transposed and interleaved experts, experts of one matrix more or less, behind other layers."""
    assert why_no_gates(loaded_of(place, model_type).model) is None


@pytest.mark.parametrize(
    ("model_type", "said"),
    [
        ("olmo2", "no experts that a field of its config counts"),
        ("llama4_text", "not called with states, choices and gates"),
        ("jetmoe", "in several modules"),
    ],
)
def test_where_gates_cannot_be_seen_it_is_refused(model_type: str, said: str, place: Path) -> None:
    anatomy = Anatomy(loaded_of(place, model_type).model)
    with pytest.raises(Refused, match=rf"^method\.score=moe_pruner: .*{said}.*give method\.score=wanda"):
        Unstructured(score="moe_pruner").check_model(anatomy, [0.5])
    Unstructured(score="wanda").check_model(anatomy, [0.5])


def test_a_family_without_experts_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    config: Any = AutoModelForCausalLM.from_pretrained(make_folder(tmp_path, "llama")).config
    with pytest.raises(Refused, match=r"^method\.score=moe_pruner: llama models have no experts; give method.score="):
        Unstructured(score="moe_pruner").check(config, [0.5])
    Unstructured(score="ria").check(config, [0.5])


@torch.no_grad()
def test_rows_in_another_order_are_known_or_refused(place: Path) -> None:
    """Experts of a type that gathers tokens one after the other, and of one that multiplies other rows."""
    model = loaded_of(place, "mixtral").model
    wanted = norms_by_hand(model, 0)

    def by_token(self: Any, states: Tensor, chosen: Tensor, gates: Tensor) -> Tensor:
        total = torch.zeros_like(states)
        for expert in range(self.num_experts):
            token, choice = torch.where(chosen == expert)
            if len(token):
                a, b = torch.nn.functional.linear(self.scale * states[token], self.gate_up_proj[expert]).chunk(2, -1)
                out = torch.nn.functional.linear(torch.nn.functional.silu(a) * b, self.down_proj[expert])
                total.index_add_(0, token, out * gates[token, choice, None])
        return total

    for block in model.model.layers:
        block.mlp.experts.forward, block.mlp.experts.scale = by_token.__get__(block.mlp.experts), 1.0
    anatomy = Anatomy(model)
    assert why_no_gates(model) is None
    from prune_lab.pruning.calibration import block_statistics

    needs = {name: frozenset({"gated_norm"}) for name, _ in anatomy.linears()}
    found = next(iter(block_statistics(anatomy, needs, 0, Calibrator(WINDOWS, "dense", batch_size=4))))
    for name, norms in wanted.items():
        torch.testing.assert_close(found[name].gated_norm.double(), norms, rtol=1e-4, atol=1e-6)  # type: ignore[union-attr]
    for block in model.model.layers:
        block.mlp.experts.scale = 2.0
    assert "does not multiply the states of the tokens" in str(why_no_gates(model))
