"""The compressed model beside the dense one: divergence, likeliest tokens, paired interval, flips; and the KV cache."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ALL_FAMILIES, CPU, Cli, copied, make_folder
from test_bisect import search
from test_bos import with_bos
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from prune_lab.evaluator import Evaluator
from prune_lab.export.hf import HuggingFace
from prune_lab.export.none import NoExport
from prune_lab.measure.divergence import (
    Divergence,
    divergence_of,
    flips,
    paired_error,
    position_divergences,
    quantile,
    ratio_interval,
)
from prune_lab.measure.measurements import Measurements
from prune_lab.measure.perplexity import measure_beside, measure_losses
from prune_lab.measure.settings import Measure
from prune_lab.measure.size import kv_cache_bytes, measure_size
from prune_lab.methods.depth import Depth
from prune_lab.methods.magnitude import Magnitude
from prune_lab.methods.structured import Structured
from prune_lab.models import loss
from prune_lab.models.anatomy import Anatomy
from prune_lab.models.export import save_model
from prune_lab.models.load import HubModel, Loaded
from prune_lab.post.quantize import Int4WeightOnly, Int8Dynamic, Int8WeightOnly
from prune_lab.pruning.calibration import Calibrator
from prune_lab.results.bounds import Bound, read_bounds
from prune_lab.sweeps.bisection import Budget
from prune_lab.system.console import Console
from prune_lab.system.device import Device
from prune_lab.text.bos import NO_BOS, Bos
from prune_lab.text.text_files import TextFiles

QUIET = Console(quiet=True)
WINDOWS = torch.randint(1, 300, (7, 24), generator=torch.Generator().manual_seed(3))

# Golden values: three-way logits of 4 positions, by numpy in float64, outside of this package.

DENSE = torch.tensor([[2.0, 1, 0], [0, 1, 3], [1, 1, 1], [4, 0, 0]])
OTHER = torch.tensor([[1.0, 2, 0], [0, 1, 2], [1, 0, 1], [3, 0, 1]])
TARGETS = torch.tensor([0, 2, 1, 0])


def losses_of(logits: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits, TARGETS, reduction="none")


def test_golden_divergence() -> None:
    """The third position ties twice: of equally likely tokens the first counts, so both have token 0."""
    kl, same = position_divergences(DENSE, OTHER)
    assert kl.dtype == torch.float64
    assert kl.tolist() == pytest.approx([0.420512, 0.081555, 0.096716, 0.080864], abs=2e-6)
    assert same.tolist() == [False, True, True, True]
    found = divergence_of(kl, same)
    assert (found.kl, found.kl_p50, found.same_top) == pytest.approx((0.169912, 0.089135, 0.75), abs=2e-6)
    assert found.kl_p99 == pytest.approx(0.096716 + 0.97 * (0.420512 - 0.096716), abs=2e-6)


def test_golden_ratio_and_its_error() -> None:
    dense, other = losses_of(DENSE), losses_of(OTHER)
    assert math.exp(dense.mean()) == pytest.approx(1.534202, abs=1e-6)
    assert math.exp(other.mean()) == pytest.approx(2.616305, abs=1e-6)
    assert paired_error(dense, other) == pytest.approx(0.207693, abs=1e-6)
    expected = [1.70532 * math.exp(side * 1.96 * 0.207693) for side in (-1, 1)]
    assert ratio_interval(dense, other) == pytest.approx(expected, rel=1e-5)


def test_golden_flips() -> None:
    """Accuracy falls by a sixth; half of the answers changed."""
    assert flips("110010", "101000") == 0.5
    assert flips("101000", "110010") == 0.5
    assert flips("1", "1") == 0


# Corner cases of the pure functions.


def test_equal_logits_do_not_diverge() -> None:
    logits = torch.randn(50, 300, generator=torch.Generator().manual_seed(1)) * 8
    assert divergence_of(*position_divergences(logits, logits.clone())) == Divergence(0.0, 0.0, 0.0, 1.0)


def test_a_token_that_neither_model_can_choose_adds_nothing() -> None:
    never = torch.tensor([[0.0, 1.0, -math.inf]])
    (kl,), _ = position_divergences(never, never[:, [1, 0, 2]])
    share = 1 / (1 + math.e)
    assert float(kl) == pytest.approx((1 - share) - share, abs=1e-6)  # one nat either way
    assert float(position_divergences(torch.zeros(1, 3), never)[0]) == math.inf
    far = torch.tensor([[0.0, 200.0]])  # float32 has no share for the other token
    assert float(position_divergences(far, far.flip(1))[0]) == pytest.approx(200)


def test_a_model_that_is_no_number_diverges_and_agrees_nowhere() -> None:
    kl, same = position_divergences(DENSE, OTHER.clone().fill_(math.nan))
    found = divergence_of(kl, same)
    assert all(math.isnan(value) for value in (found.kl, found.kl_p50, found.kl_p99))
    assert found.same_top == 0
    one = torch.cat([torch.tensor([math.nan]), torch.zeros(99)]).double()  # its median would be a number
    assert math.isnan(divergence_of(one, one == 0).kl_p50)


@pytest.mark.parametrize("count", [1, 2, 3, 100, 101, 1000])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.9, 0.99, 1.0])
def test_quantiles_are_those_of_numpy(count: int, share: float) -> None:
    values = torch.rand(count, generator=torch.Generator().manual_seed(count), dtype=torch.float64).sort().values
    assert quantile(values, share) == pytest.approx(float(np.quantile(values.numpy(), share)), rel=1e-12)


def test_one_target_has_no_interval_and_wild_losses_an_infinite_one() -> None:
    assert ratio_interval(torch.ones(1, 1), torch.zeros(1, 1)) is None
    wild = ratio_interval(torch.ones(3), torch.tensor([1e4, 1e5, 1e4]))
    assert wild is not None
    assert wild[1] == math.inf
    assert ratio_interval(torch.rand(2, 3), torch.rand(2, 3) + 1e-9) is not None
    equal = torch.rand(2, 3)
    assert ratio_interval(equal, equal) == (1.0, 1.0)


def test_the_interval_holds_the_true_ratio_as_often_as_it_says() -> None:
    """Of 400 samples of independent tokens about 95 % hold it: 92 to 98 % at four standard errors."""
    generator, hits = torch.Generator().manual_seed(0), 0
    for _ in range(400):
        dense = torch.randn(200, generator=generator).exp()
        interval = ratio_interval(dense, dense + 0.1 + 0.5 * torch.randn(200, generator=generator))
        assert interval is not None
        hits += interval[0] <= math.exp(0.1) <= interval[1]
    assert 0.91 <= hits / 400 <= 0.985


# Models, against whole logits of stock transformers in float64.


@torch.no_grad()
def whole(model: Any, window: Tensor, bos: int | None) -> Any:
    """float64 log-softmax of the logits that predict a window's targets, one window at a time."""
    before = [] if bos is None else [bos]
    logits = model(input_ids=torch.tensor([[*before, *window.tolist()]])).logits[0, len(before) : -1]
    z = logits.double().numpy()
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def naive(dense: Any, other: Any, windows: Tensor, bos: int | None = None) -> tuple[float, float, float, float]:
    kl, same = [], []
    for window in windows:
        p, q = whole(dense, window, bos), whole(other, window, bos)
        kl += (np.exp(p) * (p - q)).sum(-1).tolist()
        same += (p.argmax(-1) == q.argmax(-1)).tolist()
    return float(np.mean(kl)), float(np.quantile(kl, 0.5)), float(np.quantile(kl, 0.99)), float(np.mean(same))


