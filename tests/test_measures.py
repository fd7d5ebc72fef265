"""The figures against naive loops, hand-computed values and the file system."""

from __future__ import annotations

import itertools
import math
import signal
import statistics
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import CPU, FAMILIES, make_folder, story
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from prune_lab import __main__ as program
from prune_lab.commands import cache as cache_command
from prune_lab.commands import sync
from prune_lab.config import parts as config
from prune_lab.export.hf import HuggingFace
from prune_lab.measure.batch_size import Trial, suggest
from prune_lab.measure.memory import measure_memory
from prune_lab.measure.perplexity import Quality, measure_losses, quality_of
from prune_lab.measure.settings import Measure
from prune_lab.measure.size import measure_size
from prune_lab.measure.speed import Paired, measure_latency
from prune_lab.models import loss
from prune_lab.models.export import save_model
from prune_lab.models.load import HubModel, Loaded
from prune_lab.models.loss import window_losses
from prune_lab.results.summary import Summary, from_dict
from prune_lab.system.console import Console
from prune_lab.text.corpus import Documents
from prune_lab.text.tokens import Tokens

QUIET = Console(quiet=True)
BYTES_PER_TOKEN = 3.2


def windows_of(count: int, seq_len: int = 24) -> Tensor:
    return torch.randint(300, (count, seq_len), generator=torch.Generator().manual_seed(11))


def quality(model: Any, windows: Tensor, batch_size: int = 4) -> Quality:
    return quality_of(measure_losses(model, windows, batch_size, CPU, QUIET), BYTES_PER_TOKEN)


@torch.no_grad()
def naive_perplexity(model: Any, windows: Tensor) -> float:
    """One window at a time, all its logits at once, torch's own loss in float64."""
    losses = []
    for window in windows:
        logits = model(input_ids=window[None]).logits[0].double()
        losses.append(float(cross_entropy(logits[:-1], window[1:])))
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize("family", FAMILIES)
def test_perplexity_is_that_of_a_naive_loop(tmp_path: Path, family: str) -> None:
    folder = make_folder(tmp_path / family, family)
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours, windows = HubModel(name=str(folder)).load(CPU, seed=0).model, windows_of(5)
    expected = naive_perplexity(stock, windows)
    assert quality(ours, windows).perplexity == pytest.approx(expected, rel=1e-5)
    assert quality(ours, windows[:1]).perplexity != pytest.approx(expected, rel=1e-3)  # it reads the windows


def test_perplexity_does_not_depend_on_the_batch_size(loaded: Loaded) -> None:
    """7 windows leave a last batch of another size for each of 2, 3, 4 and 5: a mean of means would move."""
    windows = windows_of(7)
    alone = quality(loaded.model, windows, batch_size=1).perplexity
    for batch_size in (2, 3, 4, 5, 7, 64):
        assert quality(loaded.model, windows, batch_size).perplexity == pytest.approx(alone, rel=1e-6)


def test_the_suggested_batch_size_is_the_smallest_that_is_nearly_fastest() -> None:
    speeds = {1: 50.0, 2: 90.0, 4: 97.0, 8: 100.0, 16: 99.0}
    assert suggest([Trial(batch_size, speed) for batch_size, speed in speeds.items()]) == 4


