"""Experts of a mixture: golden values of their scores, scores by hand, and models that are right without them."""

from __future__ import annotations

import copy
import csv
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
from prune_lab.methods.experts import SCORES, Experts
from prune_lab.models.anatomy import Anatomy
from prune_lab.models.export import save_model
from prune_lab.models.found_units import units_of
from prune_lab.models.load import HubModel, Loaded
from prune_lab.pruning.calibration import Calibrator
from prune_lab.pruning.expert_scores import OF_SUMS, ExpertSums, aimer, keep_best, ranked_choice, sums_of
from prune_lab.pruning.pruned import Pruned
from prune_lab.recovery.finetune import Finetune
from prune_lab.schedules import Iterative

WINDOWS = torch.randint(4, 300, (6, 24), generator=torch.Generator().manual_seed(7))
# Router logits of 6 tokens for 4 experts, two of which are chosen, and the norm of every expert's output.
LOGITS = torch.tensor(
    [[2, 1, 0, -1], [0, 2, 1, 0], [3, 0, 2, -1], [3, 1, 0, 0], [1, 0, -1, 2], [2, 1, 0, -1]], dtype=torch.float64
)
NORMS = torch.tensor([[1, 2, 0.5, 4], [1, 1.5, 1, 3], [2, 1, 0.5, 2], [1, 2.5, 1, 1], [1, 1, 1.5, 2], [0.5, 1, 2, 1]])
# Of every layout of experts and every kind of router: softmax, sigmoid with a bias, groups, shared experts.
TYPES = [
    "mixtral", "gpt_oss", "dbrx", "deepseek_v3", "ernie4_5_moe", "qwen2_moe",
    "llama4_text", "olmoe", "granitemoehybrid", "jamba", "lfm2_moe", "phimoe", "nemotron_h", "minimax_m2",
]  # fmt: skip
SLOW = (pytest.mark.slow, pytest.mark.process)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("experts")


def loaded_of(place: Path, model_type: str) -> Loaded:
    """A small model of a type, to be changed."""
    folder = place / model_type
    return HubModel(name=str(folder if folder.exists() else tiny_folder(folder, model_type))).load(CPU, seed=0)


def prune(loaded: Loaded, amount: float = 0.5, **keys: Any) -> Pruned:
    method = Experts(amount=amount, **keys)
    return method.prune(Anatomy(loaded.model), amount, 0, Calibrator(WINDOWS) if method.calibrated else None)


def golden_sums(renormalised: bool) -> ExpertSums:
    chosen = LOGITS.topk(2, dim=1).indices
    gates = LOGITS.softmax(1).gather(1, chosen)
    if renormalised:
        gates = gates / gates.sum(1, keepdim=True)
    return sums_of(chosen, gates, NORMS.gather(1, chosen)[..., None], experts=4)


@pytest.mark.parametrize(
    ("score", "renormalised", "wanted"),
    [
        ("frequency", True, (5, 4, 2, 1)),
        ("ean", True, (5.5, 7, 1.5, 2)),
        ("man", True, (1.1, 1.75, 0.75, 2)),
        ("msan", True, (1.45, 3.375, 0.625, 4)),
        ("gate_sum", True, (3.342914, 1.388144, 0.537883, 0.731059)),
        ("reap", True, (0.741689, 0.550355, 0.201706, 1.462117)),
        ("reap", False, (0.681061, 0.475018, 0.176304, 1.287829)),
    ],
)
def test_golden_values(score: str, renormalised: bool, wanted: tuple[float, ...]) -> None:
    found = OF_SUMS[score](golden_sums(renormalised))
    assert found.tolist() == pytest.approx(wanted, abs=1e-6)


def test_frequency_and_reap_remove_different_experts() -> None:
    gone = {
        name: int((~keep_best(OF_SUMS[name](golden_sums(True)), 3)).nonzero()) for name in ("frequency", "reap", "man")
    }
    assert gone == {"frequency": 3, "reap": 2, "man": 2}


def test_ranked_choice_of_the_golden_tokens_and_of_a_dead_expert() -> None:
    orders = LOGITS.argsort(dim=1, descending=True, stable=True)
    assert ranked_choice(orders, 2).argsort().tolist() == [3, 2, 0, 1]
    dead = torch.cat([LOGITS, torch.full((6, 1), -9.0)], 1).argsort(dim=1, descending=True, stable=True)
    assert ranked_choice(dead, 2).argsort().tolist() == [4, 3, 2, 0, 1]