def pruned(loaded: Loaded, method: Any = None) -> Loaded:
    found, method = copied(loaded), method or Magnitude(amount=0.4)
    method.prune(Anatomy(found.model), method.amount, 0, Calibrator(WINDOWS) if method.calibrated else None)
    return found


def beside(model: Any, dense: Any, compared: int, batch_size: int = 3, bos: Bos = NO_BOS) -> Divergence:
    found = measure_beside(model, dense, compared, WINDOWS, batch_size, CPU, QUIET, bos)[1]
    assert found is not None
    return found


@pytest.mark.parametrize("bos", [NO_BOS, Bos(0)], ids=["plain", "bos"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_divergence_is_that_of_whole_logits(tmp_path: Path, family: str, bos: Bos) -> None:
    loaded = HubModel(name=str(make_folder(tmp_path / "m", family))).load(CPU, seed=0)
    compressed = pruned(loaded)
    save_model(compressed, tmp_path / "saved")
    stock = [AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32) for name in ("m", "saved")]
    expected = naive(*(model.eval() for model in stock), WINDOWS, bos.id)
    found = beside(compressed.model, loaded.model, 7, bos=bos)
    assert astuple(found) == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert found.kl > 0.01
    assert found.same_top < 1
    if bos.id is not None:
        assert beside(compressed.model, loaded.model, 7).kl != pytest.approx(found.kl, rel=1e-3)


def test_batches_do_not_matter_and_the_first_windows_count(loaded: Loaded) -> None:
    """Also where a batch holds windows that count beside others that do not; the losses are always of all."""
    compressed = pruned(loaded).model
    losses = measure_losses(compressed, WINDOWS, 7, CPU, QUIET)
    for compared in (1, 3, 4, 7):
        expected = naive(loaded.model, compressed, WINDOWS[:compared])
        for batch_size in (1, 2, 3, 5, 7, 64):
            both, found = measure_beside(compressed, loaded.model, compared, WINDOWS, batch_size, CPU, QUIET)
            assert found is not None
            assert astuple(found) == pytest.approx(expected, rel=1e-4, abs=1e-6)
            torch.testing.assert_close(both, losses, rtol=1e-5, atol=1e-5)
            assert torch.equal(both, measure_losses(compressed, WINDOWS, batch_size, CPU, QUIET))
    assert measure_beside(compressed, loaded.model, 0, WINDOWS, 3, CPU, QUIET)[1] is None


@pytest.mark.parametrize("compared", [1, 2, 5, 7])
def test_a_copy_does_not_diverge_at_all(loaded: Loaded, compared: int) -> None:
    for batch_size in (1, 2, 4):
        assert beside(copy.deepcopy(loaded.model), loaded.model, compared, batch_size) == Divergence(0, 0, 0, 1)


@pytest.mark.parametrize("limit", [1, 300, 1000, 7 * 300])
def test_a_few_positions_at_a_time(loaded: Loaded, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """Neither model's head gives more logits at once than that, and the compressed one's gives each once."""
    compressed, made = pruned(loaded).model, list[tuple[str, int]]()
    expected = beside(compressed, loaded.model, 5)
    for name, model in (("dense", loaded.model), ("compressed", compressed)):
        model.lm_head.register_forward_hook(lambda module, args, out, name=name: made.append((name, out.numel())))
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", limit)
    monkeypatch.setattr(loss, "LEAST", 1)
    assert astuple(beside(compressed, loaded.model, 5)) == pytest.approx(astuple(expected), rel=1e-4, abs=1e-6)
    assert max(count for _, count in made) <= max(limit, 300)
    assert sum(count for name, count in made if name == "compressed") == 7 * 23 * 300
    assert sum(count for name, count in made if name == "dense") == 6 * 23 * 300  # whole batches of 3


def test_blocks_gone_and_fewer_bits_are_compared_too(loaded: Loaded) -> None:
    for method in (Depth(amount=0.5), Structured(amount=0.5, units=("mlp", "heads"))):
        compressed = pruned(loaded, method).model
        expected = naive(loaded.model, compressed, WINDOWS)
        assert astuple(beside(compressed, loaded.model, 7)) == pytest.approx(expected, rel=1e-4, abs=1e-6)
    for post in (Int8WeightOnly(), Int8Dynamic(), Int4WeightOnly(group_size=16)):
        compressed = copied(loaded).model
        post.compress(Anatomy(compressed))
        expected = naive(loaded.model, compressed, WINDOWS)
        assert astuple(beside(compressed, loaded.model, 7)) == pytest.approx(expected, rel=1e-3, abs=1e-5)


# The evaluator.


def evaluator_of(folder: Path, corpus: Path, **changes: Any) -> Evaluator:
    text = TextFiles(path=str(corpus), seq_len=24, add_bos=changes.pop("add_bos", "auto"))
    keys = {"max_windows": 6, "batch_size": 4, "generation_prompts": 0} | changes
    measure = Measure(latency=False, memory=False, prompt_tokens=9, **keys)
    return Evaluator(HubModel(name=str(folder)), text, measure, CPU, 0, QUIET)


def evaluated(evaluator: Evaluator, loaded: Loaded, place: Path) -> Measurements:
    return evaluator.evaluate(loaded, place, NoExport(), QUIET)


@pytest.mark.parametrize("add_bos", ["true", "false"])
def test_positions_are_the_targets_of_the_perplexity(corpus: Path, tmp_path: Path, add_bos: str) -> None:
    """With the text's first token no target, whatever stands before it; the interval is over all windows."""
    evaluator = evaluator_of(with_bos(make_folder(tmp_path / "m")), corpus, kl_windows=5, add_bos=add_bos)
    compressed, bos = pruned(evaluator.dense), 0 if add_bos == "true" else None
    found, dense = evaluated(evaluator, compressed, tmp_path), evaluator.baseline(None, QUIET)
    expected = naive(evaluator.dense.model, compressed.model, evaluator.windows[:5].long(), bos)
    assert found.divergence is not None
    assert astuple(found.divergence) == pytest.approx(expected, rel=1e-4, abs=1e-6)
    differences = []
    for window in evaluator.windows.long():
        p, q = (whole(model, window, bos) for model in (evaluator.dense.model, compressed.model))
        differences += [p[at, token] - q[at, token] for at, token in enumerate(window[1:].tolist())]
    mean, error = np.mean(differences), np.std(differences, ddof=1) / math.sqrt(len(differences))
    assert len(differences) == 6 * 23
    assert found.ratio_interval == pytest.approx(np.exp([mean - 1.96 * error, mean + 1.96 * error]), rel=1e-4)
    ratio = found.quality.perplexity / dense.quality.perplexity
    assert ratio == pytest.approx(math.sqrt(math.prod(found.ratio_interval or ())), rel=1e-6)
    assert (dense.divergence, dense.ratio_interval) == (None, None)


def test_the_dense_model_beside_itself(folder: Path, corpus: Path, tmp_path: Path) -> None:
    evaluator = evaluator_of(folder, corpus)
    for loaded in (evaluator.dense, evaluator.copy_of_dense(tmp_path)):
        found = evaluated(evaluator, loaded, tmp_path)
        assert (found.divergence, found.ratio_interval) == (Divergence(0, 0, 0, 1), (1, 1))


@pytest.mark.parametrize(("asked", "compared"), [(None, 6), (0, 0), (1, 1), (6, 6), (7, 6), (10**9, 6)])
def test_how_many_windows(folder: Path, corpus: Path, tmp_path: Path, asked: int | None, compared: int) -> None:
    """None is all; 0 is off, and leaves the interval, for which the dense model is not run again."""
    evaluator = evaluator_of(folder, corpus, kl_windows=asked)
    assert evaluator.compared == compared
    stamp = f"KL(dense || compressed) in nats at every target of the first {compared} windows"
    assert evaluator.protocol["divergence"] == (stamp if compared else None)
    compressed = pruned(evaluator.dense)
    evaluator.baseline(None, QUIET)
    runs: list[int] = []
    evaluator.dense.model.lm_head.register_forward_hook(lambda *_: runs.append(1))
    found = evaluated(evaluator, compressed, tmp_path)
    assert (found.divergence is None) == (compared == 0) == (not runs)
    assert found.ratio_interval is not None


def test_losses_that_left_the_cache_are_computed_again(folder: Path, corpus: Path, tmp_path: Path) -> None:
    first = evaluator_of(folder, corpus)
    first.baseline(tmp_path, QUIET)
    (tmp_path / "cache" / "token_losses").rename(tmp_path / "gone")
    again = evaluator_of(folder, corpus)  # as another process that finds the figures in the sweep's folder
    compressed = pruned(first.dense)
    again.baseline(tmp_path, QUIET)
    a, b = (evaluated(one, compressed, tmp_path).ratio_interval for one in (first, again))
    assert a == b != (1, 1)


def test_without_a_cache_the_dense_model_passes_once(
    folder: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over its own windows, two batches; whatever is measured after that."""
    monkeypatch.setenv("PRUNE_LAB_CACHE_GB", "0")
    evaluator, runs = evaluator_of(folder, corpus, kl_windows=0), list[int]()
    compressed = pruned(evaluator.dense)
    evaluator.dense.model.lm_head.register_forward_hook(lambda *_: runs.append(1))
    evaluator.baseline(None, QUIET)
    for _ in range(2):
        evaluated(evaluator, compressed, tmp_path)
    assert len(runs) == 2


# The command line.


def test_runs_with_other_windows_beside_are_other_runs(small: list[str], cli: Cli, tmp_path: Path) -> None:
    """The same asked again is served; the metrics of a run say nothing that was not measured."""
    words = [*small, "measure=quality_only", "method=magnitude", "amount=0.5", "tracking=none"]
    found: list[dict[str, Any]] = []
    for number, kl_windows in enumerate(("32", "2", "0", "null", "2")):
        done = cli(*words, f"measure.kl_windows={kl_windows}", f"hydra.run.dir=run{number}")
        assert (done.returncode, done.stderr) == (0, "")
        (line,) = [line for line in done.stdout.splitlines() if line.startswith("quality ")]
        assert (" KL " in line, "same top token " in line) == (kl_windows != "0",) * 2
        assert "times the dense perplexity" in line
        found.append(json.loads((tmp_path / f"run{number}" / "summary.json").read_text()))
    assert [run["reused_from"] is not None for run in found] == [False] * 4 + [True]
    assert len({run["fingerprint"] for run in found}) == 4
    eight, two, off, every, _ = (run["metrics"] for run in found)
    assert eight["quality/kl"] == every["quality/kl"] != two["quality/kl"]
    lost = {"quality/kl", "quality/kl_p50", "quality/kl_p99", "quality/same_top"}
    assert eight.keys() - off.keys() == lost
    for name in off.keys() - {name for name in off if name.startswith("time/")}:
        assert off[name] == two[name] == eight[name], name  # perplexity and its interval too
    assert 0 < eight["quality/kl_p50"] < eight["quality/kl"] < eight["quality/kl_p99"]
    low, ratio, high = (eight[f"quality/perplexity_ratio{end}"] for end in ("_low", "", "_high"))
    assert low < ratio < high
    assert [run["protocol"]["divergence"] for run in found[:3]] == [
        f"KL(dense || compressed) in nats at every target of the first {count} windows" if count else None
        for count in (8, 2, 0)
    ]


def test_a_run_that_changes_nothing(small: list[str], cli: Cli, tmp_path: Path) -> None:
    done = cli(*small, "measure=quality_only", "method=none", "tracking=none", "hydra.run.dir=run")
    assert (done.returncode, done.stderr) == (0, "")
    metrics = json.loads((tmp_path / "run" / "summary.json").read_text())["metrics"]
    names = ("kl", "kl_p50", "kl_p99", "same_top", "perplexity_ratio", "perplexity_ratio_low", "perplexity_ratio_high")
    assert [metrics[f"quality/{name}"] for name in names] == [0, 0, 0, 1, 1, 1, 1]


# As bounds of a search.


@pytest.mark.parametrize(
    "name",
    ["quality/kl", "quality/kl_p99", "quality/perplexity_ratio_high", "tasks/piqa_flips", "llama_cpp/perplexity_ratio"],
)
def test_a_bound_on_divergence_looks_for_the_largest_amount(name: str) -> None:
    budget = Budget((Bound(name, 0.25),))
    assert budget.on_quality
    assert budget.best == "params/reduction"
    candidate = search(budget, {round(0.1 * k, 10): {name: (0.1 * k) ** 2} for k in range(1, 9)}, 0.1)
    assert candidate.best is not None
    assert candidate.best[0] == 0.5
    with pytest.raises(ValueError, match="limits quality and cost at once"):
        Budget((Bound(name, 0.25), Bound("size/disk_mb", 1.0)))
    with pytest.raises(ValueError, match="better when higher"):
        read_bounds(["quality/same_top<=0.9"])


RECIPE = """
defaults:
  - config
  - override hydra/sweeper: bisect
  - override tracking: none
  - override measure: quality_only
  - _self_
bound: ["quality/kl<=0.05"]
hydra:
  mode: MULTIRUN
  sweep:
    dir: sweep
  sweeper:
    candidates:
      - {method: magnitude}
    low: 0.1
    high: 0.9
    step: 0.1
"""


def test_a_search_within_a_divergence(small: list[str], cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.yaml").write_text(RECIPE)
    options = [override for override in small if not override.startswith("measure=")]
    done = cli("-cd", "recipes", "-cn", "mine", *options)
    assert done.returncode == 0, done.stderr
    jobs = json.loads((tmp_path / "sweep" / "results.json").read_text())
    tried = {job["config"]["amount"]: job["metrics"]["quality/kl"] for job in jobs}
    within = max(amount for amount, kl in tried.items() if kl <= 0.05)
    assert min(amount for amount, kl in tried.items() if kl > 0.05) == pytest.approx(within + 0.1)
    assert f"method=magnitude amount={within:g}" in (tmp_path / "sweep" / "results.md").read_text().splitlines()[0]


# The key-value cache.


@torch.no_grad()
def held_per_token(model: Any, tokens: int = 5) -> float:
    """Bytes of the tensors that a real cache holds after a forward pass, for each token."""
    output = model(input_ids=torch.arange(1, tokens + 1)[None], use_cache=True)
    cache = output.cache if hasattr(output, "cache") else output.past_key_values  # renamed in transformers 5.24
    assert isinstance(cache, DynamicCache)
    return sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values)) / tokens  # type: ignore[union-attr]


@pytest.mark.parametrize("family", ALL_FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_cache_holds_what_is_counted(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    loaded = HubModel(name=str(make_folder(tmp_path / "m", family))).load(Device(torch.device("cpu"), dtype), seed=0)
    bytes_of_all = kv_cache_bytes(Anatomy(loaded.model))
    assert bytes_of_all == held_per_token(loaded.model)
    possible = Anatomy(loaded.model).family.units["heads"].possible(loaded.model.config, 2)
    if dtype == torch.float32 and possible[:1] == [1] and family not in ("gpt2", "opt", "gpt_neox"):
        fewer = pruned(loaded, Structured(amount=0.5, units=("heads",))).model
        assert kv_cache_bytes(Anatomy(fewer)) == held_per_token(fewer) == bytes_of_all / 2
    for post in (Int8WeightOnly(), Int8Dynamic(), Int4WeightOnly(group_size=16)):
        packed = copied(loaded).model
        post.compress(Anatomy(packed))
        assert kv_cache_bytes(Anatomy(packed)) == bytes_of_all == held_per_token(packed)


def test_blocks_that_are_gone_hold_nothing(loaded: Loaded) -> None:
    shorter = pruned(loaded, Depth(amount=0.5)).model
    assert kv_cache_bytes(Anatomy(shorter)) == held_per_token(shorter) == kv_cache_bytes(Anatomy(loaded.model)) / 2


def test_a_sliding_window_counts_while_a_token_is_within_it(tmp_path: Path) -> None:
    turns = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
    model = HubModel(name=str(make_folder(tmp_path / "m", "gemma3_text", **turns))).load(CPU, seed=0).model
    assert held_per_token(model, 5) == kv_cache_bytes(Anatomy(model)) > held_per_token(model, 20)


def test_on_disk_and_in_memory_hold_the_same(folder: Path, tmp_path: Path) -> None:
    sizes = []
    for stream in (False, True):
        loaded = HubModel(name=str(folder), stream=stream).load(CPU, seed=0)
        sizes.append(measure_size(loaded.model, HuggingFace().files(folder)))
    by_hand = 2 * 2 * 2 * 8 * 4  # blocks; keys and values; groups of 8; float32
    assert sizes[0].kv_cache_bytes == sizes[1].kv_cache_bytes == by_hand
    assert replace(sizes[0], weights_mb=0) == replace(sizes[1], weights_mb=0)
