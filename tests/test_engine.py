"""measure.engine=llama_cpp: GGUF files in llama.cpp itself, beside stock transformers and our own figures.

Where the package llama-cpp-python is not installed (docs/exports.md has the steps) most of it is skipped.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CPU, ROOT, Cli
from gguf import GGUFReader
from test_gguf_export import (
    FACTORS,
    LLAMA3,
    TEXTS,
    TOKENS,
    TURNS,
    YARN,
    loaded_of,
    logits,
    sentencepiece_of,
    written,
)

from prune_lab.export.gguf import FILE, Gguf
from prune_lab.measure import llama_cpp
from prune_lab.measure.divergence import perplexity_of
from prune_lab.measure.perplexity import measure_losses
from prune_lab.measure.settings import Measure
from prune_lab.methods.depth import Depth
from prune_lab.methods.experts import Experts
from prune_lab.methods.structured import Structured
from prune_lab.models.anatomy import Anatomy
from prune_lab.models.gguf.families import ARCHITECTURES
from prune_lab.models.load import Loaded
from prune_lab.pruning.calibration import Calibrator
from prune_lab.results.metrics import METRICS, check_known
from prune_lab.system.console import Console
from prune_lab.text.bos import Bos

needs_llama_cpp = pytest.mark.skipif(
    find_spec("llama_cpp") is None, reason="llama.cpp is not here: pip install llama-cpp-python (docs/exports.md)"
)
QUIET = Console(quiet=True)
WINDOWS = torch.randint(1, 300, (3, 40), generator=torch.Generator().manual_seed(7))
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in sorted(ARCHITECTURES)},
    "untied": ("qwen3", {"tie_word_embeddings": False}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3": ("llama", {"rope_parameters": LLAMA3}),
    "linear": ("mistral", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e3}}),
    "yarn": ("qwen3", {"rope_parameters": YARN}),
    "longrope": ("phi3", {"rope_parameters": FACTORS, "original_max_position_embeddings": 16}),
    "windows": ("gemma2", TURNS),
    "scaled and in windows": ("gemma3_text", {"sliding_window": 6, "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e3},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0}}}),
}  # fmt: skip


def there(file: Path, ids: list[int]) -> torch.Tensor:
    with llama_cpp.loaded([file], len(ids), exact=True) as llama:
        return torch.tensor(llama.ask(0, "logits", ids=ids))


def assert_same_logits(loaded: Loaded, place: Path) -> None:
    """In float32; llama.cpp looks GELU up in a table of float16, which Gemmas have."""
    written(loaded, place)
    expected = logits(loaded.model)[0]
    off = float((there(place / FILE, TOKENS[0].tolist()) - expected).abs().max() / expected.abs().max())
    assert off <= (1e-2 if "gemma" in loaded.family else 1e-5), off


@needs_llama_cpp
@pytest.mark.parametrize("case", CASES)
def test_logits_in_llama_cpp_are_the_models(case: str, tmp_path: Path) -> None:
    family, changes = CASES[case]
    assert_same_logits(loaded_of(tmp_path, family, **changes), tmp_path / "export")


@needs_llama_cpp
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_logits_without_channels_and_heads(family: str, tmp_path: Path) -> None:
    loaded = loaded_of(tmp_path, family)
    Structured(amount=0.5, units=("mlp", "heads")).prune(Anatomy(loaded.model), 0.5, 0)
    assert_same_logits(loaded, tmp_path / "export")


@needs_llama_cpp
@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_logits_without_a_block(family: str, tmp_path: Path) -> None:
    """The blocks that see a window are others then."""
    changes = {"num_hidden_layers": 4, "layer_types": TURNS["layer_types"] * 2, "sliding_window": 6}
    loaded = loaded_of(tmp_path, family, **changes)
    Depth(amount=0.25).prune(Anatomy(loaded.model), 0.25, 0, Calibrator(WINDOWS, "dense", 3, False, 0))
    assert_same_logits(loaded, tmp_path / "export")


@needs_llama_cpp
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe"])
def test_logits_without_experts(family: str, tmp_path: Path) -> None:
    loaded = loaded_of(tmp_path, family)
    Experts(amount=0.25).prune(Anatomy(loaded.model), 0.25, 0, Calibrator(WINDOWS, "dense", 3, False, 0))
    assert_same_logits(loaded, tmp_path / "export")


TOKENIZE = """
import json, sys
from llama_cpp import Llama
file, texts = sys.argv[1:]
llama = Llama(model_path=file, vocab_only=True, verbose=False)
print(json.dumps([llama.tokenize(text.encode(), add_bos=False, special=True) for text in json.loads(texts)]))
"""


@needs_llama_cpp
@pytest.mark.parametrize("family", ["llama", "qwen2", "sentencepiece llama", "sentencepiece gemma3_text"])
def test_tokens_in_llama_cpp_are_the_tokenizers(family: str, tmp_path: Path) -> None:
    """Of texts in several languages."""
    of_pieces, _, name = family.rpartition(" ")
    loaded = (sentencepiece_of if of_pieces else loaded_of)(tmp_path, name)
    written(loaded, tmp_path / "export")
    # Of a text that begins with a space SentencePiece makes two, and the tokenizer of transformers one.
    texts = [text for text in TEXTS if text[0] != " " or family != "sentencepiece llama"]
    command = [sys.executable, "-c", TOKENIZE, str(tmp_path / "export" / FILE), json.dumps(texts)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [loaded.tokenizer(text, add_special_tokens=False).input_ids for text in texts]


# --- Figures ---


def perplexity(loaded: Loaded, bos: Bos) -> float:
    losses = measure_losses(loaded.model, WINDOWS, 2, CPU, QUIET, bos)
    return perplexity_of(float(losses.double().mean()))


@needs_llama_cpp
@pytest.mark.parametrize("bos", [Bos(), Bos(5)], ids=["", "bos"])
@pytest.mark.parametrize(("family", "kind", "within"), [("llama", "f32", 1e-6), ("qwen3", "f16", 5e-3)])
def test_perplexity_there_is_ours(family: str, kind: str, within: float, bos: Bos, tmp_path: Path) -> None:
    loaded = loaded_of(tmp_path, family)
    written(loaded, tmp_path / "export", kind)
    found = perplexity_of(llama_cpp.mean_loss(tmp_path / "export" / FILE, bos.before(WINDOWS), bos.length, QUIET))
    assert found == pytest.approx(perplexity(loaded, bos), rel=within)
    other = llama_cpp.mean_loss(tmp_path / "export" / FILE, bos.before(WINDOWS[:1]), bos.length, QUIET)
    assert perplexity_of(other) != pytest.approx(found, rel=1e-3)  # it reads the windows


IN_PARTS = """
import json, sys
from prune_lab.measure import llama_cpp_process as here
here._LOGITS_AT_ONCE = int(sys.argv[2])
model = here.Model(sys.argv[1], 40, 1, exact=True)
print(json.dumps(model.losses(json.loads(sys.argv[3]), int(sys.argv[4]))))
"""


@needs_llama_cpp
@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_files_of_few_bits_compute_what_they_hold(kind: str, tmp_path: Path) -> None:
    """The dequantised weights, which our reader has; llama.cpp also rounds the inputs of a product to 8 bits."""
    loaded = loaded_of(tmp_path, "llama")
    written(loaded, tmp_path / "export", kind)
    file = tmp_path / "export" / FILE
    found = perplexity_of(llama_cpp.mean_loss(file, WINDOWS, 0, QUIET, repack=False))
    read = replace(loaded, model=Gguf(type=kind).read(tmp_path / "export", loaded.model))
    assert found == pytest.approx(perplexity(read, Bos()), rel=0.05)


@needs_llama_cpp
@pytest.mark.parametrize("prefix", [0, 1, 7])
def test_a_window_in_parts_has_the_same_losses(prefix: int, tmp_path: Path) -> None:
    """As of a large vocabulary, whose logits are gigabytes for a window: 7 tokens at a time, and all 40."""
    loaded = loaded_of(tmp_path, "llama")
    written(loaded, tmp_path / "export")
    found = []
    for at_once in (300 * 7, 300 * 100):
        values = [tmp_path / "export" / FILE, at_once, WINDOWS[0].tolist(), prefix]
        command = [sys.executable, "-c", IN_PARTS, *map(str, values)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        found.append(torch.tensor(json.loads(done.stdout)))
    expected = torch.nn.functional.cross_entropy(
        loaded.model(WINDOWS[:1]).logits[0, prefix:-1], WINDOWS[0, prefix + 1 :], reduction="none"
    )
    for losses in found:
        torch.testing.assert_close(losses, expected.detach(), rtol=0, atol=1e-5)


@needs_llama_cpp
def test_what_is_timed_is_a_greedy_continuation(tmp_path: Path) -> None:
    """The same ids as stock transformers generates, each time from the beginning; and the models are not mixed up."""
    one, other = (loaded_of(tmp_path / name, name) for name in ("llama", "qwen3"))
    for loaded in (one, other):
        written(loaded, tmp_path / loaded.family / "export")
    files = [tmp_path / loaded.family / "export" / FILE for loaded in (one, other)]
    expected = [
        loaded.model.generate(TOKENS, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
        for loaded in (one, other)
    ]
    with llama_cpp.loaded(files, TOKENS.shape[1] + 12, exact=True) as llama:
        for model in (0, 1, 1, 0):
            reply = llama.ask(model, "timed", ids=TOKENS[0].tolist(), tokens=12)
            assert reply["ids"] == expected[model][0, TOKENS.shape[1] :].tolist()
            assert min(reply["prefill_ms"], reply["decode_ms"]) > 0


@needs_llama_cpp
def test_pairs_are_dense_and_compressed(tmp_path: Path) -> None:
    """A model of a hundred times the work is slower in the place where it stands, in either order."""
    small = loaded_of(tmp_path / "a", "llama")
    large = loaded_of(tmp_path / "b", "llama", hidden_size=512, intermediate_size=2048, num_hidden_layers=4)
    files = []
    for loaded in (large, small):
        written(loaded, Path(loaded.name).parent / "export")
        files.append(Path(loaded.name).parent / "export" / FILE)
    settings = Measure(pairs=10, warmup=1, prompt_tokens=24, decode_tokens=3)
    found = llama_cpp.measure_pairs(files, TOKENS, settings, QUIET)
    again = llama_cpp.measure_pairs(files[::-1], TOKENS, settings, QUIET)
    for taken in (found.prefill, found.decode, again.prefill, again.decode):
        assert taken.dense.shape == taken.compressed.shape == (10,)
    assert found.prefill.speedup > 1 > again.prefill.speedup
    assert found.decode.speedup > 1 > again.decode.speedup
    large_mb, small_mb = (llama_cpp.peak_mb(file, TOKENS, settings, QUIET) for file in files)
    assert large_mb - small_mb == pytest.approx(files[0].stat().st_size / 1e6, rel=0.3)


# --- Runs ---


@needs_llama_cpp
def test_a_run_has_the_figures_of_both_models(small: list[str], cli: Cli, tmp_path: Path) -> None:
    """Beside PyTorch's, and in the table; the dense ones once; a run with another export is another run."""
    words = [*small, "method=structured", "amount=0.5", "tracking=none", "measure.engine=llama_cpp", "export=gguf"]
    words += ["measure.engine_windows=3", "measure.memory=true", "export.type=f32"]
    done = cli(*words, "hydra.run.dir=one")
    assert done.returncode == 0, done.stderr
    assert "llama_" not in done.stderr  # its log
    for row in ("perplexity in llama.cpp", "prefill in llama.cpp, ms (speed-up)", "peak memory of llama.cpp, MB"):
        assert row in done.stdout
    summary = json.loads((tmp_path / "one" / "summary.json").read_text())
    found = {name: value for name, value in summary["metrics"].items() if name.startswith("llama_cpp/")}
    check_known(found)
    expected = {name for metric in METRICS if metric.name.startswith("llama_cpp/") for name in metric.names}
    assert {name for name in found if "/dense_" not in name} == expected
    for of in ("", "dense_"):
        assert found[f"llama_cpp/{of}perplexity_vs_torch"] == pytest.approx(1, abs=1e-5)
    ratio = found["llama_cpp/perplexity"] / found["llama_cpp/dense_perplexity"]
    assert found["llama_cpp/perplexity_ratio"] == ratio
    assert found["llama_cpp/file_mb"] == (tmp_path / "one" / "export" / FILE).stat().st_size / 1e6
    assert found["llama_cpp/file_mb"] < found["llama_cpp/dense_file_mb"]
    low, high = (found[f"llama_cpp/decode_speedup_{bound}"] for bound in ("low", "high"))
    assert low <= found["llama_cpp/decode_speedup"] <= high
    assert summary["protocol"]["engine"]["windows"] == 3
    assert "CPU" in summary["environment"]["engine"]
    (dense,) = (tmp_path / "cache" / "dense_export").iterdir()
    heads = {field.contents() for name, field in GGUFReader(dense / FILE).fields.items() if name.endswith("head_count")}
    assert heads == {4}

    made = dense.stat().st_mtime_ns
    again = cli(*words, "amount=0.25", "hydra.run.dir=two", "measure.latency=false", "measure.memory=false")
    assert again.returncode == 0, again.stderr
    metrics = json.loads((tmp_path / "two" / "summary.json").read_text())["metrics"]
    assert metrics["llama_cpp/dense_perplexity"] == found["llama_cpp/dense_perplexity"]
    assert {name for name in metrics if name.startswith("llama_cpp/")} == {
        f"llama_cpp/{of}{name}" for of in ("", "dense_") for name in ("perplexity", "perplexity_vs_torch", "file_mb")
    } | {"llama_cpp/perplexity_ratio"}
    assert dense.stat().st_mtime_ns == made

    other = cli(
        *words, "amount=0.25", "hydra.run.dir=three", "measure.latency=false", "measure.memory=false", "export.type=f16"
    )
    assert other.returncode == 0, other.stderr
    assert "finished before" not in other.stdout
    metrics = json.loads((tmp_path / "three" / "summary.json").read_text())["metrics"]
    assert metrics["llama_cpp/dense_file_mb"] < 0.7 * found["llama_cpp/dense_file_mb"]
    assert 1e-7 < abs(metrics["llama_cpp/dense_perplexity"] / found["llama_cpp/dense_perplexity"] - 1) < 5e-3


