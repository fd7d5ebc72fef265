"""export=onnx: the graph beside stock transformers, run by ONNX Runtime without prune_lab's code."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import Cli, make_folder
from model_types import tiny_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from prune_lab.errors import Refused
from prune_lab.export.onnx import PACKAGES, TYPES, Onnx
from prune_lab.measure.onnx_runtime import mean_loss
from prune_lab.models.onnx import compare, graph
from prune_lab.models.onnx.session import OnnxModel
from prune_lab.models.onnx.types import TYPES as MODEL_TYPES
from prune_lab.results.metrics import METRICS
from prune_lab.system.console import Console

SLOW = (pytest.mark.slow, pytest.mark.process)
TOKENS = torch.randint(90, (1, 40), generator=torch.Generator().manual_seed(3))


class Plain:
    """A graph in ONNX Runtime, fed by the names and shapes that the card tells."""

    def __init__(self, folder: Path) -> None:
        self.session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
        inputs = {one.name: one for one in self.session.get_inputs()}
        assert {"input_ids", "position_ids"} < set(inputs)
        self.cache = {
            name: np.empty((1, int(one.shape[1]), 0, int(one.shape[3])), np.float32)
            for name, one in inputs.items()
            if name not in ("input_ids", "position_ids")
        }
        self.seen = 0

    def __call__(self, ids: list[int]) -> Any:
        """Logits of the next tokens, shape (tokens, vocabulary)."""
        positions = np.arange(self.seen, self.seen + len(ids))[None]
        given = {"input_ids": np.array([ids]), "position_ids": positions, **self.cache}
        names = [one.name for one in self.session.get_outputs()]
        found = dict(zip(names, self.session.run(None, given), strict=True))
        self.cache = {name: found[name.replace("input.", "output.")] for name in self.cache}
        self.seen += len(ids)
        return found["logits"][0]


def test_a_run_s_export_writes_the_same_text(folder: Path, small: list[str], cli: Cli, tmp_path: Path) -> None:
    """A pruned model's: what stock transformers continues from export=hf, ONNX Runtime does from export=onnx."""
    words = [*small, "method=structured", "method.units=[mlp,heads]", "amount=0.5", "measure=quality_only"]
    words += ["measure.max_windows=4", "tracking=none"]
    for name in ("onnx", "hf"):
        done = cli(*words, f"export={name}", f"hydra.run.dir={name}")
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
    export = tmp_path / "onnx" / "export"
    assert not list(export.glob("*.safetensors"))
    assert (export / "tokenizer.json").exists()
    card = (export / "README.md").read_text()
    assert "onnxruntime.InferenceSession('model.onnx')" in card
    assert "library_name: onnx" in card
    summary = json.loads((tmp_path / "onnx" / "summary.json").read_text())
    size = sum((export / name).stat().st_size for name in ("model.onnx", "model.onnx.data")) / 1e6
    assert summary["metrics"]["size/disk_mb"] == pytest.approx(size)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "hf" / "export").eval()
    prompt = TOKENS[:, :7]
    expected = stock.generate(prompt, max_new_tokens=24, do_sample=False, eos_token_id=None)[0, 7:].tolist()
    plain, found = Plain(export), list[int]()
    following = prompt[0].tolist()
    for _ in range(24):
        following = [int(plain(following)[-1].argmax())]
        found += following
    assert found == expected
    assert stock.num_parameters() == summary["metrics"]["params/total"]


@pytest.mark.parametrize(
    "model_type", [pytest.param(one, marks=SLOW if one != "mistral" else ()) for one in MODEL_TYPES]
)
def test_logits_are_those_of_stock_transformers(model_type: str, tmp_path: Path) -> None:
    """At once, and token by token behind a cache, beyond the sliding window of those that have one."""
    window = {} if model_type in ("gpt2", "gpt_neox", "opt", "olmoe", "mixtral") else {"sliding_window": 8}
    model = tiny_model(model_type, **window)
    graph.write(model, tmp_path, torch.float32)
    with torch.no_grad():
        expected = model(input_ids=TOKENS).logits[0].numpy()
    largest = float(np.abs(expected).max())
    assert np.abs(Plain(tmp_path)(TOKENS[0].tolist()) - expected).max() < 1e-5 * max(largest, 1)
    plain = Plain(tmp_path)
    one_by_one = np.concatenate([plain(TOKENS[0, :5].tolist())] + [plain([int(one)]) for one in TOKENS[0, 5:]])
    assert np.abs(one_by_one - expected).max() < 1e-5 * max(largest, 1)


