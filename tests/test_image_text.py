"""Image-text models: the text part is pruned like any model's, and all else is exported as it came."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CPU, Cli, logits, story
from model_types import tiny_config, tiny_folder, tiny_model
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForImageTextToText

from prune_lab.errors import Refused
from prune_lab.methods.active_experts import ActiveExperts
from prune_lab.methods.base import Method
from prune_lab.methods.depth import Depth
from prune_lab.methods.experts import Experts
from prune_lab.methods.structured import Structured
from prune_lab.methods.unstructured import Unstructured
from prune_lab.methods.wanda import Wanda
from prune_lab.models import found
from prune_lab.models.anatomy import Anatomy
from prune_lab.models.export import check_reload, save_model
from prune_lab.models.load import HubModel, Loaded
from prune_lab.models.loss import window_losses
from prune_lab.models.removable_blocks import blocks_that_stay
from prune_lab.models.resize import original_blocks
from prune_lab.pruning.calibration import Calibrator

WINDOWS = torch.randint(4, 300, (6, 24), generator=torch.Generator().manual_seed(7))
# One projector or several, positions in three dimensions, scaled logits, text parts of other files of transformers,
# mixtures.
SLOW = (pytest.mark.slow, pytest.mark.process)
# Types that AutoModelForCausalLM builds the text part of alone, with the class of the whole model.
BOTH = {
    "qwen3_5": "Qwen3_5ForConditionalGeneration", "qwen3_5_moe": "Qwen3_5MoeForConditionalGeneration",
    "qwen4_exp": "Qwen4ExpForConditionalGeneration", "mllama": "MllamaForConditionalGeneration",
}  # fmt: skip
TYPES = ["llava", "mistral3", "qwen2_5_vl", "qwen3_vl", "internvl", "aya_vision", "kimi_k25", "qwen3_vl_moe"]
METHODS: dict[str, Method] = {
    "wanda": Wanda(amount=0.5),
    "channels": Structured(amount=0.5, units=("mlp",), score="l2", refit="none"),
    "depth": Depth(amount=0.34),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("image_text")


def folder_of(place: Path, model_type: str) -> Path:
    folder, whole = place / model_type, {"architectures": [BOTH[model_type]]} if model_type in BOTH else {}
    return folder if folder.exists() else tiny_folder(folder, model_type, **whole)


def loaded_of(place: Path, model_type: str) -> Loaded:
    """A small model of a type, to be changed."""
    return HubModel(name=str(folder_of(place, model_type))).load(CPU, seed=0)


def prune(loaded: Loaded, method: Method) -> None:
    method.prune(Anatomy(loaded.model), method.amount, 0, Calibrator(WINDOWS) if method.calibrated else None)


def stored(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config


def beside_text(config: dict[str, Any]) -> dict[str, Any]:
    """All that a config says of other parts than the text's."""
    return {key: value for key, value in config.items() if key not in ("text_config", "transformers_version")}


FAST = [*TYPES[:3], "qwen3_5"]
OTHERS = [name for name in (*TYPES, *BOTH) if name not in (*FAST, "mllama")]


@pytest.mark.parametrize("model_type", [*FAST, *(pytest.param(name, marks=SLOW) for name in OTHERS)])
def test_the_text_part_is_pruned_and_the_rest_stays(model_type: str, place: Path, tmp_path: Path) -> None:
    """By single weights, channels and blocks: what stock transformers reads has the logits of what is in memory."""
    folder = folder_of(place, model_type)
    before, config = stored(folder), config_of(folder)
    methods = dict(METHODS)
    if model_type in ("kimi_k25", "qwen3_vl_moe"):
        methods["experts"] = Experts(amount=0.5, score="frequency")
        methods["gates"] = Unstructured(amount=0.5, score="moe_pruner", scope="row")
        methods["active experts"] = ActiveExperts(amount=0.5)
    for name, method in methods.items():
        loaded = loaded_of(place, model_type)
        whole = logits(loaded.model)
        assert type(loaded.model) is type(AutoModelForImageTextToText.from_pretrained(folder))
        assert found.layout_of(loaded.model).decodes
        prune(loaded, method)
        assert not torch.allclose(logits(loaded.model), whole, atol=1e-3), name
        save_model(loaded, tmp_path / name)
        check_reload(loaded.model, tmp_path / name, WINDOWS[:1])
        again: Any = AutoModelForImageTextToText.from_pretrained(tmp_path / name).eval()
        assert type(again) is type(loaded.model)
        torch.testing.assert_close(logits(again), logits(loaded.model))
        after, changed = stored(tmp_path / name), set[str]()
        for key, tensor in before.items():
            if key not in after or not torch.equal(after[key], tensor):
                changed.add(key)
        # In files the text's blocks are "language_model.model.layers", "model.text_model.layers" or the like.
        assert bool(changed) == (name != "active experts"), name
        assert all(re.search(r"\.(layers|blocks)\.\d", key) for key in changed)
        others = [key for key in before if re.search("vision|visual|projector|aligner", key)]
        assert len(others) > 5
        assert all(torch.equal(after[key], before[key]) for key in others)
        assert beside_text(config_of(tmp_path / name)) == beside_text(config)