def test_aimer_is_the_flatness_of_all_weights_of_an_expert() -> None:
    generator = torch.Generator().manual_seed(0)
    gaussian = torch.randn(1, 1000, 1000, generator=generator)
    flat = torch.ones(1, 1000, 1000)
    assert float(aimer([gaussian])) == pytest.approx(-((2 / torch.pi) ** 0.5), abs=1e-3)
    both = aimer([torch.cat([gaussian, flat]), torch.cat([gaussian, flat])[:, :5]])
    values = torch.cat([gaussian.flatten(), gaussian[:, :5].flatten()]).double()
    assert float(both[0]) == pytest.approx(-float(values.abs().mean() / values.square().mean().sqrt()))
    assert float(both[1]) == -1


def test_ties_go_by_the_lower_index_and_groups_keep_as_many() -> None:
    assert keep_best(torch.tensor([1.0, 1, 1, 2]), 2).tolist() == [False, False, True, True]
    assert keep_best(torch.tensor([9.0, 8, 7, 1, 2, 3]), 4, groups=2).tolist() == [True, True, False, False, True, True]


def mixture_by_hand(mlp: Any, states: Tensor, left: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output of a Mixtral block's mixture with these experts: token by token; and choices, gates, outputs."""
    experts, total = mlp.experts, torch.zeros_like(states)
    chosen, gates, outputs = [], [], []
    for token, x in enumerate(states):
        scores = (mlp.gate.weight @ x).softmax(0)
        best = sorted(left, key=lambda expert: -float(scores[expert]))[:2]
        of = scores[best] / scores[best].sum()
        out = []
        for expert in best:
            gate, up = (experts.gate_up_proj[expert] @ x).chunk(2)
            out.append(experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up))
        total[token] = (of[:, None] * torch.stack(out)).sum(0)
        chosen.append(torch.tensor(best))
        gates.append(of)
        outputs.append(torch.stack(out))
    return total, torch.stack(chosen), torch.stack(gates), torch.stack(outputs)