def test_a_graph_of_another_model_does_not_pass(tmp_path: Path) -> None:
    """Neither one whose logits differ at once, nor one that goes wrong behind its cache."""
    model = tiny_model("llama")
    graph.write(model, tmp_path, torch.float16)
    written = OnnxModel(tmp_path)
    compare.compare(model, written, TOKENS, 4, torch.float16)
    with pytest.raises(RuntimeError, match=r"does not reload: its logits differ by .*, of 40 tokens at once"):
        compare.compare(model, written, TOKENS, 4, torch.float32)
    other = tiny_model("llama")
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight.mul_(2)
    with pytest.raises(RuntimeError, match="at once"):
        compare.compare(other, written, TOKENS, 4, torch.float16)

    class Forgetful(OnnxModel):
        def __call__(self, *args: Any, cache: Any = None, **more: Any) -> Any:
            return super().__call__(*args, cache=None, **more)

    with pytest.raises(RuntimeError, match="token 21, decoded"):
        compare.compare(model, Forgetful(tmp_path), TOKENS, 4, torch.float16)


@pytest.mark.slow
@pytest.mark.process
def test_a_run_measures_both_graphs_in_onnx_runtime(folder: Path, small: list[str], cli: Cli, tmp_path: Path) -> None:
    """In float32 perplexity is PyTorch's, and every figure is there."""
    words = [*small, "method=structured", "amount=0.5", "tracking=none", "export=onnx", "measure.engine=onnxruntime"]
    words += ["measure.engine_windows=2", "measure.generation_prompts=0", "measure.max_windows=4"]
    words += ["measure.memory=true"]
    done = cli(*words, "hydra.run.dir=run")
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "run" / "summary.json").read_text())["metrics"]
    found = {name: value for name, value in metrics.items() if name.startswith("onnxruntime/")}
    asked = {name for metric in METRICS if metric.name.startswith("onnxruntime/") for name in metric.names}
    assert asked <= set(found)
    for of in ("", "dense_"):
        assert found[f"onnxruntime/{of}perplexity_vs_torch"] == pytest.approx(1, abs=1e-4)
        assert found[f"onnxruntime/{of}peak_mb"] > 0
    assert found["onnxruntime/perplexity"] != found["onnxruntime/dense_perplexity"]
    export = tmp_path / "run" / "export"
    size = sum((export / name).stat().st_size for name in ("model.onnx", "model.onnx.data")) / 1e6
    assert found["onnxruntime/file_mb"] == pytest.approx(size)
    assert found["onnxruntime/file_mb"] < found["onnxruntime/dense_file_mb"]
    low, high = (found[f"onnxruntime/decode_speedup_{bound}"] for bound in ("low", "high"))
    assert low <= found["onnxruntime/decode_speedup"] <= high
    assert "perplexity in ONNX Runtime" in done.stdout


@pytest.mark.slow
@pytest.mark.process
def test_the_loss_in_onnx_runtime_is_of_the_targets_behind_a_bos(tmp_path: Path) -> None:
    model = tiny_model("llama")
    graph.write(model, tmp_path, torch.float32)
    windows = torch.cat((torch.ones(3, 1, dtype=torch.int64), TOKENS[:, :36].view(3, 12)), 1)
    for prefix in (0, 1):
        with torch.no_grad():
            logits = model(input_ids=windows).logits[:, prefix:-1]
        expected = cross_entropy(logits.flatten(0, 1), windows[:, prefix + 1 :].flatten())
        found = mean_loss(tmp_path / "model.onnx", windows, prefix, Console(quiet=True))
        assert found == pytest.approx(float(expected), rel=1e-5)


def test_types_that_were_not_compared_are_refused() -> None:
    with pytest.raises(Refused, match="graphs of the type 'olmo2' were not compared"):
        Onnx().check_config(tiny_model("olmo2").config, ())
    rotary = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    for of_config in ({"rope_parameters": rotary}, {"rope_parameters": {"full_attention": rotary}}):
        with pytest.raises(Refused, match="rotary frequencies follow the longest text"):
            Onnx().check_config(SimpleNamespace(model_type="llama", **of_config), ())
    assert [Onnx(type=kind).identity for kind in TYPES] == [
        {"class": "prune_lab.export.onnx.Onnx", "type": kind} for kind in TYPES
    ]
    assert len(PACKAGES) == 3


def test_a_run_is_refused_before_its_work(small: list[str], cli: Cli, tmp_path: Path) -> None:
    other = make_folder(tmp_path / "other", "llama")
    config = json.loads((other / "config.json").read_text())
    config |= {"model_type": "olmo2", "architectures": ["Olmo2ForCausalLM"]}
    (other / "config.json").write_text(json.dumps(config))
    words = [f"model.name={other}" if word.startswith("model.name=") else word for word in small]
    done = cli(*words, "method=wanda", "export=onnx", "tracking=none", "hydra.run.dir=run")
    assert done.returncode == 2
    assert "export=onnx writes gemma" in done.stderr
    assert not (tmp_path / "run" / "export").exists()
