"""An export is whole, holds nothing that runs, and computes in stock transformers what the model computes."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ALL_FAMILIES, CPU, FAMILIES, OTHER_FAMILIES, ROOT, Cli, copied, in_older, make_folder, story
from conftest import logits as logits_of_windows
from model_types import tiny_config, tiny_folder
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from prune_lab.export.base import Export
from prune_lab.export.bitmask import Bitmask
from prune_lab.export.hf import HuggingFace
from prune_lab.export.none import NoExport
from prune_lab.methods.depth import Depth
from prune_lab.methods.structured import Structured
from prune_lab.models.anatomy import Anatomy
from prune_lab.models.export import check_reload, save_model
from prune_lab.models.export_config import READ_BY_4
from prune_lab.models.families import FAMILIES as DESCRIBED
from prune_lab.models.load import HubModel, Loaded
from prune_lab.pruning.calibration import Calibrator
from prune_lab.system.device import Device

TOKENS = torch.randint(300, (1, 24), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=TOKENS, use_cache=False).logits


EXPORTS = sorted(path.stem for path in (ROOT / "conf" / "export").glob("*.yaml"))


def exporter(name: str) -> Export:
    """An option of the group, with its defaults."""
    written = yaml.safe_load((ROOT / "conf" / "export" / f"{name}.yaml").read_text(encoding="utf-8"))
    module, _, cls = written.pop("_target_").rpartition(".")
    found: Export = getattr(importlib.import_module(module), cls)(**written)
    return found


def half_zero(loaded: Loaded) -> Loaded:
    with torch.no_grad():
        for _, linear in Anatomy(loaded.model).linears():
            linear.weight[:, ::2] = 0
    return loaded


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("name", EXPORTS)
def test_every_export_is_read_back_as_it_was_written(tmp_path: Path, name: str, family: str) -> None:
    """By the run that wrote it and by a process that has no model; its files are all that holds weights."""
    if (name, family) == ("gguf", "gpt2"):
        pytest.skip("export=gguf refuses a GPT-2")
    loaded = half_zero(HubModel(name=str(make_folder(tmp_path / "made", family))).load(CPU, seed=0))
    export, place = exporter(name), tmp_path / "export"
    place.mkdir()
    export.write(loaded, place)
    assert (place / "config.json").is_file()
    assert (place / "tokenizer.json").is_file()
    files = export.files(place)
    assert files
    held = sum(parameter.nbytes for parameter in loaded.model.parameters())
    assert 0.4 * held < sum(file.stat().st_size for file in files)
    assert not [path.name for path in place.rglob("*") if path not in files and path.stat().st_size > 0.3 * held]
    export.check(loaded.model, place, TOKENS)
    again = export.read(place)
    assert not again.training
    if export.exact:
        assert torch.equal(logits(again), logits(loaded.model))
    assert export.reading(loaded)
    with torch.no_grad():
        next(loaded.model.parameters()).add_(0.1)
    with pytest.raises(RuntimeError, match=r"export in .* does not reload: its .* differs? (by|in)"):
        export.check(loaded.model, place, TOKENS)


@pytest.mark.parametrize(
    ("dtype", "off", "allowed"),
    [
        (torch.bfloat16, 0.02, {"own kernels"}), (torch.bfloat16, 0.5, set()),
        (torch.float32, 1e-6, {"own kernels", "exact"}), (torch.float32, 1e-3, set()),
    ],
)  # fmt: skip
def test_kernels_that_no_file_holds_may_add_in_another_order(
    folder: Path, tmp_path: Path, dtype: torch.dtype, off: float, allowed: set[str]
) -> None:
    """By a few units in the last place, and no more; what is exact is never held to less than they are."""
    loaded = HubModel(name=str(folder)).load(Device(CPU.torch_device, dtype), seed=0)
    save_model(loaded, tmp_path / "export")
    with torch.no_grad():
        loaded.model.model.norm.weight.mul_(1 + off)
    found = set()
    for name, own_kernels in (("own kernels", True), ("exact", False)):
        with suppress(RuntimeError):
            HuggingFace().check(loaded.model, tmp_path / "export", TOKENS, own_kernels)
            found.add(name)
    assert found == allowed


def test_what_a_run_keeps_is_no_other_run_but_for_what_it_measures() -> None:
    assert NoExport().identity is HuggingFace().identity is None
    assert Bitmask().identity is not None
    assert [exporter(name).is_kept for name in ("bitmask", "gguf", "hf", "none")] == [True, True, True, False]


class Failing:
    """A tokenizer on a full disk: part of it is written, then it raises."""

    def save_pretrained(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{")
        raise OSError("No space left on device")


@pytest.mark.parametrize(
    ("family", "tied"), [*((family, True) for family in FAMILIES), ("llama", False), ("gemma2", False)]
)
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


def edited(folder: Path, file: str, **changes: Any) -> Path:
    """The folder, with other entries in one of its JSON files; "gone" are taken out."""
    values = json.loads((folder / file).read_text()) | changes
    (folder / file).write_text(json.dumps({key: value for key, value in values.items() if value != "gone"}))
    return folder


def exported(folder: Path, place: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json and tokenizer_config.json of an export that passed its check."""
    loaded = HubModel(name=str(folder)).load(CPU, seed=0)
    save_model(loaded, place)
    check_reload(loaded.model, place, TOKENS)
    again = AutoConfig.from_pretrained(place)
    now, then = (getattr(config, "rope_parameters", None) for config in (again, loaded.model.config))
    assert now is None or {**now, "type": None} == {**then, "type": None}  # an older name of rope_type, beside it
    return json.loads((place / "config.json").read_text()), json.loads((place / "tokenizer_config.json").read_text())


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
FACTORS = {"short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [2.0, 3.0, 4.0, 5.0]}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
TURNS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6}
LOCAL = {"rope_type": "default", "rope_theta": 100.0}
# Rotary positions as transformers 5 has them, and the fields in which 4.57 reads the same.
ROPES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "theta": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
              {"rope_theta": 5e5, "rope_scaling": None}),
    "llama3": ("llama", {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}}, {"rope_theta": 5e5, "rope_scaling": LLAMA3}),
    "linear": ("mistral", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e3}},
               {"rope_theta": 5e3, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "dynamic": ("qwen2", {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 5e3}},
                {"rope_theta": 5e3, "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}),
    "yarn": ("qwen3", {"rope_parameters": YARN | {"rope_theta": 5e3}}, {"rope_theta": 5e3, "rope_scaling": YARN}),
    "longrope": ("llama", {"rope_parameters": FACTORS | {"rope_type": "longrope", "rope_theta": 5e3, "factor": 4.0,
                                                         "original_max_position_embeddings": 32}},
                 {"rope_theta": 5e3, "original_max_position_embeddings": 32}),
    "gemma 3": ("gemma3_text", TURNS | {"rope_parameters": {
                    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e3},
                    "sliding_attention": LOCAL}},
                {"rope_theta": 5e3, "rope_scaling": {"rope_type": "linear", "factor": 8.0},
                 "rope_local_base_freq": 100.0}),
    "gemma 3, yarn": ("gemma3_text", TURNS | {"rope_parameters": {
                          "full_attention": YARN | {"rope_theta": 5e3}, "sliding_attention": LOCAL}},
                      {"rope_theta": 5e3, "rope_scaling": YARN, "rope_local_base_freq": 100.0}),
    "gpt_neox": ("gpt_neox", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0,
                                                  "partial_rotary_factor": 0.5}},
                 {"rotary_emb_base": 500.0, "rotary_pct": 0.5, "rope_scaling": None}),
    "phi3": ("phi3", {"original_max_position_embeddings": 16,
                      "rope_parameters": FACTORS | {"rope_type": "longrope", "rope_theta": 500.0}},
             {"rope_theta": 500.0, "rope_scaling": FACTORS | {"type": "longrope"}, "partial_rotary_factor": 1.0}),
    "phi3, half": ("phi3", {"original_max_position_embeddings": 16, "rope_parameters": {
                       "rope_type": "longrope", "rope_theta": 500.0, "partial_rotary_factor": 0.5,
                       "short_factor": [1.0, 1.5], "long_factor": [2.0, 3.0]}},
                   {"rope_theta": 500.0, "partial_rotary_factor": 0.5,
                    "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 3.0]}}),
}  # fmt: skip


@pytest.mark.parametrize("kind", ROPES)
def test_a_config_has_the_older_names_beside_the_new_ones(tmp_path: Path, kind: str) -> None:
    family, changes, older = ROPES[kind]
    config, _ = exported(make_folder(tmp_path / "made", family, **changes), tmp_path / "export")
    assert {key: config.get(key, "absent") for key in older} == older
    assert config["torch_dtype"] == config["dtype"] == "float32"


@pytest.mark.parametrize("kind", [kind for kind, (family, *_) in ROPES.items() if family != "gpt2"])
def test_an_export_of_an_export_says_the_same(tmp_path: Path, kind: str) -> None:
    """What was read from both names is written in both again."""
    family, changes, _ = ROPES[kind]
    first, _ = exported(make_folder(tmp_path / "made", family, **changes), tmp_path / "one")
    second, _ = exported(tmp_path / "one", tmp_path / "two")
    second["rope_parameters"].pop("type", None)
    assert first == second


TOKENIZERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "any file": ({"tokenizer_class": "PreTrainedTokenizerFast"}, {"tokenizer_class": "PreTrainedTokenizerFast"}),
    "a Llama": (
        {"tokenizer_class": "LlamaTokenizerFast", "bos_token": "<|endoftext|>", "add_bos_token": False},
        {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": False},
    ),
    "a GPT-2": ({"tokenizer_class": "GPT2Tokenizer"}, {"tokenizer_class": "GPT2Tokenizer"}),
    "a version 5": ({"tokenizer_class": "TokenizersBackend"}, {"tokenizer_class": "PreTrainedTokenizerFast"}),
    "unsaid": ({"tokenizer_class": "gone"}, {"tokenizer_class": "PreTrainedTokenizerFast"}),
    "with further tokens": (
        {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": ["<|endoftext|>"]},
        {"additional_special_tokens": ["<|endoftext|>"], "extra_special_tokens": "absent"},
    ),
    "with named tokens": (
        {"tokenizer_class": "PreTrainedTokenizerFast", "extra_special_tokens": {"image_token": "<|endoftext|>"}},
        {"extra_special_tokens": {"image_token": "<|endoftext|>"}},
    ),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_tokenizer_has_the_class_that_it_came_with(folder: Path, tmp_path: Path, kind: str) -> None:
    changes, says = TOKENIZERS[kind]
    own = edited(Path(shutil.copytree(folder, tmp_path / "own")), "tokenizer_config.json", backend="gone", **changes)
    _, config = exported(own, tmp_path / "export")
    assert {key: config.get(key, "absent") for key in says} == says
    ids = [AutoTokenizer.from_pretrained(place)("the cat sees thing A1.")["input_ids"] for place in (own, "export")]
    assert ids[0] == ids[1]


def test_no_entry_names_a_file_of_code_that_an_export_lacks(folder: Path, tmp_path: Path) -> None:
    """Of the config, of one inside it, and of the tokenizer."""
    code = {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X", "AutoTokenizer": ["x.T", None]}
    own = Path(shutil.copytree(folder, tmp_path / "own"))
    edited(
        own, "config.json", auto_map=code, custom_pipelines={"text": {"impl": "x.P"}}, more={"auto_map": code, "a": 1}
    )
    edited(own, "tokenizer_config.json", auto_map=code)
    config, tokenizer = exported(own, tmp_path / "export")
    assert config["more"] == {"a": 1}
    for written in (config, tokenizer):
        assert "auto_map" not in json.dumps(written)
        assert "custom_pipelines" not in written


# Run where transformers is 4.57: argv is a folder of exports beside what their logits should be; prints how far off
# they are by export, as a fraction of the largest. Attention of one kind, as the two versions choose it differently.
OLDER = """
import json, pathlib, sys
import torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

assert transformers.__version__.startswith("4.57"), transformers.__version__
tokens, found = torch.load(sys.argv[2]), {}
for expected in sorted(pathlib.Path(sys.argv[1]).glob("*/*.pt")):
    place = expected.with_suffix("")
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        logits = model(input_ids=tokens, use_cache=False).logits
    off = float((logits - torch.load(expected)).abs().max() / logits.abs().max())
    ids = AutoTokenizer.from_pretrained(place)("the cat sees thing A1.")["input_ids"]
    found[str(place.relative_to(sys.argv[1]))] = [off, ids]
print(json.dumps(found))
"""
# There too: inputs in its own form, and what it computes with them.
OLDER_INPUTS = """
import json, pathlib, sys
import torch, transformers
from conftest import logits, make_folder
from transformers import AutoModelForCausalLM

assert transformers.__version__.startswith("4.57"), transformers.__version__
for name, (family, changes) in json.loads(sys.argv[2]).items():
    folder = make_folder(pathlib.Path(sys.argv[1]) / name / "made", family, **changes)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    torch.save(logits(model), folder.parent / "none.pt")
"""
OLDER_FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3": ("llama", {"rope_theta": 5e5, "rope_scaling": LLAMA3}),
    "linear": ("llama", {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    "dynamic": ("llama", {"rope_theta": 5e3, "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}),
    "yarn": ("qwen2", {"rope_theta": 5e3, "rope_scaling": YARN}),
    "gemma 3": ("gemma3_text", TURNS | {"rope_theta": 5e3, "rope_local_base_freq": 100.0,
                                        "rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    "gemma 2": ("gemma2", TURNS | {"rope_theta": 5e3}),
    "gpt_neox": ("gpt_neox", {"rotary_pct": 0.5, "rotary_emb_base": 500.0}),
    "phi3": ("phi3", {"original_max_position_embeddings": 16, "rope_theta": 500.0,
                      "rope_scaling": FACTORS | {"type": "longrope"}}),
    "windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
}  # fmt: skip


def export_each(loaded: Loaded, place: Path) -> None:
    """Exports of a model: as it is, and with units and blocks taken out or zeroed; each beside its logits."""
    loaded.model.set_attn_implementation("eager")
    units = ("mlp", "heads") if len(Anatomy(loaded.model).possible_counts("heads")) > 1 else ("mlp",)
    for name, method in {
        "none": None,
        "structured": Structured(units=units, amount=0.5),
        "masked": Structured(units=("mlp", "heads"), amount=0.5, physical=False),
        "depth": Depth(amount=0.5),
    }.items():
        copy = copied(loaded)
        copy.tokenizer_config = loaded.tokenizer_config
        if method is not None:
            method.prune(Anatomy(copy.model), 0.5, 0, Calibrator(TOKENS) if method.calibrated else None)
        save_model(copy, place / name)
        torch.save(logits_of_windows(copy.model), place / f"{name}.pt")


def check_in_older(environment: dict[str, str], place: Path, count: int) -> None:
    tokens = torch.randint(300, (3, 24), generator=torch.Generator().manual_seed(5))  # those of conftest.logits
    torch.save(tokens, place / "tokens.pt")
    found = json.loads(in_older(environment, OLDER, str(place), str(place / "tokens.pt")))
    assert len(found) == count
    assert {name: off for name, (off, _) in found.items() if not off < 1e-5} == {}
    for name, (_, ids) in found.items():
        assert AutoTokenizer.from_pretrained(place / name)("the cat sees thing A1.")["input_ids"] == ids


@pytest.mark.slow
def test_exports_of_every_family_open_with_equal_logits_in_transformers_4(
    older: dict[str, str], tmp_path: Path
) -> None:
    cases = {family: (family, dict[str, Any]()) for family in ALL_FAMILIES}
    cases |= {f"untied {family}": (family, {"tie_word_embeddings": False}) for family in ALL_FAMILIES}
    cases |= {f"rope {kind}": (family, changes) for kind, (family, changes, _) in ROPES.items()}
    for name, (family, changes) in cases.items():
        made = make_folder(tmp_path / "made" / name, family, **changes)
        export_each(HubModel(name=str(made)).load(CPU, seed=0), tmp_path / "exports" / name)
    check_in_older(older, tmp_path / "exports", 4 * len(cases))


@pytest.mark.slow
def test_what_transformers_4_wrote_it_reads_again_from_an_export(older: dict[str, str], tmp_path: Path) -> None:
    """Its own logits of the input are those of the export of the dense model."""
    cases = {family: (family, dict[str, Any]()) for family in ALL_FAMILIES} | OLDER_FORMS
    cases |= {f"untied {family}": (family, {"tie_word_embeddings": False}) for family in OTHER_FAMILIES}
    in_older(older, OLDER_INPUTS, str(tmp_path / "inputs"), json.dumps(cases))
    for name in cases:
        place = tmp_path / "inputs" / name
        theirs = torch.load(place / "none.pt")
        export_each(HubModel(name=str(place / "made")).load(CPU, seed=0), place)
        ours = torch.load(place / "none.pt")
        assert float((theirs - ours).abs().max() / ours.abs().max()) < 1e-5, name
    check_in_older(older, tmp_path / "inputs", 4 * len(cases))


def with_theta(rope: Any) -> Any:
    """Rotary positions with a frequency that is no version's default."""
    if not isinstance(rope, dict):
        return rope
    return {key: 500.0 if key == "rope_theta" else with_theta(value) for key, value in rope.items()}


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "olmoe", "glm4", "cohere"])
def test_a_type_that_is_not_described_has_the_older_names_too(tmp_path: Path, model_type: str) -> None:
    rope = with_theta(tiny_config(model_type).rope_parameters)
    config, _ = exported(tiny_folder(tmp_path / "made", model_type, rope_parameters=rope), tmp_path / "export")
    assert config["rope_theta"] == 500.0
    assert config["torch_dtype"] == "float32"
    if model_type == "qwen3_moe":
        assert config["num_experts"] == config["num_local_experts"] == 4


@pytest.mark.slow
def test_other_types_that_transformers_4_has_give_equal_logits_there(older: dict[str, str], tmp_path: Path) -> None:
    types = [model_type for model_type in READ_BY_4 if model_type not in DESCRIBED]
    for model_type in types:
        rope = with_theta(getattr(tiny_config(model_type), "rope_parameters", None))
        more = {} if rope is None else {"rope_parameters": rope}
        loaded = HubModel(name=str(tiny_folder(tmp_path / "made" / model_type, model_type, **more))).load(CPU, seed=0)
        with suppress(ValueError, NotImplementedError):  # some have attention of one kind alone
            loaded.model.set_attn_implementation("eager")
        save_model(loaded, tmp_path / "exports" / "of" / model_type)
        torch.save(logits_of_windows(loaded.model), tmp_path / "exports" / "of" / f"{model_type}.pt")
    check_in_older(older, tmp_path / "exports", len(types))


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
    run = [*small, "dataset.test_path=test.txt", f"method={method}", "amount=0.25", "export=hf", "tracking=none"]
    done = cli(*run, "hydra.run.dir=run", "measure.latency=false")
    assert done.returncode == 0, done.stderr
    command = [sys.executable, "-I", "-c", STOCK_PERPLEXITY, str(tmp_path / "run" / "export"), "test.txt"]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    reported = json.loads((tmp_path / "run" / "summary.json").read_text())["metrics"]["quality/perplexity"]
    assert float(found.stdout) == pytest.approx(reported, rel=1e-3)