def states_of(model: Any, block: int) -> Tensor:
    found: list[Tensor] = []
    hook = model.model.layers[block].mlp.register_forward_pre_hook(lambda _, args: found.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        model(input_ids=WINDOWS.long(), use_cache=False)
    hook.remove()
    return found[0]


@torch.no_grad()
@pytest.mark.parametrize("score", ["reap", "frequency", "leave_one_out", "ranked_choice"])
def test_scores_of_a_mixture_by_hand(score: str, place: Path) -> None:
    loaded = loaded_of(place, "mixtral")
    mlp, states = loaded.model.model.layers[1].mlp, states_of(loaded.model, 1)
    total, chosen, gates, outputs = mixture_by_hand(mlp, states, [0, 1, 2, 3])
    wanted = list[float]()
    for expert in range(4):
        at = chosen == expert
        reap = float((gates * outputs.norm(dim=-1))[at].sum() / at.sum())
        if score == "leave_one_out":
            others = mixture_by_hand(mlp, states, [e for e in range(4) if e != expert])[0]
            rows = at.any(1)
            wanted.append(float((others - total)[rows].square().mean() * rows.sum()))
        else:
            wanted.append({"reap": reap, "frequency": float(at.sum())}.get(score, 0.0))
    if score == "ranked_choice":
        orders = (states @ mlp.gate.weight.T).argsort(dim=1, descending=True)
        wanted = ranked_choice(orders, 2).tolist()
    other = copied(loaded)
    pruned = prune(other, score=score)
    rows_of = list(csv.DictReader(pruned.files["experts.csv"].decode().splitlines()))
    found = [float(row["score"]) for row in rows_of if row["block"] == "1"]
    assert found == pytest.approx(wanted, rel=1e-3)
    assert [int(row["tokens"]) for row in rows_of if row["block"] == "1"] == [
        int((chosen == e).sum()) for e in range(4)
    ]
    kept = [int(row["expert"]) for row in rows_of if row["block"] == "1" and row["kept"] == "1"]
    assert kept == sorted(sorted(range(4), key=lambda expert: wanted[expert])[2:])
    cut = other.model.model.layers[1].mlp
    assert torch.equal(cut.gate.weight, mlp.gate.weight[kept])
    assert torch.equal(cut.experts.down_proj, mlp.experts.down_proj[kept])
    torch.testing.assert_close(
        mixture_by_hand(cut, states, [0, 1])[0], mixture_by_hand(mlp, states, kept)[0], rtol=1e-5, atol=1e-6
    )


@torch.no_grad()
@pytest.mark.parametrize("score", ["reap", "gate_sum", "frequency", "ranked_choice"])
def test_scores_where_gates_multiply_the_states_by_hand(score: str, place: Path) -> None:
    """Llama 4, two experts for a token: the sigmoid of its logits is the gate, and outputs are of unscaled states."""
    folder = tiny_folder(place / f"llama4 {score}", "llama4_text", num_experts_per_tok=2)
    loaded = HubModel(name=str(folder)).load(CPU, seed=0)
    inside = loaded.model.model.layers[1].feed_forward
    seen = list[Tensor]()
    hook = inside.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    loaded.model(input_ids=WINDOWS.long(), use_cache=False)
    hook.remove()
    logits_of_experts, experts = seen[0] @ inside.router.weight.T, inside.experts
    chosen = logits_of_experts.topk(2, dim=1).indices
    wanted = list[float]()
    for expert in range(4):
        at = (chosen == expert).any(1)
        gate, up = (seen[0][at] @ experts.gate_up_proj[expert]).chunk(2, dim=1)
        outputs = (torch.nn.functional.silu(gate) * up) @ experts.down_proj[expert]
        gates = logits_of_experts[at, expert].sigmoid()
        reap = float((gates * outputs.norm(dim=1)).mean())
        wanted.append({"reap": reap, "gate_sum": float(gates.sum()), "frequency": float(at.sum())}.get(score, 0.0))
    if score == "ranked_choice":
        wanted = ranked_choice(logits_of_experts.argsort(dim=1, descending=True), 2).tolist()
    pruned = prune(loaded, score=score)
    rows = [row for row in csv.DictReader(pruned.files["experts.csv"].decode().splitlines()) if row["block"] == "1"]
    assert [float(row["score"]) for row in rows] == pytest.approx(wanted, rel=1e-3)
    assert experts.gate_up_proj.shape[0] == 4
    assert loaded.model.model.layers[1].feed_forward.experts.gate_up_proj.shape[0] == 2


@pytest.mark.parametrize("model_type", [*TYPES[:7], *(pytest.param(name, marks=SLOW) for name in TYPES[7:])])
def test_experts_of_a_type(model_type: str, place: Path, tmp_path: Path) -> None:
    """Half of them go, and stock transformers reads what is left, which is seen to be right as they go."""
    dense = loaded_of(place, model_type)
    cut = copied(dense)
    pruned = prune(cut, score="reap")
    assert pruned.realized == pytest.approx(0.5)
    before, after = (sum(p.numel() for p in model.parameters()) for model in (dense.model, cut.model))
    assert before - after == sum(row.removed for row in pruned.rows)
    save_model(cut, tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    torch.testing.assert_close(logits(again), logits(cut.model))
    group = units_of(cut.model).groups["experts"]
    assert group.count == units_of(dense.model).groups["experts"].count // 2


def test_experts_of_a_type_that_may_have_none(tmp_path: Path) -> None:
    """Gemma 4's lie on the layer itself, beside a dense MLP, where its config asks for them."""
    asked = {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 16}
    cut = HubModel(name=str(tiny_folder(tmp_path / "dense", "gemma4_text", **asked))).load(CPU, seed=0)
    assert prune(cut, score="reap").realized == pytest.approx(0.5)
    save_model(cut, tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert again.config.num_experts == 4
    torch.testing.assert_close(logits(again), logits(cut.model))


@pytest.mark.parametrize("score", SCORES)
def test_every_score_and_two_prunings_in_a_row(score: str, place: Path) -> None:
    loaded = loaded_of(place, "qwen3_moe")
    first = prune(loaded, 0.25, score=score)
    assert first.realized == pytest.approx(0.25)
    second = prune(loaded, 0.5, score=score)
    assert second.realized == pytest.approx(0.5)
    assert loaded.model.config.num_experts == 2


def test_groups_of_a_router_keep_as_many(place: Path) -> None:
    """deepseek-v3 takes the two best experts of each group to choose among groups first."""
    config = copy.deepcopy(loaded_of(place, "deepseek_v3").model.config)
    config.n_routed_experts, config.n_group, config.topk_group, config.num_experts_per_tok = 8, 2, 1, 2
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    with pytest.raises(Refused, match=r"leaves 6? ?.*experts.*possible are 4 \(amount=0.5\), 6 \(amount=0.25\), 8"):
        Experts(amount=0.4).check_model(Anatomy(model), [0.4])
    pruned = Experts(amount=0.5, score="frequency").prune(Anatomy(model), 0.5, 0, Calibrator(WINDOWS))
    rows = list(csv.DictReader(pruned.files["experts.csv"].decode().splitlines()))
    for block in {row["block"] for row in rows}:
        kept = [int(row["expert"]) for row in rows if row["block"] == block and row["kept"] == "1"]
        assert sum(expert < 4 for expert in kept) == sum(expert >= 4 for expert in kept) == 2


@pytest.mark.parametrize(
    ("model_type", "keys", "said"),
    [
        ("mixtral", {"amount": 0.9}, r"leaves 1 of 4 experts.*choose 2 for each token.*possible are 2 \(amount=0.5\)"),
        ("longcat_flash", {}, "has not a part for each expert"),
        ("deepseek_v4", {}, "says by the token which experts"),
        ("olmo2", {}, "no experts that a field of its config counts"),
    ],
)
def test_what_cannot_be_done_is_refused(model_type: str, keys: dict[str, Any], said: str, place: Path) -> None:
    method = Experts(**keys)
    with pytest.raises(Refused, match=said):
        method.check_model(Anatomy(loaded_of(place, model_type).model), [method.amount])


def test_a_family_without_experts_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(make_folder(tmp_path, "llama"))
    with pytest.raises(Refused, match="llama models have no experts"):
        Experts().check(model.config, [0.5])


def test_experts_that_got_few_tokens_are_told_of(place: Path) -> None:
    loaded = loaded_of(place, "mixtral")
    pruned = prune(loaded)
    assert any("got fewer than 128 tokens of the calibration text" in warning for warning in pruned.warnings)


def test_an_interrupted_training_goes_on_after_experts_were_cut(place: Path, tmp_path: Path) -> None:
    loaded_of(place, "mixtral")
    recipe = Finetune(steps=24, batch_size=2, lr=0.01, checkpoint_every=9, validate_every=0)
    whole, cut, gone_on = interrupted(
        recipe, place / "mixtral", tmp_path, 20, method=Experts(amount=0.5, score="random"),
        schedule=Iterative(start=0.25, rounds=2),
    )  # fmt: skip
    assert cut.saved == 18
    assert same(weights_of(whole.loaded.model), weights_of(gone_on.loaded.model))
    assert whole.loaded.model.config.num_local_experts == 2


def test_what_choices_are_corrected_by_follows_an_interrupted_training(place: Path, tmp_path: Path) -> None:
    """deepseek-v3's biases of choices are buffers, and its router chooses among groups of experts first."""
    loaded = loaded_of(place, "deepseek_v3")
    config = copy.deepcopy(loaded.model.config)
    config.n_routed_experts, config.n_group, config.topk_group, config.num_experts_per_tok = 8, 2, 1, 2
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("e_score_correction_bias"):
                tensor.copy_(torch.randn(tensor.shape))
    save_model(Loaded(model, loaded.tokenizer, loaded.name, loaded.family), tmp_path / "model")
    recipe = Finetune(steps=24, batch_size=2, lr=0.01, checkpoint_every=9, validate_every=0)
    whole, _, gone_on = interrupted(
        recipe, tmp_path / "model", tmp_path, 20, method=Experts(amount=0.5, score="random"),
        schedule=Iterative(start=0.25, rounds=1),
    )  # fmt: skip
    ends = [ended.loaded.model.state_dict() for ended in (whole, gone_on)]
    assert any(name.endswith("e_score_correction_bias") for name in ends[0])
    assert same(*ends)


def test_the_command_line_removes_experts(cli: Cli, place: Path, tmp_path: Path) -> None:
    loaded_of(place, "mixtral")
    (tmp_path / "text.txt").write_text(story(1, 400))
    done = cli(
        "model=hf", f"model.name={place / 'mixtral'}", "dataset=text", "dataset.path=text.txt", "dataset.seq_len=32",
        "dataset.calibration.n_samples=8", "measure=quality_only", "measure.max_windows=2", "method=experts",
        "amount=0.5", "export=hf", "hydra.run.dir=run",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "export")
    assert again.config.num_local_experts == 2
    assert len((tmp_path / "run" / "experts.csv").read_text().splitlines()) == 13
    with (tmp_path / "run" / "layers.csv").open(encoding="utf-8") as file:
        layers = [row["layer"] for row in csv.DictReader(file)]
    assert len(layers) == len(set(layers))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    stamp, figures = summary["protocol"]["calibration"], summary["metrics"]
    expert = sum(
        again.model.layers[0].mlp.experts.get_parameter(name)[0].numel() for name in ("gate_up_proj", "down_proj")
    )
    assert figures["params/total"] == figures["params/active"] == again.num_parameters()  # two of two
    dense = figures["params/dense_total"] - figures["params/dense_active"]
    assert dense == 2 * len(again.model.layers) * expert  # two of four
    assert (stamp["propagate"], stamp["pass"]) == ("dense", "the whole model")