def test_batch_sizes_are_tried_on_the_model_and_one_is_named(
    small: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Up to the 8 windows that there are; a refusal is one line."""
    assert program._run(["suggest", *small, "device=cpu"]) == 0
    *tried, named = capsys.readouterr().out.splitlines()
    sizes = [int(line.split(":")[0].removeprefix("batch of")) for line in tried]
    assert sizes == [1, 2, 4, 8][: len(sizes)]
    assert len(sizes) >= 3
    assert int(named.split()[0].removeprefix("measure.batch_size=")) in sizes
    for key, value, reason in (
        ("measure.batch_size", "0", " must be at least 1"),
        ("model.stream", "true", ": a model that is read while it runs cannot be timed; give model.stream=false"),
    ):
        assert program._run(["suggest", *small, f"{key}={value}"]) == 2
        assert capsys.readouterr().err == f"prune_lab: {key}={value}{reason}\n"
    assert program._run(["suggest", "--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: prune-lab suggest [group=option ...]")


def test_a_subcommand_that_is_interrupted_says_so_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C while it looks for the first key that it was given."""

    def interrupted(*_: Any, **__: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    # Tests that run in the background of a shell ignore Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for command, module in (("suggest", config), ("sync", sync), ("cache", cache_command)):
            name = {"suggest": "register_schema", "sync": "_sync", "cache": "_show"}[command]
            monkeypatch.setattr(module, name, interrupted)
            assert program._run([command]) == 130
            assert capsys.readouterr().err == "prune_lab: interrupted\n"
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("limit", [1, 300, 1000, 7 * 300])
def test_logits_are_made_a_few_positions_at_a_time(loaded: Loaded, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """The vocabulary has 300 entries: the head gives at most `limit` logits at once, but at least one position's."""
    windows = windows_of(6)
    whole = quality(loaded.model, windows).perplexity
    made: list[int] = []
    hook = loaded.model.lm_head.register_forward_hook(lambda module, inputs, output: made.append(output.numel()))
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", limit)
    monkeypatch.setattr(loss, "LEAST", 1)
    in_parts = quality(loaded.model, windows).perplexity
    hook.remove()
    assert max(made) <= max(limit, 300)
    assert sum(made) == 6 * 23 * 300
    assert in_parts == pytest.approx(whole, rel=1e-6)
    assert in_parts == pytest.approx(naive_perplexity(loaded.model, windows), rel=1e-5)


def test_the_last_hidden_state_of_a_window_is_not_scored(loaded: Loaded) -> None:
    """seq_len - 1 targets: the first token is never one, the last is one and never only context."""
    batch = windows_of(1)
    found = window_losses(loaded.model, batch)
    assert found.shape == (1,)
    assert found.dtype == torch.float32
    changed = batch.clone()
    changed[0, -1] = (changed[0, -1] + 1) % 300
    with torch.no_grad():
        last = loaded.model(input_ids=batch).logits[0, -2].double().log_softmax(-1)
    moved = float(last[batch[0, -1]] - last[changed[0, -1]]) / 23
    assert float(window_losses(loaded.model, changed) - found) == pytest.approx(moved, abs=1e-5)


def test_windows_do_not_overlap_and_the_tail_is_dropped(loaded: Loaded) -> None:
    texts = tuple(story(seed, sentences=5) for seed in (1, 2, 3))
    documents = Documents("text", train=("",), calibration=("",), validation=("",), test=texts)
    stream = loaded.tokenizer("\n\n".join(texts), verbose=False)["input_ids"]
    tokens = Tokens(documents, loaded.tokenizer)
    seq_len = next(n for n in range(16, 40) if len(stream) % n)
    windows = tokens.windows("test", seq_len)
    assert windows.tolist() == [stream[i : i + seq_len] for i in range(0, len(stream) - seq_len + 1, seq_len)]
    assert windows.numel() < len(stream)


def test_bits_per_byte_by_hand(loaded: Loaded) -> None:
    """A head of zeros gives every token 1/300: perplexity 300, log2(300) bits a token, for 3.2 bytes."""
    with torch.no_grad():
        loaded.model.lm_head.weight.zero_()
    found = quality(loaded.model, windows_of(3))
    assert found.perplexity == pytest.approx(300, rel=1e-6)
    assert found.bits_per_byte == pytest.approx(math.log2(300) / 3.2, rel=1e-6)


def test_a_diverged_model_has_infinite_perplexity_and_no_metric(loaded: Loaded) -> None:
    """A mean loss above 709 overflows exp; it must end as a warning, not as an error and not as a number."""
    with torch.no_grad():
        loaded.model.lm_head.weight.mul_(1e5)
    found = quality(loaded.model, windows_of(3))
    assert found.perplexity == math.inf
    assert 1000 < found.bits_per_byte < math.inf
    summary = Summary("FINISHED")
    summary.set_metrics({"quality/perplexity": found.perplexity, "params/total": 3})
    assert (summary.metrics, summary.diverged) == ({"params/total": 3.0}, ["quality/perplexity"])
    written_before = {key: value for key, value in asdict(summary).items() if key != "diverged"}
    assert from_dict(written_before) == summary
    assert len(summary.warnings) == 1
    assert "quality/perplexity diverged" in summary.warnings[0]


def test_weights_of_nan_end_as_a_warning_too(loaded: Loaded) -> None:
    with torch.no_grad():
        loaded.model.model.norm.weight.fill_(math.nan)
    found = quality(loaded.model, windows_of(3))
    assert not math.isfinite(found.perplexity)
    summary = Summary("FINISHED")
    summary.set_metrics({"quality/perplexity": found.perplexity, "quality/bits_per_byte": found.bits_per_byte})
    assert not summary.metrics
    assert len(summary.warnings) == 2


BLOCK = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32 + 2 * 32  # q and o, k and v, the MLP, two norms


@pytest.mark.parametrize("tied", [True, False])
def test_sizes_by_hand(tmp_path: Path, tied: bool) -> None:
    """A matrix shared by embedding and head counts once; buffers lie in memory, and are no parameters."""
    loaded = HubModel(name=str(make_folder(tmp_path / "model", tie_word_embeddings=tied))).load(CPU, seed=0)
    model = loaded.model
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.fill_(1)
            parameter.view(-1)[: number + 1] = 0
    tensors = len(list(model.parameters()))
    save_model(loaded, tmp_path / "saved")
    size = measure_size(model, HuggingFace().files(tmp_path / "saved"))
    total = (300 * 32 if tied else 2 * 300 * 32) + 2 * BLOCK + 32
    assert size.params == total
    assert size.nonzero == total - sum(range(1, tensors + 1))
    frequencies = sum(buffer.numel() * 4 for buffer in model.buffers())
    assert 0 < frequencies < 100
    assert size.weights_mb * 1e6 == pytest.approx(4 * total + frequencies)
    files = [path for path in (tmp_path / "saved").iterdir() if path.suffix == ".safetensors"]
    assert len(files) == 1
    assert size.disk_mb * 1e6 == pytest.approx(len(files[0].read_bytes()))
    assert 4 * total < len(files[0].read_bytes()) < 4 * total + 10_000


def test_sizes_halve_in_16_bits(loaded: Loaded, tmp_path: Path) -> None:
    save_model(loaded, tmp_path / "32")
    wide = measure_size(loaded.model, HuggingFace().files(tmp_path / "32"))
    loaded.model.to(torch.bfloat16)
    save_model(loaded, tmp_path / "16")
    narrow = measure_size(loaded.model, HuggingFace().files(tmp_path / "16"))
    assert narrow.params == wide.params
    assert narrow.weights_mb == pytest.approx(wide.weights_mb / 2, rel=1e-3)
    assert narrow.disk_mb == pytest.approx(wide.disk_mb / 2, rel=0.05)


def milliseconds(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_a_constant_ratio_is_the_speedup() -> None:
    """Whatever else slows both down: 2 in every pair is 2 with no doubt."""
    compressed = milliseconds(1, 5, 3, 80, 2, 4, 6, 7, 9, 1)
    assert Paired(2 * compressed, compressed).speedup == 2
    assert Paired(2 * compressed, compressed).interval() == (2, 2)
    assert Paired(compressed, 2 * compressed).speedup == 0.5


def test_the_speedup_is_the_median_of_ratios_not_the_ratio_of_medians() -> None:
    paired = Paired(milliseconds(1, 10, 100), milliseconds(1, 2, 100))  # ratios 1, 5, 1; medians 10 and 2
    assert paired.speedup == 1


@pytest.mark.parametrize("pairs", [10, 11, 20])
def test_the_median_of_an_even_number_of_pairs_lies_between_the_middle_two(pairs: int) -> None:
    """20 pairs are the default; the lower of the two would call a model against itself slower."""
    ratios = milliseconds(*(1 + 0.1 * i for i in range(pairs)))
    assert Paired(ratios, torch.ones_like(ratios)).speedup == pytest.approx(statistics.median(ratios.tolist()))


@pytest.mark.parametrize("seed", range(5))
def test_the_interval_contains_the_median_and_narrows_with_pairs(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    widths = []
    for pairs in (11, 401):
        ratios = 1.5 + 0.2 * torch.randn(pairs, generator=generator, dtype=torch.float64)
        paired = Paired(ratios * 10, torch.full((pairs,), 10.0, dtype=torch.float64))
        low, high = paired.interval()
        assert low < paired.speedup < high
        assert float(ratios.min()) <= low
        assert high <= float(ratios.max())
        assert paired.interval() == (low, high)  # the resampling is seeded
        widths.append(high - low)
    assert widths[1] < widths[0] / 2
    # The interval of a median of n normal values is about 2 * 1.96 * 1.2533 * sigma / sqrt(n) wide.
    assert widths[1] == pytest.approx(2 * 1.96 * 1.2533 * 0.2 / math.sqrt(401), rel=0.5)


class Recorder(nn.Module):
    """Answers like a causal language model, and writes down who was asked for what."""

    def __init__(self, name: str, calls: list[tuple[str, int, bool]]) -> None:
        super().__init__()
        self.name, self.calls = name, calls

    def forward(self, input_ids: Tensor, use_cache: bool, past_key_values: Any = None, **_: Any) -> Any:
        self.calls.append((self.name, input_ids.shape[1], past_key_values is not None))
        assert use_cache
        return SimpleNamespace(logits=torch.zeros(1, 1, 5), past_key_values="cache")


def test_pairs_alternate_their_order_and_warm_up_is_not_counted() -> None:
    calls: list[tuple[str, int, bool]] = []
    dense, compressed = Recorder("dense", calls), Recorder("compressed", calls)
    settings = Measure(pairs=10, warmup=3, decode_tokens=2)
    latency = measure_latency(dense, compressed, torch.zeros(1, 7, dtype=torch.int64), settings, CPU, QUIET)
    for paired in (latency.prefill, latency.decode):
        assert paired.dense.shape == paired.compressed.shape == (10,)
        assert (paired.dense > 0).all()
    visits = [name for name, tokens, _ in calls if tokens == 7]
    pairs = [tuple(visits[i : i + 2]) for i in range(0, len(visits), 2)]
    assert len(pairs) == 13
    assert all(set(pair) == {"dense", "compressed"} for pair in pairs)
    assert all(pair != following for pair, following in itertools.pairwise(pairs))
    # Each visit: one prefill of the whole prompt without a cache, then two single tokens with it.
    assert [(tokens, cached) for _, tokens, cached in calls] == [(7, False), (1, True), (1, True)] * 26


def test_times_go_to_the_model_that_took_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that moves only when a model works: 4 and 1 ms a call, slower while warming up."""
    calls: list[tuple[str, int, bool]] = []
    now = 0.0

    class Slow(Recorder):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            nonlocal now
            warm = len(calls) >= 2 * 3 * 3  # two models, three pairs, three calls
            now += {"dense": 0.004, "compressed": 0.001}[self.name] * (1 if warm else 100)
            return super().forward(*args, **kwargs)

    monkeypatch.setattr("time.perf_counter", lambda: now)
    settings = Measure(pairs=10, warmup=3, decode_tokens=2)
    prompt = torch.zeros(1, 7, dtype=torch.int64)
    latency = measure_latency(Slow("dense", calls), Slow("compressed", calls), prompt, settings, CPU, QUIET)
    for paired in (latency.prefill, latency.decode):  # decode is per token, prefill per prompt
        assert paired.dense.tolist() == pytest.approx([4] * 10)
        assert paired.compressed.tolist() == pytest.approx([1] * 10)
        assert paired.speedup == pytest.approx(4)


def test_latency_of_a_real_model(loaded: Loaded) -> None:
    """A model against itself: both are timed, and the interval is one."""
    prompt = windows_of(1, 16)
    latency = measure_latency(loaded.model, loaded.model, prompt, Measure(pairs=10, decode_tokens=2), CPU, QUIET)
    for paired in (latency.prefill, latency.decode):
        assert (paired.dense > 0).all()
        low, high = paired.interval()
        assert low <= paired.speedup <= high


@pytest.mark.parametrize("name", ["batch_size", "max_windows", "warmup", "prompt_tokens", "decode_tokens", "pairs"])
def test_measure_settings_have_a_least_value(name: str) -> None:
    least = 10 if name == "pairs" else 1
    assert getattr(Measure(**{name: least}), name) == least
    with pytest.raises(ValueError, match=f"{name}={least - 1} must be at least {least}"):
        Measure(**{name: least - 1})


def test_memory_counts_the_weights_and_grows_with_them(tmp_path: Path) -> None:
    """In a fresh process: 40 MB more of weights are about 40 MB more at the peak."""
    settings, found = Measure(decode_tokens=2), []
    for vocab in (20_000, 180_000):
        made = make_folder(tmp_path / str(vocab), vocab_size=vocab, hidden_size=64)
        loaded = HubModel(name=str(made)).load(CPU, seed=0)
        weights_mb = sum(p.numel() * 4 for p in loaded.model.parameters()) / 1e6
        found.append((weights_mb, measure_memory(loaded.model, made, HuggingFace(), windows_of(1, 32), settings, CPU)))
    (small, small_peak), (large, large_peak) = found
    assert large - small == pytest.approx(40.96)
    assert small_peak >= small
    assert large_peak >= large
    assert large_peak - small_peak == pytest.approx(large - small, rel=0.3)


@pytest.mark.parametrize("family", ["gemma2", "gpt2"])
def test_memory_of_configs_that_list_their_layers_or_name_them_otherwise(tmp_path: Path, family: str) -> None:
    """The process warms up on a model of one layer, made from the same config."""
    made = make_folder(tmp_path / family, family)
    model = HubModel(name=str(made)).load(CPU, seed=0).model
    assert 0 < measure_memory(model, made, HuggingFace(), windows_of(1, 16), Measure(decode_tokens=2), CPU) < 100


def test_a_memory_process_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="the process that measures memory failed"):
        measure_memory(None, tmp_path / "nothing", HuggingFace(), windows_of(1, 8), Measure(), CPU)
