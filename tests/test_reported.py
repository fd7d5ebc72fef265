"""Files of a type that is not described, whose tensors are not those of the config.json beside them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CPU
from model_types import tiny_folder
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from prune_lab.errors import Refused
from prune_lab.methods.structured import Structured
from prune_lab.models.anatomy import Anatomy
from prune_lab.models.export import save_model
from prune_lab.models.load import HubModel

FILE = "model.safetensors"


@pytest.fixture(scope="module", params=["olmo2", "mixtral"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("files") / request.param, request.param)


def changed(
    folder: Path, place: Path, config: dict[str, Any], edit: Callable[[dict[str, Tensor]], object] | None = None
) -> Path:
    """A copy with other fields in its config.json, and edited tensors."""
    shutil.copytree(folder, place)
    file = place / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    if edit is not None:
        tensors = load_file(place / FILE)
        edit(tensors)
        save_file(tensors, place / FILE, metadata={"format": "pt"})
    return place


def said_of(folder: Path, stream: bool) -> str:
    """What refuses a folder."""
    with pytest.raises(Refused) as refused:
        HubModel(name=str(folder), stream=stream).load(CPU, seed=0)
    return str(refused.value)


Q_BIAS = "model.layers.1.self_attn.q_proj.bias"


@pytest.mark.parametrize("stream", [False, True])
def test_tensors_that_are_not_of_the_config_are_refused_in_words_that_name_them(
    folder: Path, stream: bool, tmp_path: Path
) -> None:
    said = said_of(changed(folder, tmp_path / "wide", {"vocab_size": 500}), stream)
    assert "lm_head.weight (stored [320, 64], needed [500, 64])" in said
    assert "give the one that was saved with them" in said
    said = said_of(changed(folder, tmp_path / "deep", {"num_hidden_layers": 5}), stream)
    assert "model.layers has 3 blocks in its files, and 5 by config.json" in said
    said = said_of(changed(folder, tmp_path / "short", {"num_hidden_layers": 2}), stream)
    assert "holds 1 block that config.json does not count (model.layers.2): set its number of blocks" in said
    missing = changed(folder, tmp_path / "less", {}, lambda tensors: tensors.pop("model.norm.weight"))
    assert "lacks the weights model.norm.weight: the download is not complete; fetch it again" in said_of(
        missing, stream
    )


def test_a_bias_that_would_be_dropped_is_refused_unless_it_is_zero(folder: Path, tmp_path: Path) -> None:
    biased = changed(folder, tmp_path / "one", {}, lambda tensors: tensors.update({Q_BIAS: torch.ones(64)}))
    said = said_of(biased, False)
    assert f"holds 1 tensor that the model of config.json has no place for ({Q_BIAS})" in said
    assert "such as attention_bias or mlp_bias" in said
    zero = changed(folder, tmp_path / "zero", {}, lambda tensors: tensors.update({Q_BIAS: torch.zeros(64)}))
    loaded = HubModel(name=str(zero)).load(CPU, seed=0)
    assert loaded.warnings == [f"1 tensors of the checkpoint are not used: {Q_BIAS}"]


def test_what_stands_beside_the_model_is_a_note(folder: Path, tmp_path: Path) -> None:
    """A head for another task; a block of another kind, which predicts further tokens; a cache's scale."""
    beside = {
        "score.weight": torch.ones(2, 64),
        "model.layers.3.enorm.weight": torch.ones(64),
        "model.layers.3.self_attn.q_proj.weight": torch.ones(64, 64),
        "model.layers.0.self_attn.k_proj.k_scale": torch.ones(1),
    }
    place = changed(folder, tmp_path / "more", {}, lambda tensors: tensors.update(beside))
    loaded = HubModel(name=str(place)).load(CPU, seed=0)
    assert [note.partition(":")[0] for note in loaded.warnings] == ["4 tensors of the checkpoint are not used"]


@pytest.mark.parametrize("model_type", ["granite", "gemma3"])
def test_a_head_of_its_own_is_kept_and_an_export_says_so(model_type: str, tmp_path: Path) -> None:
    """Also one whose config says that it is the embedding: other programs go by what the config says."""
    tied = {"tie_word_embeddings": True}
    more: dict[str, Any] = {"text_config": tied} if model_type == "gemma3" else {}
    whole = tiny_folder(tmp_path / "tied", model_type, **tied, **more)
    assert HubModel(name=str(whole)).load(CPU, seed=0).model.config.tie_word_embeddings is True
    own = torch.randn(320, 64, generator=torch.Generator().manual_seed(1))
    loaded = HubModel(
        name=str(changed(whole, tmp_path / "own", {}, lambda tensors: tensors.update({"lm_head.weight": own})))
    ).load(CPU, seed=0)
    assert any("but the files hold another, lm_head.weight" in note for note in loaded.warnings)
    method = Structured(amount=0.5, units=("mlp",), score="l2", refit="none")
    method.prune(Anatomy(loaded.model), 0.5, 0, None)
    save_model(loaded, tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert [config["tie_word_embeddings"], config.get("text_config", {}).get("tie_word_embeddings", False)] == [
        False,
        False,
    ]
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(again.get_output_embeddings().weight, own)
