"""On a CUDA GPU: the same results as on a CPU, and what a CPU does not have. Where there is none, nothing here runs."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Cli, logits, make_folder
from model_types import tiny_folder
from test_selection import naive_keep, signed_scores
from test_sparsegpt import correlated, loss, parsed, textbook
from test_streaming import check_alike
from torch import Tensor, nn
from trainings import training_of, weights_of
from transformers import AutoModelForCausalLM

from prune_lab.measure.inference import prefill
from prune_lab.measure.perplexity import measure_losses, quality_of
from prune_lab.measure.replayed import Replayed
from prune_lab.measure.settings import Measure
from prune_lab.measure.speed import measure_latency
from prune_lab.methods.base import Method
from prune_lab.methods.depth import Depth
from prune_lab.methods.experts import Experts
from prune_lab.methods.magnitude import Magnitude
from prune_lab.methods.random import Random
from prune_lab.methods.ria import Ria
from prune_lab.methods.sparsegpt import SparseGPT
from prune_lab.methods.structured import Structured
from prune_lab.methods.unstructured import Unstructured
from prune_lab.methods.wanda import Wanda
from prune_lab.models.anatomy import Anatomy
from prune_lab.models.load import HubModel
from prune_lab.models.low_bit.semi_structured import SparseLinear
from prune_lab.post.quantize import Int4WeightOnly, Int8Dynamic, Int8WeightOnly
from prune_lab.post.sparse_2_4 import Sparse24
from prune_lab.pruning import thresholds
from prune_lab.pruning.calibration import Calibrator
from prune_lab.pruning.pattern import Pattern
from prune_lab.pruning.refit_targets import TARGETS
from prune_lab.pruning.selection import count_to_remove, keep_global, keep_layer, keep_pattern, keep_rows
from prune_lab.pruning.sparsegpt_solver import solve
from prune_lab.recovery.distill import Distill
from prune_lab.recovery.finetune import Finetune
from prune_lab.recovery.lora import Lora
from prune_lab.recovery.reconstruct import Reconstruct
from prune_lab.schedules import OneShot
from prune_lab.system.console import Console
from prune_lab.system.device import Device, native_bfloat16, resolve

if not torch.cuda.is_available():
    pytest.skip("there is no CUDA GPU here", allow_module_level=True)

GPU, CPU, QUIET = torch.device("cuda:0"), torch.device("cpu"), Console(quiet=True)
WINDOWS = torch.randint(1, 300, (6, 24), generator=torch.Generator().manual_seed(7))
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def test_auto_is_the_gpu_in_bfloat16() -> None:
    device = resolve("auto", "auto")
    assert device.torch_device == GPU
    assert device.dtype == (torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16)
    assert device.compute_capability == torch.cuda.get_device_capability()
    assert native_bfloat16(GPU) == (device.compute_capability >= (8, 0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_selection_with_ties_is_exact(dtype: torch.dtype) -> None:
    scores = signed_scores(24, 40, dtype)
    for amount in (0.0, 0.02, 0.3, 0.5, 0.55, 0.98):
        remove, of_row = count_to_remove(scores.numel(), amount), count_to_remove(40, amount)
        assert torch.equal(keep_layer(scores.to(GPU), amount).cpu(), naive_keep(scores, remove))
        rows = torch.stack([naive_keep(row, of_row) for row in scores])
        assert torch.equal(keep_rows(scores.to(GPU), of_row).cpu(), rows)


@pytest.mark.parametrize("dtype", DTYPES)
def test_selection_is_that_of_a_cpu(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of more scores than are looked at together."""
    monkeypatch.setattr(thresholds, "AT_ONCE", 2**14)
    drawn = torch.Generator().manual_seed(3)
    scores = [torch.randn(300, 700, generator=drawn).to(dtype), torch.randn(500, 400, generator=drawn).abs().to(dtype)]
    there = [values.to(GPU) for values in scores]
    for amount in (0.01, 0.5, 0.93):
        pairs = list(zip(keep_global(there, amount), keep_global(scores, amount), strict=True))
        pairs += [(keep_layer(there[0], amount), keep_layer(scores[0], amount))]
        pairs += [(keep_rows(there[0], int(700 * amount)), keep_rows(scores[0], int(700 * amount)))]
        for found, expected in pairs:
            assert torch.equal(found.cpu(), expected)
    for pattern in ("2:4", "4:8", "5:20"):
        found, expected = (keep_pattern(values, Pattern.parse(pattern)) for values in (there[0], scores[0]))
        assert torch.equal(found.cpu(), expected)
    several, counts = [1, 1000, 150_000], thresholds.ScoreCounts()
    assert (
        thresholds.thresholds(there, several)
        == thresholds.thresholds(scores, several)
        == [counts.threshold(there, n) for n in several]
    )