def test_a_text_part_that_came_alone_stays_one(tmp_path: Path) -> None:
    """Of a type that both auto classes have, a checkpoint of the text part is read and exported as that."""
    loaded = HubModel(name=str(tiny_folder(tmp_path / "m", "qwen3_5"))).load(CPU, seed=0)
    prune(loaded, METHODS["wanda"])
    save_model(loaded, tmp_path / "saved")
    check_reload(loaded.model, tmp_path / "saved", WINDOWS[:1])
    assert config_of(tmp_path / "saved")["architectures"] == ["Qwen3_5ForCausalLM"]


def test_a_whole_model_that_does_not_run_on_text_is_read_as_its_text_part(tmp_path: Path) -> None:
    """Which a note says; once stock transformers runs a Llama 4 on text, it need not be so any more."""
    torch.manual_seed(0)
    stock: Any = AutoModelForImageTextToText.from_config(tiny_config("llama4")).eval()
    with pytest.raises(AttributeError, match="image_outputs"):
        logits(stock)
    tiny_folder(tmp_path / "m", "llama4")  # for its tokenizer
    stock.save_pretrained(tmp_path / "m")
    loaded = HubModel(name=str(tmp_path / "m")).load(CPU, seed=0)
    assert type(loaded.model).__name__ == "Llama4ForCausalLM"
    assert any("the text part of this llama4 model is read and exported" in note for note in loaded.warnings)
    assert any(re.search(r"tensors of the checkpoint are not used: .*vision", note) for note in loaded.warnings)


@pytest.mark.parametrize("model_type", ["qwen3_vl", "qwen3_5", "kimi_k25"])
def test_channels_that_images_have_too_go_only_with_theirs(model_type: str, place: Path) -> None:
    """A projector whose size the text's hidden size is not: no text would show that images do not fit any more."""
    loaded = loaded_of(place, model_type)
    method = Structured(amount=0.25, units=("hidden",), score="random", refit="none")
    if model_type == "kimi_k25":
        prune(loaded, method)
        assert loaded.model.model.mm_projector.out_proj.weight.shape[0] == loaded.model.config.text_config.hidden_size
        return
    with pytest.raises(Refused, match="what its other parts make of images has the hidden size, too"):
        method.check_model(Anatomy(loaded.model), [0.25])


def test_blocks_that_text_does_not_pass_stay(place: Path) -> None:
    """A Llama 3.2 Vision reads images in blocks of their own: their absence costs no text anything."""
    loaded = loaded_of(place, "mllama")
    assert type(loaded.model).__name__ == "MllamaForConditionalGeneration"
    prune(loaded, Depth(amount=0.25))
    assert loaded.model.config.text_config.cross_attention_layers == [1]
    assert 1 in original_blocks(Anatomy(loaded.model))
    assert blocks_that_stay(Anatomy(loaded_of(place, "mllama").model))[1] == "text alone does not pass through it"


def test_what_is_measured_is_the_text_alone(place: Path) -> None:
    """A window's loss is that of the logits that stock transformers has of it without an image."""
    for model_type in ("qwen2_5_vl", "aya_vision"):  # positions in three dimensions; logits that are scaled
        loaded = loaded_of(place, model_type)
        stock = AutoModelForImageTextToText.from_pretrained(folder_of(place, model_type)).eval()
        windows = WINDOWS[:2].long()
        of_tokens = logits_on(stock, windows)[:, :-1].flatten(0, 1)
        wanted = cross_entropy(of_tokens, windows[:, 1:].flatten(), reduction="none").view(2, -1).mean(1)
        torch.testing.assert_close(window_losses(loaded.model, windows), wanted)