@needs_llama_cpp
def test_a_crash_there_is_a_failure_with_its_reason(tmp_path: Path) -> None:
    """A file that it does not load, or a process that is killed, before a request and while it is waited for."""
    loaded = loaded_of(tmp_path, "llama")
    written(loaded, tmp_path / "export")
    file = tmp_path / "export" / FILE
    (tmp_path / "half.gguf").write_bytes(file.read_bytes()[:-3000])
    with pytest.raises(RuntimeError, match=r"(?s)llama.cpp failed: its process ended with exit code 1.*does not load"):
        llama_cpp.mean_loss(tmp_path / "half.gguf", WINDOWS, 0, QUIET)
    with llama_cpp.loaded([file], 40, exact=True) as llama:
        os.kill(llama._process.pid, signal.SIGKILL)
        llama._process.wait()
        with pytest.raises(RuntimeError, match=r"its process was ended by signal 9, and said last: nothing"):
            llama.ask(0, "losses", ids=WINDOWS[0].tolist() * 10000, prefix=0)
    with (
        llama_cpp.loaded([file], 40, exact=True) as llama,
        pytest.raises(RuntimeError, match=r"its process ended with exit code 1, and said last: (?s:.)*ended with -1"),
    ):
        llama.ask(0, "losses", ids=[*range(290, 330)], prefix=0)  # tokens that the vocabulary lacks


