"""Layouts that are found: which matrices of which blocks, and that pruning them is what it is of a described family."""

from __future__ import annotations

import copy
import csv
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ALL_FAMILIES, CPU, Cli, copied, logits, make_folder, observed, story
from model_table import IMAGE_TEXT_PAGE, PAGE, image_text_types, row_of, types_of_transformers
from model_types import tiny_folder, tiny_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from prune_lab.errors import Refused
from prune_lab.methods.base import Method
from prune_lab.methods.magnitude import Magnitude
from prune_lab.methods.ria import Ria
from prune_lab.methods.sparsegpt import SparseGPT
from prune_lab.methods.unstructured import Unstructured
from prune_lab.methods.wanda import Wanda
from prune_lab.models import anatomy as anatomies
from prune_lab.models import found
from prune_lab.models.anatomy import Anatomy, scope_of
from prune_lab.models.export import check_reload, save_model
from prune_lab.models.families import FAMILIES
from prune_lab.models.load import HubModel, Loaded
from prune_lab.models.loss import window_losses
from prune_lab.models.products import FusedMatrix
from prune_lab.pruning.calibration import Calibrator
from prune_lab.system.device import Device

WINDOWS = torch.randint(4, 300, (6, 24), generator=torch.Generator().manual_seed(7))
# At least one of each kind: dense with norms elsewhere, scaled logits, multi-query, latent attention, fused experts of
# each layout, shared experts, recurrences and convolutions, encoder-like, wrappers, blocks that cannot be called alone.
TYPES = [
    "olmo2", "granite", "cohere", "falcon", "gptj", "bloom", "stablelm", "smollm3", "exaone4", "nemotron",
    "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "llama4_text", "dbrx", "glm4_moe",
    "bamba", "jamba", "mamba2", "falcon_h1", "lfm2", "qwen3_next", "nemotron_h", "rwkv",
    "bert", "gemma3", "gemma4_text", "qwen2_moe", "minicpm3",
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("types")


def loaded_of(place: Path, model_type: str) -> Loaded:
    """A small model of a type, to be changed."""
    folder = place / model_type
    return HubModel(name=str(folder if folder.exists() else tiny_folder(folder, model_type))).load(CPU, seed=0)


def weights_of(anatomy: Anatomy) -> dict[str, Tensor]:
    return {name: anatomies.out_in(linear, linear.weight.detach()).clone() for name, linear in anatomy.linears()}


def prune(loaded: Loaded, method: Method, **keys: Any) -> Any:
    calibrator = Calibrator(WINDOWS, **keys) if method.calibrated else None
    return method.prune(Anatomy(loaded.model), method.amount, 0, calibrator)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_of_a_described_family_the_same_is_found(family: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_folder(tmp_path, family)).eval()
    layout, described = found.layout_of(model), Anatomy(model)
    assert layout.blocks == described.family.blocks
    names = [[matrix.name for matrix in of_block] for of_block in layout.matrices]
    assert [sorted(of) for of in names] == [sorted(n for n, _ in of) for of in described.linears_by_block()]
    assert (layout.one_by_one, layout.whole_logits, layout.left_alone, layout.is_fused) == (True, False, {}, False)
    assert layout.share == pytest.approx(scope_of(described).share)


@pytest.mark.parametrize("method", [Wanda(amount=0.5), SparseGPT(amount=0.5), Ria(amount=0.4, refit="inputs")])
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_of_a_described_family_the_same_weights_go(
    family: str, method: Method, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    described = HubModel(name=str(make_folder(tmp_path / "m", family))).load(CPU, seed=0)
    other = copied(described)
    prune(described, method)
    with monkeypatch.context() as patch:
        patch.delitem(FAMILIES, family)
        prune(other, method)
    for mine, wanted in zip(other.model.parameters(), described.model.parameters(), strict=True):
        assert torch.equal(mine == 0, wanted == 0)
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", TYPES)
def test_single_weights_of_a_type(model_type: str, place: Path, tmp_path: Path) -> None:
    """Exact counts by four methods; what is left alone stays; stock transformers reads what was written."""
    dense = loaded_of(place, model_type)
    before = copy.deepcopy(dense.model.state_dict())
    inside = {name for name, _ in Anatomy(dense.model).linears()}
    assert scope_of(Anatomy(dense.model)).share > 0.3
    methods = (
        Magnitude(amount=0.5), Wanda(amount=0.5), SparseGPT(amount=0.5), Wanda(amount=0.5, pattern="2:4")
    )  # fmt: skip
    for method in methods:
        loaded = copied(dense)
        pruned = prune(loaded, method, propagate="pruned")
        rows = {row.layer: row for row in pruned.rows}
        assert set(rows) == inside
        weights = weights_of(Anatomy(loaded.model))
        for name, weight in weights.items():
            assert int((weight == 0).sum()) == rows[name].removed == weight.numel() // 2, (method, name)
            assert weight.isfinite().all()
        changed = {name for name, tensor in loaded.model.state_dict().items() if not torch.equal(tensor, before[name])}
        fused = {
            linear.place.parameter for _, linear in Anatomy(dense.model).linears() if isinstance(linear, FusedMatrix)
        }
        assert changed >= fused
        left = set(scope_of(Anatomy(dense.model)).left_alone)
        assert not changed & left
    save_model(loaded, tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    torch.testing.assert_close(logits(again), logits(loaded.model))
    check_reload(loaded.model, tmp_path / "saved", WINDOWS[:1])


def _rows_of_experts(model: Any, block: str, tokens: Tensor) -> list[Tensor]:
    """The states that the router of a block sends to each expert, by the router's own choice."""
    mlp = model.get_submodule(block)
    states: list[Tensor] = []
    hook = mlp.register_forward_pre_hook(lambda _, args: states.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    hook.remove()
    logits_of_router = states[0] @ mlp.gate.weight.T
    chosen = logits_of_router.topk(mlp.gate.top_k, dim=-1).indices
    return [states[0][(chosen == expert).any(-1)] for expert in range(len(mlp.gate.weight))]


@pytest.mark.parametrize("one_by_one", [True, False])
def test_an_expert_is_observed_on_its_own_tokens(one_by_one: bool, place: Path) -> None:
    model = loaded_of(place, "mixtral").model
    rows = _rows_of_experts(model, "model.layers.1.mlp", WINDOWS)
    layout = found.layout_of(model)
    model.__dict__[found._KEPT] = found.Layout(layout.blocks, layout.matrices, {}, 1.0, one_by_one)
    calibrator = Calibrator(WINDOWS, "dense", batch_size=6)
    needs = frozenset({"input_norm", "gram", "output_norm"})
    statistics = list(observed(calibrator, Anatomy(model), needs))[1]
    experts = model.get_submodule("model.layers.1.mlp.experts")
    for number, x in enumerate(rows):
        of_expert = statistics[f"model.layers.1.mlp.experts.gate_up_proj.{number}"]
        assert of_expert.rows == len(x)
        assert of_expert.input_norm is not None
        assert of_expert.gram is not None
        assert of_expert.output_norm is not None
        torch.testing.assert_close(of_expert.input_norm, x.norm(dim=0))
        torch.testing.assert_close(of_expert.gram, x.T @ x)
        torch.testing.assert_close(of_expert.output_norm, (x @ experts.gate_up_proj[number].T).norm(dim=0))


def test_experts_stored_the_other_way_round_lose_the_weights_that_are_meant(place: Path) -> None:
    """gpt-oss keeps (in, out): half of each output's inputs goes, by hand on the transposed tensor."""
    loaded = loaded_of(place, "gpt_oss")
    dense = loaded.model.model.layers[0].mlp.experts.gate_up_proj.detach().clone()
    prune(loaded, Magnitude(amount=0.5, scope="row"))
    pruned = loaded.model.model.layers[0].mlp.experts.gate_up_proj
    for expert, before in zip(pruned, dense, strict=True):
        by_output = before.T.abs()
        lowest = by_output.argsort(dim=1)[:, : by_output.shape[1] // 2]
        wanted = torch.ones_like(by_output, dtype=torch.bool).scatter_(1, lowest, False)
        assert torch.equal(expert.T != 0, wanted)


def test_an_expert_that_saw_hardly_a_token_is_pruned_by_magnitude_and_the_run_says_so(place: Path) -> None:
    loaded = loaded_of(place, "qwen3_moe")
    block = loaded.model.model.layers[1].mlp
    with torch.no_grad():  # the router sends nothing to expert 2
        loaded.model.model.norm.weight.mul_(1)
        block.gate.weight[2] = 0
        block.gate.weight[[0, 1, 3]] = block.gate.weight[[0, 1, 3]].abs() * 0
    dense = block.experts.down_proj[2].detach().clone()
    chosen = _rows_of_experts(loaded.model, "model.layers.1.mlp", WINDOWS)
    unseen = [number for number, rows in enumerate(chosen) if not len(rows)]
    assert unseen
    for method in (SparseGPT(amount=0.5, scope="row"), Wanda(amount=0.5), Wanda(amount=0.5, refit="inputs")):
        other = copied(loaded)
        pruned = prune(other, method)
        assert any("saw fewer than 16 tokens" in warning for warning in pruned.warnings)
        for number in unseen:
            before = loaded.model.model.layers[1].mlp.experts.down_proj[number].abs()
            after = other.model.model.layers[1].mlp.experts.down_proj[number]
            lowest = before.argsort(dim=1)[:, : before.shape[1] // 2]
            wanted = torch.ones_like(before, dtype=torch.bool).scatter_(1, lowest, False)
            assert torch.equal(after != 0, wanted)
    assert dense.shape == (64, 48)
    with pytest.raises(Refused, match=r"method.scope=global.*scope=layer or row"):
        prune(copied(loaded), Wanda(amount=0.5, scope="global"))


def test_gradients_of_fused_experts_are_those_of_autograd(place: Path) -> None:
    loaded = loaded_of(place, "mixtral")
    other = copy.deepcopy(loaded.model).requires_grad_(True)
    wanted = 0.0
    for window in WINDOWS.split(1):
        other.zero_grad()
        out = other(input_ids=window.long(), use_cache=False).logits
        torch.nn.functional.cross_entropy(out[0, :-1], window[0, 1:].long()).backward()
        weight = other.model.layers[0].mlp.experts.down_proj
        wanted = wanted + (weight * weight.grad).abs().detach()
    got = Calibrator(WINDOWS).saliency(Anatomy(loaded.model), 1)
    for expert in range(4):
        name = f"model.layers.0.mlp.experts.down_proj.{expert}"
        torch.testing.assert_close(got[name], wanted[expert] / len(WINDOWS), rtol=1e-3, atol=1e-7)
    prune(loaded, Unstructured(amount=0.5, score="taylor", scope="layer", refit="none"))


@pytest.mark.parametrize("model_type", ["granite", "cohere", "gemma4_text", "mixtral", "llama4"])
def test_losses_are_those_of_the_models_own_logits(model_type: str, place: Path) -> None:
    """Some scale or cap their logits behind the head."""
    model = loaded_of(place, model_type).model
    with torch.no_grad():
        out = model(input_ids=WINDOWS.long(), use_cache=False).logits
    wanted = torch.nn.functional.cross_entropy(out[:, :-1].transpose(1, 2), WINDOWS[:, 1:].long(), reduction="none")
    torch.testing.assert_close(window_losses(model, WINDOWS.long()), wanted.mean(1))


@pytest.mark.parametrize(("model_type", "one_by_one"), [("bamba", False), ("mixtral", True)])
def test_blocks_that_cannot_be_called_alone_are_calibrated_in_whole_passes(
    model_type: str, one_by_one: bool, place: Path
) -> None:
    """Their inputs are those that hooks see in the model's own forward pass."""
    model = loaded_of(place, model_type).model
    assert found.layout_of(model).one_by_one == one_by_one
    squares: dict[str, Tensor] = {}
    linears = {name: linear for name, linear in Anatomy(model).linears() if isinstance(linear, torch.nn.Linear)}
    hooks = [
        linear.register_forward_pre_hook(
            lambda _, args, name=name: squares.update({name: args[0].flatten(0, -2).square().sum(0)})
        )
        for name, linear in linears.items()
    ]
    with torch.no_grad():
        model(input_ids=WINDOWS.long(), use_cache=False)
    for hook in hooks:
        hook.remove()
    blocks = observed(Calibrator(WINDOWS, "dense", batch_size=6), Anatomy(model), frozenset({"input_norm"}))
    seen = {name: statistics.input_norm for of_block in blocks for name, statistics in of_block.items()}
    assert squares
    for name, wanted in squares.items():
        got = seen[name]
        assert got is not None
        torch.testing.assert_close(got, wanted.sqrt(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("model_type", "routers"), [("mixtral", "mlp.gate.weight"), ("gpt_oss", "mlp.router.weight"),
                                ("jamba", "feed_forward.router.weight")]
)  # fmt: skip
def test_routers_are_left_alone(model_type: str, routers: str, place: Path) -> None:
    """And nothing that multiplies states but they, of the matrices in these models."""
    model = loaded_of(place, model_type).model
    left = {name for name, reason in found.layout_of(model).left_alone.items() if reason == found.ROUTER}
    named = {name for name, _ in model.named_parameters() if name.endswith(routers)}
    assert left == named != set()


def test_time_of_a_model_that_has_no_cache_is_refused(cli: Cli, place: Path, text: str) -> None:
    loaded_of(place, "rwkv")
    done = cli("model=hf", f"model.name={place / 'rwkv'}", text, *TEXT, "measure=quick", "method=magnitude")
    assert done.returncode != 0
    assert "measure=quality_only" in done.stderr


def test_a_run_of_an_unusual_model_measures_everything(cli: Cli, place: Path, tmp_path: Path, text: str) -> None:
    loaded_of(place, "zamba2")
    keys = ["measure.pairs=10", "measure.prompt_tokens=16", "measure.decode_tokens=2", "hydra.run.dir=run"]
    keys += ["measure.generation_prompts=2", "measure.generation_tokens=16", "method=ria", "method.refit=inputs"]
    done = cli("model=hf", f"model.name={place / 'zamba2'}", text, *TEXT, *keys)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert {"latency/decode_speedup", "memory/peak_mb", "generation/loops"} <= summary["metrics"].keys()
    assert "memory/kv_cache_bytes_per_token" not in summary["metrics"]
    assert summary["protocol"]["calibration"]["pass"] == "the whole model"
    assert summary["protocol"]["calibration"]["propagate"] == "dense"


def test_experts_that_are_given_zeros_saw_no_token(place: Path) -> None:
    """Llama 4 multiplies each expert's inputs by 0 where they are not its own: all rows are there."""
    loaded = loaded_of(place, "llama4_text")
    moe = next(block.feed_forward for block in loaded.model.model.layers if hasattr(block.feed_forward, "experts"))
    with torch.no_grad():
        moe.router.weight.zero_()  # every token goes to one of them
    pruned = prune(loaded, SparseGPT(amount=0.5))
    shares = [float((expert == 0).float().mean()) for expert in moe.experts.gate_up_proj]
    assert shares == [0.5] * len(shares)
    assert any("pruned by magnitude" in warning for warning in pruned.warnings)


def test_an_expert_without_a_gradient_is_pruned_by_magnitude(place: Path) -> None:
    loaded = loaded_of(place, "mixtral")
    with torch.no_grad():
        loaded.model.model.layers[1].mlp.gate.weight.zero_()
    taylor = Unstructured(amount=0.5, score="taylor", scope="layer", refit="none")
    other = copied(loaded)
    pruned = prune(other, taylor)
    unseen = [name for name in pruned.unseen if "layers.1.mlp.experts.down_proj" in name]
    assert unseen
    for name in unseen:
        number = int(name.rpartition(".")[2])
        before = loaded.model.model.layers[1].mlp.experts.down_proj[number].abs().flatten()
        after = other.model.model.layers[1].mlp.experts.down_proj[number].flatten()
        assert before[after == 0].max() <= before[after != 0].min()


@pytest.mark.parametrize("model_type", ["sarvam_moe", "mixtral", "qwen2_moe"])
def test_the_layout_of_a_loaded_model_is_that_of_a_built_one(model_type: str, place: Path) -> None:
    """Loading leaves parameters that are parts of one tensor of the checkpoint."""
    built, loaded = (found.layout_of(model) for model in (tiny_model(model_type), loaded_of(place, model_type).model))
    assert (built.matrices, built.left_alone) == (loaded.matrices, loaded.left_alone)


def test_a_gate_of_a_shared_expert_is_no_router(place: Path) -> None:
    layout = found.layout_of(loaded_of(place, "qwen2_moe").model)
    names = {matrix.name for of_block in layout.matrices for matrix in of_block}
    assert "model.layers.1.mlp.shared_expert.gate_proj" in names
    assert "model.layers.1.mlp.shared_expert_gate.weight" in layout.left_alone


def test_a_model_that_sees_what_follows_is_refused() -> None:
    with pytest.raises(Refused, match="is_decoder=true"):
        found.layout_of(tiny_model("bert", is_decoder=False))


def test_what_a_type_keeps_in_float32_is_so_after_a_training(cli: Cli, place: Path, tmp_path: Path, text: str) -> None:
    loaded_of(place, "glm4_moe_lite")
    keys = [f"model.name={place / 'glm4_moe_lite'}", text, *TEXT, "measure=quality_only", "hydra.run.dir=run"]
    done = cli("model=hf", *keys, "method=magnitude", "amount=0.5", "export=hf", "dtype=bfloat16", "recovery=finetune",
               "recovery.steps=2", "recovery.batch_size=2", "recovery.validate_every=0")  # fmt: skip
    assert done.returncode == 0, done.stderr
    dense = HubModel(name=str(place / "glm4_moe_lite")).load(Device(torch.device("cpu"), torch.bfloat16), seed=0)
    kept = {name for name, weight in dense.model.named_parameters() if weight.dtype == torch.float32}
    kept |= {name for name, buffer in dense.model.named_buffers() if buffer.dtype == torch.float32}
    stored = load_file(tmp_path / "run" / "export" / "model.safetensors")
    assert kept & stored.keys()
    assert all(stored[name].dtype == torch.float32 for name in kept & stored.keys())


@pytest.mark.parametrize(
    ("model_type", "why"), [("hrm_text", "several lists of blocks"), ("blt", "several lists of blocks")]
)
def test_a_model_of_several_stacks_is_refused(model_type: str, why: str) -> None:
    with pytest.raises(Refused, match=why):
        found.layout_of(tiny_model(model_type))


TEXT = [
    "dataset=text",
    "dataset.seq_len=32",
    "dataset.calibration.n_samples=8",
    "tracking=none",
    "measure.max_windows=4",
]


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": story(seed)}) + "\n" for seed in range(60)), encoding="utf-8")
    return f"dataset.path={path}"


def test_a_run_says_what_is_in_scope_and_its_export_is_stocks(cli: Cli, place: Path, tmp_path: Path, text: str) -> None:
    loaded_of(place, "mixtral")
    keys = [f"model.name={place / 'mixtral'}", text, *TEXT, "measure=quality_only", "hydra.run.dir=run"]
    done = cli("model=hf", *keys, "method=wanda", "amount=0.5", "export=hf", "recovery=finetune", "recovery.steps=2",
               "recovery.batch_size=2", "recovery.validate_every=0")  # fmt: skip
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    scope = summary["model"]["scope"]
    assert scope["left_alone"] == {"router of experts": [f"model.layers.{i}.mlp.gate.weight" for i in range(3)]}
    assert summary["metrics"]["scope/share"] == scope["share"] == pytest.approx(0.9956, abs=1e-3)
    assert summary["metrics"]["amount/realized"] == 0.5
    rows = list(csv.DictReader((tmp_path / "run" / "layers.csv").read_text().splitlines()))
    assert {row["layer"]: row["removed"] for row in rows if row["left_alone"]} == dict.fromkeys(
        scope["left_alone"]["router of experts"], "0"
    )
    tensors = load_file(tmp_path / "run" / "export" / "model.safetensors")
    experts = {name: tensor for name, tensor in tensors.items() if ".experts." in name}
    assert len(experts) == 3 * 4 * 3  # one by one, as the Hub has them
    for name, tensor in experts.items():
        assert (tensor == 0).float().mean() == 0.5, name


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["method=structured", "method.refit=residual"], ["method.refit=residual", "mixtral", "method.refit=inputs"]),
        (["method=wanda", "method.refit=residual"], ["method.refit=residual", "method.refit=inputs"]),
        (["method=magnitude", "post=int8_dynamic"], ["post=int8_weight_only", "post=int4_weight_only"]),
        (["method=magnitude", "recovery=reconstruct"], ["recovery=reconstruct", "recovery=finetune"]),
        (["method=magnitude", "recovery=finetune", "recovery.dropout=0.1"], ["recovery.dropout"]),
        (["method=sensitivity"], ["method=sensitivity", "method.parts=[weights,block]"]),
    ],
)
def test_what_is_not_done_to_a_found_layout_is_refused(
    keys: list[str], words: list[str], cli: Cli, place: Path, text: str
) -> None:
    loaded_of(place, "mixtral")
    done = cli("model=hf", f"model.name={place / 'mixtral'}", text, *TEXT, "measure=quality_only", *keys)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr, done.stderr


@pytest.mark.slow
@pytest.mark.process  # not in the daily loop either
@pytest.mark.parametrize("model_type", [*types_of_transformers(), *image_text_types()])
def test_the_page_says_what_works(model_type: str, tmp_path: Path) -> None:
    """Every type that stock transformers builds, as its page has it for the version that is named there."""
    path = IMAGE_TEXT_PAGE if model_type in image_text_types() else PAGE
    page = path.read_text(encoding="utf-8")
    if f"transformers {version('transformers')}:" not in page:
        pytest.skip(f"{path.name} is of another version of transformers")
    assert str(row_of(model_type, tmp_path)) in page