@torch.no_grad()
def logits_on(model: Any, tokens: Tensor, **more: Any) -> Tensor:
    of_model: Tensor = model(input_ids=tokens, use_cache=False, **more).logits
    return of_model


@pytest.mark.parametrize("name", METHODS)
def test_the_export_still_sees_images(name: str, place: Path, tmp_path: Path) -> None:
    """Of a picture it says what the pruned model in memory does, and of another picture something else."""
    loaded = loaded_of(place, "llava")
    prune(loaded, METHODS[name])
    save_model(loaded, tmp_path / "saved")
    again: Any = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved").eval()
    vision, image = again.config.vision_config, again.config.image_token_id
    patches = (vision.image_size // vision.patch_size) ** 2
    tokens = torch.cat([WINDOWS[:1, :4], torch.full((1, patches), image), WINDOWS[:1, 4:]], 1).long()
    picture = torch.randn(1, 3, vision.image_size, vision.image_size, generator=torch.Generator().manual_seed(1))
    of_export = logits_on(again, tokens, pixel_values=picture)
    torch.testing.assert_close(of_export, logits_on(loaded.model, tokens, pixel_values=picture))
    assert not torch.allclose(of_export, logits_on(again, tokens, pixel_values=-picture), atol=1e-3)


def test_blocks_that_are_counted_as_layers_go(place: Path, tmp_path: Path) -> None:
    loaded = loaded_of(place, "kosmos-2.5")
    prune(loaded, METHODS["depth"])
    assert loaded.model.config.text_config.layers == 2
    save_model(loaded, tmp_path / "saved")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved").eval()
    torch.testing.assert_close(logits(again), logits(loaded.model))


def test_a_model_of_random_weights_is_built(place: Path) -> None:
    loaded = HubModel(name=str(folder_of(place, "internvl")), weights="random").load(CPU, seed=0)
    assert type(loaded.model).__name__ == "InternVLForConditionalGeneration"


@pytest.mark.parametrize(
    ("model_type", "why"),
    [
        ("paligemma", "a token changes what is predicted of those before it"),
        ("blip", "does not run on plain text .*pixel_values"),
        ("udop", "does not run on plain text"),
    ],
)
def test_a_model_that_is_none_of_plain_text_is_refused(model_type: str, why: str) -> None:
    with pytest.raises(Refused, match=why):
        found.layout_of(tiny_model(model_type))


PROCESSOR = {
    "preprocessor_config.json": '{"image_processor_type":  "CLIPImageProcessor", "size": {"height": 30, "width": 30}}',
    "processor_config.json": '{"processor_class": "LlavaProcessor", "patch_size": 14}\n',
    "video_preprocessor_config.json": "not JSON",
    "chat_template.json": '{"chat_template": "{{ messages }}"}',
}


def test_the_command_line_exports_what_came_in(cli: Cli, place: Path, tmp_path: Path) -> None:
    """Files of the processor byte for byte, without names of code; the card says what loads it."""
    folder = tiny_folder(tmp_path / "mine", "llava")
    for name, content in PROCESSOR.items():
        (folder / name).write_text(content, encoding="utf-8")
    coded = {"auto_map": {"AutoProcessor": "processing_x.X"}, "sampling_rate": 16000}
    (folder / "audio_tokenizer_config.json").write_text(json.dumps(coded), encoding="utf-8")
    (tmp_path / "text.txt").write_text(story(1, 400))
    done = cli(
        "model=hf", f"model.name={folder}", "dataset=text", "dataset.path=text.txt", "dataset.seq_len=32",
        "dataset.calibration.n_samples=8", "measure=quality_only", "measure.max_windows=2",
        "method=structured", "amount=0.5", "export=hf", "hydra.run.dir=run",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    export = tmp_path / "run" / "export"
    for name, content in PROCESSOR.items():
        assert (export / name).read_text(encoding="utf-8") == content
    assert json.loads((export / "audio_tokenizer_config.json").read_text()) == {"sampling_rate": 16000}
    assert "`AutoModelForImageTextToText.from_pretrained(folder)`" in (export / "README.md").read_text()
    again: Any = AutoModelForImageTextToText.from_pretrained(export)
    assert again.config.text_config.intermediate_size == 48
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["model"]["family"] == "llava"
    assert summary["model"]["scope"]["matrices"] == 3 * 7  # of the text's three blocks
    assert summary["metrics"]["quality/perplexity"] > 0