@pytest.mark.parametrize(
    ("rows", "columns", "amount", "pattern"),
    [
        (24, 256, 0.5, None), (16, 300, 0.6, None), (7, 129, 0.5, None), (9, 37, 0.3, None), (1, 130, 0.5, None),
        (24, 256, 0.5, "2:4"), (16, 256, 0.5, "4:8"), (16, 264, 0.5, "3:6"), (8, 400, 0.5, "50:200"),
    ],
)  # fmt: skip
def test_sparsegpt_against_the_textbook(rows: int, columns: int, amount: float, pattern: str | None) -> None:
    for seed in (0, 1):  # again in the same shape
        weight, gram = correlated(rows, columns, seed)
        expected = textbook(weight, gram, amount, pattern)
        found = solve(weight.to(GPU), gram.to(GPU), amount, parsed(pattern))
        kept = found.keep.cpu()
        assert (kept == expected.keep).float().mean() > 0.995
        if torch.equal(kept, expected.keep):
            torch.testing.assert_close(found.weight.cpu().double(), expected.weight, atol=2e-3, rtol=0)
        best = loss(weight, expected.weight, gram)
        assert loss(weight, found.weight.cpu(), gram) == pytest.approx(
            best, rel=5e-3, abs=1e-5 * loss(weight, 0 * weight, gram)
        )
        assert not found.weight.cpu()[~kept].any()


def pruned(folder: Path, method: Method, device: Device) -> tuple[dict[str, Tensor], float]:
    """Which weights are not zero, by name, and the perplexity."""
    model = HubModel(name=str(folder)).load(device, seed=0).model
    method.prune(Anatomy(model), method.amount, 0, Calibrator(WINDOWS, batch_size=2))
    assert {weight.device for weight in model.parameters()} == {device.torch_device}
    kept = {name: (weight != 0).cpu() for name, weight in model.state_dict().items()}
    return kept, quality_of(measure_losses(model, WINDOWS, 2, device, QUIET), 3.0).perplexity