ABORTS = """

def llama_decode(*_):
    import os
    os.write(2, b"GGML_ASSERT(no) failed\\n")
    os.abort()
"""


@needs_llama_cpp
def test_a_run_whose_file_fails_there_says_why(small: list[str], cli: Cli, tmp_path: Path) -> None:
    """The run fails, and no figures of it stay."""
    words = [*small, "method=none", "tracking=none", "measure.engine=llama_cpp", "export=gguf", "hydra.run.dir=run"]
    words += ["measure.latency=false", "measure.engine_windows=1"]
    site = tmp_path / "site"
    spec = find_spec("llama_cpp")
    assert spec is not None
    assert spec.origin is not None
    shutil.copytree(Path(spec.origin).parent, site / "llama_cpp", symlinks=True)
    with (site / "llama_cpp" / "__init__.py").open("a") as code:
        code.write(
            "\n\ndef llama_decode(*_):\n    import os\n    os.write(2, b'GGML_ASSERT(no) failed\\n')\n    os.abort()\n"
        )
    done = cli(*words, PYTHONPATH=f"{site}{os.pathsep}{ROOT}")
    assert done.returncode == 1
    assert "its process was ended by signal 6, and said last: GGML_ASSERT(no) failed" in done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "FAILED"
    assert "GGML_ASSERT" in summary["reason"]


