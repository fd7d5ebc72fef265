"""What a model folder may hold, and the short message for each that cannot be used."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CPU, FAMILIES, ROOT, make_folder, story
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from prune_lab.config.parts import build
from prune_lab.errors import Refused
from prune_lab.models.anatomy import Anatomy
from prune_lab.models.families import family_of
from prune_lab.models.folder_check import check_folder
from prune_lab.models.load import HubModel, Loaded
from prune_lab.system.device import Device


@pytest.fixture
def own(folder: Path, tmp_path: Path) -> Path:
    """A copy of the small Llama's folder, to be damaged."""
    return Path(shutil.copytree(folder, tmp_path / "own"))


def load(folder: Path, seed: int = 0, **keys: Any) -> Loaded:
    return HubModel(name=str(folder), **keys).load(CPU, seed)


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_loads_as_stock_transformers_loads_it(tmp_path: Path, family: str) -> None:
    folder = make_folder(tmp_path / family, family)
    loaded, stock = load(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert loaded.family == family
    assert loaded.name == str(folder)
    assert not loaded.model.training
    assert loaded.tokenizer.decode(loaded.tokenizer("the cat sees")["input_ids"]) == "the cat sees"
    weights, expected = loaded.model.state_dict(), stock.state_dict()
    assert list(weights) == list(expected)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_the_home_folder_is_expanded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert HubModel(name=f"~/{folder.name}").load(CPU, 0).fingerprint() == load(folder).fingerprint()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_take_the_number_type_of_the_device(folder: Path, dtype: torch.dtype) -> None:
    model = HubModel(name=str(folder)).load(Device(CPU.torch_device, dtype), 0).model
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


@pytest.mark.parametrize("family", FAMILIES)
def test_anatomy_names_every_linear_of_the_blocks(tmp_path: Path, family: str) -> None:
    """Against the module tree: 7 Linears in each of 2 blocks, none else; units as the config counts them."""
    model = load(make_folder(tmp_path / family, family)).model
    anatomy = Anatomy(model)
    found = dict(anatomy.linears())
    assert set(found) == {name for name, module in model.named_modules() if isinstance(module, nn.Linear)} - {"lm_head"}
    assert len(found) == 14
    assert all(module is model.get_submodule(name) for name, module in found.items())
    assert (anatomy.unit_count("mlp"), anatomy.unit_count("heads"), anatomy.head_dim) == (48, 2, 8)
    parts = [part for kind in ("mlp", "heads") for block in anatomy.unit_linears(kind) for part in block]
    assert {part.name for part in parts} == set(found)


def test_random_weights_follow_the_seed(folder: Path) -> None:
    pretrained, one, again, two = load(folder), *(load(folder, seed, weights="random") for seed in (1, 1, 2))
    prints = [loaded.fingerprint()["weights"] for loaded in (pretrained, one, again, two)]
    assert prints[1] == prints[2]
    assert len(set(prints)) == 3
    same_shapes = [{n: t.shape for n, t in loaded.model.state_dict().items()} for loaded in (pretrained, one)]
    assert same_shapes[0] == same_shapes[1]
    assert one.fingerprint()["tokenizer"] == pretrained.fingerprint()["tokenizer"]


def test_random_weights_leave_the_global_generator_alone(folder: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    load(folder, seed=8, weights="random")
    assert torch.equal(torch.rand(2), expected)


def test_random_weights_need_a_config_and_no_weights(own: Path) -> None:
    (own / "model.safetensors").unlink()
    assert load(own, weights="random").model.config.hidden_size == 32


def test_the_fingerprint_changes_with_one_weight(loaded: Loaded) -> None:
    before = loaded.fingerprint()
    assert before == loaded.fingerprint()
    weight = loaded.model.model.layers[1].mlp.down_proj.weight
    with torch.no_grad():
        weight[31, 47] = torch.nextafter(weight[31, 47], torch.tensor(9.0))
    after = loaded.fingerprint()
    assert after["weights"] != before["weights"]
    assert after["tokenizer"] == before["tokenizer"]


def test_the_fingerprint_tells_number_types_and_shapes_apart(loaded: Loaded) -> None:
    """Zeros have the same bytes in every shape and, half as many, in every type."""
    prints = []
    for shape, dtype in (((4, 8), torch.float32), ((8, 4), torch.float32), ((8, 8), torch.float16)):
        other = Loaded(copy.deepcopy(loaded.model), loaded.tokenizer, loaded.name, loaded.family)
        other.model.model.norm.weight = nn.Parameter(torch.zeros(shape, dtype=dtype))
        prints.append(other.fingerprint()["weights"])
    assert len(set(prints)) == 3


def test_the_fingerprint_changes_with_the_tokenizer(loaded: Loaded) -> None:
    before = loaded.fingerprint()
    loaded.tokenizer.add_tokens(["<new>"])
    after = loaded.fingerprint()
    assert after["tokenizer"] != before["tokenizer"]
    assert after["weights"] == before["weights"]


def refuses(folder: Path | str, *says: str, **keys: Any) -> str:
    """The message with which the folder is refused, when built or when loaded: short, and with `says` in it."""
    with pytest.raises(ValueError, match=r"name=|family") as caught:
        HubModel(name=str(folder), **keys).load(CPU, 0)
    message = str(caught.value)
    assert len(message) < 500
    assert "\n" not in message
    for text in says:
        assert text in message
    return message


def test_a_missing_folder_is_refused() -> None:
    refuses("/nowhere/at/all", "name='/nowhere/at/all' is neither a folder here nor a Hub id")


def test_an_empty_name_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty path is the present folder, even where that holds a model."""
    monkeypatch.chdir(folder)
    refuses("", "name=''")


def test_a_hub_id_that_cannot_be_reached_is_refused_when_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline, and not in the cache. The Hub's client reads the environment once, when imported: long ago, here."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refuses("nobody/no-such-model", "model.name='nobody/no-such-model'", "the Hub's cache", "HF_HUB_OFFLINE is set")


def in_hub_cache(folder: Path, home: Path, name: str) -> Path:
    """A copy of `folder` in the Hub's cache under `home`, in the cache's own layout, as the main revision."""
    repository = home / "hub" / f"models--someone--{name}"
    shutil.copytree(folder, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    return repository / "snapshots" / ("0" * 40)


def test_a_hub_id_is_loaded_from_the_hubs_cache(folder: Path, tmp_path: Path) -> None:
    """Offline. Another revision of the same id is not there; an id that holds only a pickle is not read."""
    in_hub_cache(folder, tmp_path / "home", "llama")
    pickled = in_hub_cache(folder, tmp_path / "home", "pickled")
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    code = (
        "from conftest import CPU\n"
        "from prune_lab.models.load import HubModel\n"
        "for stream in (False, True):\n"
        "    print(HubModel(name='someone/llama', stream=stream).load(CPU, 0).fingerprint()['weights'])\n"
        "for source in (HubModel(name='someone/llama', revision='v2'), HubModel(name='someone/pickled')):\n"
        "    try:\n        print('loaded', source.load(CPU, 0).name)\n"
        "    except ValueError as error:\n        print(error)\n"
    )
    env = os.environ | {"HF_HOME": str(tmp_path / "home"), "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    weights, streamed, other_revision, pickle = done.stdout.strip().splitlines()
    assert weights == streamed == load(folder).fingerprint()["weights"]
    assert other_revision.startswith("model.name='someone/llama'")
    assert pickle.startswith("model.name='someone/pickled'")


def test_a_folder_without_config_is_refused(own: Path) -> None:
    (own / "config.json").unlink()
    refuses(own, str(own), "no config.json")


@pytest.mark.parametrize("text", ['{"model_type": "lla', "", "[1, 2]", '"llama"', "null", "\x00"])
def test_a_broken_config_is_refused(own: Path, text: str) -> None:
    (own / "config.json").write_text(text)
    refuses(own, str(own), "config.json is not a JSON object")


def test_a_config_that_is_not_utf8_is_refused(own: Path) -> None:
    (own / "config.json").write_bytes(b'{"model_type": "\xff"}')
    refuses(own, str(own), "config.json is not a JSON object")


def test_a_config_that_contradicts_itself_is_refused(own: Path) -> None:
    edit_config(own, num_attention_heads=5)
    refuses(own, "model.name=", str(own))


def test_a_config_of_another_shape_than_the_weights_is_refused(own: Path) -> None:
    """Never random weights where those of the file do not fit."""
    edit_config(own, intermediate_size=64)
    refuses(own, "model.name=", str(own))


@pytest.mark.parametrize("family", ["mystery", ""])
def test_a_type_that_transformers_does_not_have_is_refused(own: Path, family: str) -> None:
    edit_config(own, model_type=family)
    refuses(own, f"model family {family!r}", "is not known", "Install a newer transformers", "is not run")


@pytest.mark.parametrize("family", ["olmo2", "bert"])
def test_a_type_that_the_weights_are_not_of_is_refused(own: Path, family: str) -> None:
    edit_config(own, model_type=family)
    refuses(own, "model.name=", "lacks the weights")


@pytest.mark.parametrize("family", ["vit", "clip", "evolla"])
def test_a_type_that_is_no_language_model_is_refused(own: Path, family: str) -> None:
    edit_config(own, model_type=family)
    refuses(own, f"model family {family!r}", "is no language model", "AutoModelForImageTextToText")


def test_a_head_of_no_size_is_one_that_the_config_leaves_open(own: Path) -> None:
    """Latent attention without positions says so (GLM-5); of others transformers says what it makes of it."""
    edit_config(own, head_dim=0)
    check_folder(own, "pretrained")
    edit_config(own, head_dim=-1)
    refuses(own, "head_dim=-1, not a whole number from 0")


@pytest.mark.parametrize("model_type", [None, 3, ["llama"]])
def test_a_model_type_that_is_no_text_is_refused(own: Path, model_type: Any) -> None:
    edit_config(own, model_type=model_type)
    refuses(own, "model family")


def test_family_of_is_refused_with_the_known_ones() -> None:
    with pytest.raises(Refused, match=r"'gpt9' is not described; described are .*llama.*mistral.*qwen2.*qwen3"):
        family_of("gpt9")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "model.pkl"])
def test_a_pickle_is_never_read(own: Path, name: str, tmp_path: Path) -> None:
    """Even torch.load could run code from it: the file is named, and nothing of it runs."""

    class Evil:
        def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
            return Path.touch, (tmp_path / "ran",)

    (own / "model.safetensors").unlink()
    torch.save({"weight": Evil()}, own / name)
    refuses(own, f"only {name}, a pickle", "safetensors")
    assert not (tmp_path / "ran").exists()


def test_a_folder_without_weights_is_refused(own: Path) -> None:
    (own / "model.safetensors").unlink()
    refuses(own, "no weights", "model.weights=random")


def test_a_sharded_checkpoint_with_a_missing_file_is_refused(own: Path, loaded: Loaded) -> None:
    (own / "model.safetensors").unlink()
    loaded.model.save_pretrained(own, max_shard_size="50KB")
    shards = sorted(own.glob("*.safetensors"))
    assert len(shards) > 1
    assert load(own).fingerprint() == loaded.fingerprint()
    shards[1].unlink()
    refuses(own, f"name={str(own)!r} lacks {shards[1].name}", "not complete")


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}'])
def test_a_broken_index_is_refused(own: Path, text: str) -> None:
    (own / "model.safetensors.index.json").write_text(text)
    refuses(own, f"name={str(own)!r}", "model.safetensors.index.json")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(own: Path, value: float) -> None:
    tensors = load_file(own / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(tensors, own / "model.safetensors", metadata={"format": "pt"})
    refuses(own, f"model.name={str(own)!r}", "model.layers.1.mlp.up_proj.weight holds NaN or infinite weights")


@pytest.mark.parametrize("kept", [0, 4, 100, 20_000])
def test_truncated_weights_are_refused(own: Path, kept: int) -> None:
    path = own / "model.safetensors"
    assert path.stat().st_size > 20_000
    path.write_bytes(path.read_bytes()[:kept])
    refuses(own, f"model.name={str(own)!r} cannot be loaded: ")


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.weight", "model.norm.weight"])
def test_a_missing_tensor_is_refused(own: Path, name: str) -> None:
    """Transformers would start it at random and say so in a warning that scrolls by."""
    tensors = load_file(own / "model.safetensors")
    del tensors[name]
    save_file(tensors, own / "model.safetensors", metadata={"format": "pt"})
    refuses(own, f"model.name={str(own)!r} lacks the weights {name}")


def test_a_missing_tokenizer_is_refused(own: Path) -> None:
    for path in own.glob("tokenizer*"):
        path.unlink()
    refuses(own, f"model.name={str(own)!r} cannot be loaded: ")


# As where packages are not installed: argv is their names, a folder.
WITHOUT_PACKAGES = """
import importlib.machinery, sys
hidden, find = sys.argv[1].split(","), importlib.machinery.PathFinder.find_spec
importlib.machinery.PathFinder.find_spec = classmethod(
    lambda cls, name, *rest: None if name in hidden else find(name, *rest)
)
from conftest import CPU
from prune_lab.models.load import HubModel
try:
    print(HubModel(name=sys.argv[2]).load(CPU, 0).tokenizer("the cat sees")["input_ids"])
except ValueError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_tokenizer_that_needs_packages_names_them(own: Path, tmp_path: Path) -> None:
    """tokenizer.model alone, as older Llama folders have it: a real one, trained here; with the packages it is read."""
    import sentencepiece

    (tmp_path / "text.txt").write_text("\n".join(story(seed) for seed in range(20)))
    sentencepiece.SentencePieceTrainer.train(
        input="text.txt", model_prefix="tokenizer", vocab_size=150, model_type="bpe", minloglevel=2
    )
    (own / "tokenizer.json").unlink()
    shutil.move("tokenizer.model", own)
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (own / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **special}))
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    for hidden in ("sentencepiece", "google.protobuf", "nothing"):
        command = [sys.executable, "-c", WITHOUT_PACKAGES, hidden, str(own)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        if hidden == "nothing":
            assert done.stdout.strip() == str(load(own).tokenizer("the cat sees")["input_ids"])
        else:
            assert done.stdout.strip() == (
                f"model.name={str(own)!r} cannot be loaded: its tokenizer is tokenizer.model, which needs packages "
                "that are missing: pip install sentencepiece protobuf"
            )
    (own / "tokenizer.model").write_bytes(b"no model")
    refuses(own, "its tokenizer, tokenizer.model, cannot be read (")


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("__0_0.distcp", "a distributed checkpoint"),
        ("tf_model.h5", "weights of TensorFlow"), ("flax_model.msgpack", "weights of Flax"),
        ("model.onnx", "an ONNX graph"),
    ],
)  # fmt: skip
def test_weights_of_other_kinds_are_named(own: Path, file: str, says: str) -> None:
    (own / "model.safetensors").rename(own / file)
    refuses(own, f"holds only {file}, {says}", "safetensors", "convert it")


