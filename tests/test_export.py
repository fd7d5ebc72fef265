"""An export is whole, holds nothing that runs, and computes in stock transformers what the model computes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CPU, FAMILIES, Cli, make_folder, story
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from prune_lab.models.export import check_reload, save_model
from prune_lab.models.load import HubModel, Loaded
from prune_lab.system.device import Device

TOKENS = torch.randint(300, (1, 24), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=TOKENS, use_cache=False).logits


class Failing:
    """A tokenizer on a full disk: part of it is written, then it raises."""

    def save_pretrained(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{")
        raise OSError("No space left on device")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_export_is_the_model(tmp_path: Path, family: str, tied: bool) -> None:
    """Weights and logits bit for bit, and a tokenizer that gives the same tokens."""
    made = make_folder(tmp_path / "made", family, tie_word_embeddings=tied)
    loaded = HubModel(name=str(made)).load(CPU, seed=0)
    save_model(loaded, tmp_path / "export")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32).eval()
    weights = loaded.model.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in again.state_dict().items())
    assert torch.equal(logits(again), logits(loaded.model))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "export")
    text = "the cat sees thing A1.\n\nünïcode"
    assert tokenizer(text)["input_ids"] == loaded.tokenizer(text)["input_ids"]
    check_reload(loaded.model, tmp_path / "export", TOKENS)


def test_an_export_holds_safetensors_and_nothing_that_runs(loaded: Loaded, tmp_path: Path) -> None:
    save_model(loaded, tmp_path / "export")
    names = {path.name for path in (tmp_path / "export").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= names
    assert {Path(name).suffix for name in names} <= {".json", ".safetensors", ".jinja", ".txt"}
    assert "auto_map" not in json.loads((tmp_path / "export" / "config.json").read_text())


def test_an_export_that_fails_leaves_nothing(loaded: Loaded, tmp_path: Path) -> None:
    before = set(tmp_path.rglob("*"))
    broken = Loaded(loaded.model, Failing(), loaded.name, loaded.family)
    with pytest.raises(OSError, match="No space left"):
        save_model(broken, tmp_path / "export")
    assert set(tmp_path.rglob("*")) == before


def test_an_export_that_fails_leaves_the_one_before(loaded: Loaded, tmp_path: Path) -> None:
    save_model(loaded, tmp_path / "export")
    before = {path: path.read_bytes() for path in (tmp_path / "export").iterdir()}
    with pytest.raises(OSError, match="No space left"):
        save_model(Loaded(loaded.model, Failing(), loaded.name, loaded.family), tmp_path / "export")
    assert {path: path.read_bytes() for path in (tmp_path / "export").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_an_export_replaces_the_one_before_whole(loaded: Loaded, tmp_path: Path) -> None:
    """No file of an earlier export stays to be read with the new ones."""
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "model-00002-of-00002.safetensors").write_bytes(b"old")
    save_model(loaded, tmp_path / "export")
    assert [path.name for path in (tmp_path / "export").glob("*.safetensors")] == ["model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_an_export_makes_the_folders_above_it(loaded: Loaded, tmp_path: Path) -> None:
    save_model(loaded, tmp_path / "runs" / "1" / "export")
    check_reload(loaded.model, tmp_path / "runs" / "1" / "export", TOKENS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_export_keeps_the_number_type(folder: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    loaded = HubModel(name=str(folder)).load(Device(CPU.torch_device, dtype), seed=0)
    save_model(loaded, tmp_path / "export")
    stored = load_file(tmp_path / "export" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "export").dtype == dtype
    check_reload(loaded.model, tmp_path / "export", TOKENS)


def tamper(folder: Path, name: str, change: float) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[0] += change
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("change", [0.1, float("nan")])
@pytest.mark.parametrize("name", ["model.layers.0.mlp.down_proj.weight", "model.norm.weight"])
def test_a_file_that_was_tampered_with_does_not_pass(loaded: Loaded, tmp_path: Path, name: str, change: float) -> None:
    """One weight is enough; NaN must not slip through a comparison."""
    save_model(loaded, tmp_path / "export")
    tamper(tmp_path / "export", name, change)
    with pytest.raises(RuntimeError, match=r"export in .* does not reload: its logits differ by"):
        check_reload(loaded.model, tmp_path / "export", TOKENS)


def test_a_config_that_computes_something_else_does_not_pass(loaded: Loaded, tmp_path: Path) -> None:
    """The weights are right, the positions are not."""
    save_model(loaded, tmp_path / "export")
    path = tmp_path / "export" / "config.json"
    config = json.loads(path.read_text())
    config["rope_parameters"]["rope_theta"] = 100.0
    path.write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="does not reload"):
        check_reload(loaded.model, tmp_path / "export", TOKENS)


# A process that has no prune_lab: argv is an export and a text. Perplexity of the first 8 windows of 32 tokens.
STOCK_PERPLEXITY = """
import math, pathlib, sys
sys.modules["prune_lab"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
text = pathlib.Path(sys.argv[2]).read_text()
ids = AutoTokenizer.from_pretrained(sys.argv[1])(text, return_tensors="pt")["input_ids"][0]
losses = []
for first in range(0, 8 * 32, 32):
    window = ids[first : first + 32]
    with torch.no_grad():
        chances = model(input_ids=window[None]).logits[0].double().log_softmax(-1)
    losses.append(-sum(float(chances[i, window[i + 1]]) for i in range(31)) / 31)
try:
    import prune_lab
except ImportError:
    print(math.exp(sum(losses) / 8))
"""


@pytest.mark.parametrize("method", ["none", "structured"])
def test_anyone_finds_the_perplexity_that_a_run_reports(
    cli: Cli, small: list[str], tmp_path: Path, method: str
) -> None:
    """The export of a real command line, in stock transformers, by a loop of its own over the text itself."""
    (tmp_path / "test.txt").write_text("\n\n".join(story(seed) for seed in range(200, 206)))
    run = [*small, "dataset.test_path=test.txt", f"method={method}", "amount=0.25", "export=true", "tracking=none"]
    done = cli(*run, "hydra.run.dir=run", "measure.latency=false")
    assert done.returncode == 0, done.stderr
    command = [sys.executable, "-I", "-c", STOCK_PERPLEXITY, str(tmp_path / "run" / "export"), "test.txt"]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    reported = json.loads((tmp_path / "run" / "summary.json").read_text())["metrics"]["quality/perplexity"]
    assert float(found.stdout) == pytest.approx(reported, rel=1e-3)