def test_a_package_that_is_missing_is_named(small: list[str], cli: Cli, tmp_path: Path) -> None:
    """Before anything is loaded; PyTorch's own path finder is told that there is none."""
    (tmp_path / "sitecustomize.py").write_text(
        """
import importlib.machinery
find = importlib.machinery.PathFinder.find_spec
importlib.machinery.PathFinder.find_spec = classmethod(
    lambda cls, name, *rest: None if name == "llama_cpp" else find(name, *rest)
)
"""
    )
    words = [*small, "measure.engine=llama_cpp", "export=gguf", "tracking=none", "hydra.run.dir=run"]
    done = cli(*words, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert done.returncode == 2
    for part in ("measure.engine=llama_cpp", "is not installed", '"prune-lab[llama-cpp]"', "measure.engine=none"):
        assert part in done.stderr
    assert not (tmp_path / "run" / "export").exists()


@needs_llama_cpp
def test_a_package_that_does_not_start_is_refused_before_the_work(small: list[str], cli: Cli, tmp_path: Path) -> None:
    """Such as one whose libraries are gone."""
    (tmp_path / "site" / "llama_cpp").mkdir(parents=True)
    (tmp_path / "site" / "llama_cpp" / "__init__.py").write_text("raise OSError('libgomp.so.1: cannot open')\n")
    words = [*small, "measure.engine=llama_cpp", "export=gguf", "tracking=none", "hydra.run.dir=run"]
    done = cli(*words, PYTHONPATH=f"{tmp_path / 'site'}{os.pathsep}{ROOT}")
    assert done.returncode == 2
    assert "libgomp.so.1: cannot open" in done.stderr
    assert "give measure.engine=none" in done.stderr
    assert not (tmp_path / "run" / "export").exists()