METHODS: list[Method] = [
    Magnitude(amount=0.5), Magnitude(amount=0.5, scope="global"), Magnitude(amount=0.5, pattern="2:4"),
    Random(amount=0.5), Wanda(amount=0.5), Wanda(amount=0.5, allocation="owl"), Ria(amount=0.5),
    SparseGPT(amount=0.5), SparseGPT(amount=0.5, pattern="2:4"), Structured(amount=0.4),
    Structured(amount=0.4, score="wanda"), Structured(amount=0.4, score="taylor"), Depth(amount=0.5),
    Depth(amount=0.5, by="kl"), Depth(amount=0.5, by="angle"), SparseGPT(amount=0.5, scope="row"),
    *(Wanda(amount=0.5, refit=refit) for refit in TARGETS), SparseGPT(amount=0.5, refit="inputs"),
    *(Structured(amount=0.4, score="obs", refit=refit) for refit in TARGETS),
    Unstructured(amount=0.5, score="taylor"), Unstructured(amount=0.5, score="wifv"),
]  # fmt: skip


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_method_prunes_what_it_prunes_on_a_cpu(folder: Path, method: Method) -> None:
    here, there = (pruned(folder, method, Device(place, torch.float32)) for place in (CPU, GPU))
    assert here[0].keys() == there[0].keys()
    by_weights = isinstance(method, Magnitude | Random)
    for name, kept in here[0].items():
        alike = (kept == there[0][name]).float().mean()
        assert alike == 1 if by_weights else alike > 0.99, name
    assert there[1] == pytest.approx(here[1], rel=1e-5 if by_weights else 1e-2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_perplexity_is_that_of_a_cpu(folder: Path, dtype: torch.dtype) -> None:
    none = Magnitude(amount=0.0)
    here, there = pruned(folder, none, Device(CPU, torch.float32)), pruned(folder, none, Device(GPU, dtype))
    assert there[1] == pytest.approx(here[1], rel=1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("method", [Wanda(amount=0.5), SparseGPT(amount=0.5), Magnitude(amount=0.3)], ids=str)
def test_streamed_through_the_gpu_is_as_in_its_memory(folder: Path, tmp_path: Path, method: Method) -> None:
    check_alike(folder, tmp_path, method, device=Device(GPU, torch.bfloat16))


@pytest.mark.parametrize("method", [Wanda(amount=0.5), Experts(amount=0.5)], ids=str)
def test_a_mixture_streamed_through_the_gpu_is_as_in_its_memory(tmp_path: Path, method: Method) -> None:
    check_alike(tiny_folder(tmp_path / "model", "mixtral"), tmp_path, method, device=Device(GPU, torch.bfloat16))


@pytest.mark.parametrize("family", ["llama", "qwen2"])  # with and without biases
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_2_4_kernels_compute_what_the_zeros_do(tmp_path: Path, dtype: torch.dtype, family: str) -> None:
    folder = make_folder(tmp_path / "wide", family, hidden_size=128, intermediate_size=256)
    device = Device(GPU, dtype)
    model = HubModel(name=str(folder)).load(device, seed=0).model
    Magnitude(amount=0.5, pattern="2:4").prune(Anatomy(model), 0.5, 0, None)
    before, dense = {name: value.clone() for name, value in model.state_dict().items()}, copy.deepcopy(model)
    Sparse24().check(device)
    Sparse24().compress(Anatomy(model))
    found = {name: value for name, value in model.state_dict().items() if name in before}
    assert found.keys() == before.keys()
    assert all(torch.equal(found[name], value) for name, value in before.items())
    tokens = WINDOWS.to(GPU)
    for asked in (tokens, tokens[:1, :5], tokens):
        with torch.no_grad():
            sparse, expected = (m(input_ids=asked, use_cache=False).logits.float() for m in (model, dense))
        assert float((sparse - expected).norm() / expected.norm()) < 0.02
    for accelerate in ("none", "cuda_graphs"):
        keys = Measure(pairs=10, decode_tokens=2, accelerate=accelerate)
        timed = measure_latency(dense, model, WINDOWS[:1], keys, device, QUIET)
        assert timed.prefill.speedup > 0


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
def test_the_fastest_2_4_kernel_computes_the_same(bias: bool) -> None:
    """In shapes of real models: in smaller ones the search itself was seen to fail."""
    linear = nn.Linear(2048, 8192, bias, device=GPU, dtype=torch.bfloat16)
    linear.weight.view(-1, 4)[:, ::2] = 0
    found = SparseLinear(linear, search=True)
    for rows in (1, 16, 2048):
        inputs = torch.randn(2, rows, 2048, device=GPU, dtype=torch.bfloat16)
        expected = linear(inputs).float()
        assert float((found(inputs).float() - expected).norm() / expected.norm()) < 0.01
        assert found(inputs).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_replayed_is_what_is_computed(folder: Path, dtype: torch.dtype) -> None:
    """Each time of the prompt that was given, whatever was decoded before."""
    model = HubModel(name=str(folder)).load(Device(GPU, dtype), seed=0).model
    replayed, prompts = Replayed(model), WINDOWS.to(GPU).split(1)
    for prompt in prompts[:4]:
        found, expected = replayed.prefill(prompt), prefill(model, prompt)
        torch.testing.assert_close(found.logits, expected.logits)
        replayed.decode(found, 3)
    for prompt in prompts:
        torch.testing.assert_close(replayed.prefill(prompt).logits, prefill(model, prompt).logits)


@torch.no_grad()
def test_replayed_decoding_goes_on_from_the_prompt(folder: Path) -> None:
    """The tokens are those of greedy decoding without a cache."""
    model = HubModel(name=str(folder)).load(Device(GPU, torch.float32), seed=0).model
    chosen: list[Tensor] = []
    hook = model.lm_head.register_forward_hook(lambda module, args, out: chosen.append(out[:, -1:].argmax(-1)))
    replayed = Replayed(model)
    for number, prompt in enumerate(WINDOWS.to(GPU).split(1)):
        replayed.decode(replayed.prefill(prompt), 4)
        if number == 0:  # what was captured last, and is written to each time
            chosen = chosen[-4:]
            hook.remove()
        ids = prompt
        for _ in range(5):
            ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        assert torch.equal(torch.cat(chosen, 1), ids[:, -4:])


@pytest.mark.parametrize("post", [Int8WeightOnly(), Int8Dynamic(), Int4WeightOnly(group_size=16)], ids=str)
def test_low_bits_are_those_of_a_cpu(folder: Path, post: Any) -> None:
    found = []
    for place in (CPU, GPU):
        device = Device(place, torch.float32)
        model = HubModel(name=str(folder)).load(device, seed=0).model
        post.check(device)
        post.compress(Anatomy(model))
        with torch.no_grad():
            found.append(model(input_ids=WINDOWS.to(place), use_cache=False).logits.cpu())
        del model
    assert float((found[1] - found[0]).norm() / found[0].norm()) < 1e-3


@pytest.mark.parametrize("recovery", [Finetune, Distill, Lora], ids=lambda kind: kind.__name__)
def test_training_lowers_the_loss_and_holds_the_zeros(folder: Path, tmp_path: Path, recovery: Any) -> None:
    device, losses = Device(GPU, torch.bfloat16), list[float]()
    loaded = HubModel(name=str(folder)).load(device, seed=0)
    removed = Magnitude(amount=0.5).prune(Anatomy(loaded.model), 0.5, 0, None)
    zeros = {name: weight == 0 for name, weight in weights_of(loaded.model).items() if name.endswith("proj.weight")}

    def log(step: int, values: dict[str, float]) -> None:
        losses.extend(value for key, value in values.items() if key.endswith("loss") and "validation" not in key)

    settings = recovery(steps=40, lr=0.003, batch_size=4, warmup=0.1, validate_every=0)
    settings.recover(loaded.model, replace(training_of(loaded, tmp_path, log, steps=40), device=device, pruned=removed))
    assert len(losses) >= 2
    assert losses[-1] < losses[0]
    for name, weight in loaded.model.named_parameters():
        assert weight.dtype == torch.bfloat16
        if name in zeros:
            assert not weight[zeros[name]].any()


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mixtral of four experts in each block, two for a token."""
    return tiny_folder(tmp_path_factory.mktemp("mixture") / "mixtral", "mixtral")


MIXTURE_METHODS: list[Method] = [
    *(Experts(amount=0.5, score=score) for score in ("reap", "aimer", "ranked_choice", "leave_one_out")),
    Magnitude(amount=0.5), Wanda(amount=0.5), SparseGPT(amount=0.5), Structured(amount=0.5), Depth(amount=0.34),
]  # fmt: skip


@pytest.mark.parametrize("method", MIXTURE_METHODS, ids=str)
def test_a_mixture_is_pruned_as_on_a_cpu(mixture: Path, method: Method) -> None:
    here, there = (pruned(mixture, method, Device(place, torch.float32)) for place in (CPU, GPU))
    for name, kept in here[0].items():
        assert kept.shape == there[0][name].shape
        assert (kept == there[0][name]).float().mean() > 0.99, name
    assert there[1] == pytest.approx(here[1], rel=1e-2)


@pytest.mark.parametrize("post", [Int8WeightOnly(), Int4WeightOnly(group_size=16)], ids=str)
def test_low_bits_of_experts_are_those_of_a_cpu(mixture: Path, post: Any) -> None:
    found = []
    for place in (CPU, GPU):
        model = HubModel(name=str(mixture)).load(Device(place, torch.float32), seed=0).model
        post.compress(Anatomy(model))
        assert {tensor.device for tensor in model.state_dict().values()} == {place}
        found.append(logits(model.cpu()))
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("recovery", [Finetune, Lora], ids=lambda kind: kind.__name__)
def test_a_pruned_mixture_is_trained(mixture: Path, tmp_path: Path, recovery: Any) -> None:
    device, losses = Device(GPU, torch.bfloat16), list[float]()
    loaded = HubModel(name=str(mixture)).load(device, seed=0)
    method = Experts(amount=0.5, score="aimer")
    settings = recovery(steps=40, lr=0.003, batch_size=4, warmup=0.1, validate_every=0)

    def log(step: int, values: dict[str, float]) -> None:
        losses.extend(value for key, value in values.items() if key == "train/loss")

    training = training_of(loaded, tmp_path, log, method, OneShot(), steps=40, device=device)
    settings.recover(loaded.model, training)
    assert loaded.model.config.num_local_experts == 2
    assert losses[-1] < losses[0]


def test_a_reconstruction_is_that_of_a_cpu(folder: Path, tmp_path: Path) -> None:
    found = []
    for place in (CPU, GPU):
        device = Device(place, torch.float32)
        dense, loaded = (HubModel(name=str(folder)).load(device, seed=0) for _ in range(2))
        recipe, method = Reconstruct(steps=6, lr=1e-3, batch_size=2, autocast="none"), Wanda(amount=0.5)
        training = training_of(
            loaded, tmp_path / place.type, None, method, OneShot(), steps=6, dense=dense, device=device
        )
        recipe.recover(loaded.model, training)
        found.append({name: weight.cpu() for name, weight in weights_of(loaded.model).items()})
    for name, weight in found[0].items():
        assert float((found[1][name] - weight).norm() / weight.norm()) < 1e-2, name


def test_a_whole_run(cli: Cli, small: list[str], tmp_path: Path) -> None:
    """Its memory is the GPU's, its latency is timed there, and anyone loads the export on a CPU."""
    keys = ["tracking=none", "method=structured", "amount=0.25", "export=hf", "dtype=float32", "measure.memory=true"]
    args = [*small, *keys]
    summaries = {}
    for device in ("cpu", "cuda"):
        done = cli(*args, f"device={device}", f"hydra.run.dir={tmp_path / device}")
        assert done.returncode == 0, done.stderr
        summaries[device] = json.loads((tmp_path / device / "summary.json").read_text())
    here, there = (summaries[device]["metrics"] for device in ("cpu", "cuda"))
    assert there["quality/perplexity"] == pytest.approx(here["quality/perplexity"], rel=1e-4)
    assert there["params/total"] == here["params/total"]
    assert summaries["cpu"]["fingerprint"] != summaries["cuda"]["fingerprint"]
    assert there["memory/peak_mb"] > 0
    assert there["latency/prefill_ms_p50"] > 0
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / device / "export").eval() for device in summaries]
    torch.testing.assert_close(*(logits(model) for model in models), atol=1e-4, rtol=1e-4)
    again = cli(*args, "device=cuda", f"hydra.run.dir={tmp_path / 'cuda'}")
    assert again.returncode == 0, again.stderr
    assert "finished before, not computed again" in again.stdout


@pytest.mark.parametrize(
    "keys",
    [
        ["measure.accelerate=compile"],
        ["measure.accelerate=cuda_graphs", "measure.aa=true"],
        ["model.stream=true", "measure.latency=false"],
        ["post=fp8", "measure.energy=true"],
    ],
    ids=str,
)
def test_runs_of_other_kinds(cli: Cli, small: list[str], tmp_path: Path, keys: list[str]) -> None:
    where = ["device=cuda", "tracking=none", f"hydra.run.dir={tmp_path / 'run'}"]
    done = cli(*small, "method=wanda", *where, *keys)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "run" / "summary.json").read_text())["metrics"]
    assert metrics["quality/perplexity"] > 1
    assert ("latency/prefill_ms_p50" in metrics) == ("measure.latency=false" not in keys)