def test_weights_under_another_name_are_named(own: Path) -> None:
    (own / "model.safetensors").rename(own / "consolidated.safetensors")
    refuses(own, "neither model.safetensors nor model.safetensors.index.json, only consolidated.safetensors")


def test_wrong_keys_are_refused_with_the_full_key(folder: Path) -> None:
    for weights, says in (("x", "model.weights='x' is not one of pretrained, random"), ("", "model.weights=''")):
        node = OmegaConf.create({"_target_": "prune_lab.models.load.HubModel", "name": str(folder), "weights": weights})
        with pytest.raises(Refused, match=says):
            build(node, "model")


@pytest.mark.parametrize("weights", ["pretrained", "random"])
@pytest.mark.parametrize("model_type", ["llama", "evil"])
def test_code_in_a_folder_is_never_run(own: Path, tmp_path: Path, model_type: str, weights: str) -> None:
    """auto_map points at Python files beside the weights: of a known family they are ignored, else refused."""
    marker = tmp_path / "ran"
    code = (
        f"from pathlib import Path\nPath({str(marker)!r}).touch()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
        "class EvilConfig(LlamaConfig):\n    model_type = 'evil'\n"
        "class EvilModel(LlamaForCausalLM):\n    config_class = EvilConfig\n"
        "class EvilTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    for name in ("configuration_evil", "modeling_evil", "tokenization_evil"):
        (own / f"{name}.py").write_text(code)
    auto_map = {"AutoConfig": "configuration_evil.EvilConfig", "AutoModelForCausalLM": "modeling_evil.EvilModel"}
    edit_config(own, model_type=model_type, auto_map=auto_map)
    tokenizer = json.loads((own / "tokenizer_config.json").read_text())
    tokenizer["auto_map"] = {"AutoTokenizer": [None, "tokenization_evil.EvilTokenizer"]}
    (own / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    if model_type == "llama":
        assert type(load(own, weights=weights).model).__module__.startswith("transformers.")
    else:
        refuses(own, "model family 'evil' (model_type in config.json) is not known", weights=weights)
    assert not marker.exists()
