"""What the files hold and the model does not take, and the other way round: used, named in a note, or refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ALL_FAMILIES, CPU, Cli, logits, make_folder
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from prune_lab.errors import Refused
from prune_lab.export.bitmask import Bitmask
from prune_lab.models.anatomy import Anatomy
from prune_lab.models.blocks import BlockStream
from prune_lab.models.contents import count_nonzero, count_weights
from prune_lab.models.export import check_reload, save_model
from prune_lab.models.foreign import SIGNS, explained
from prune_lab.models.load import HubModel, Loaded
from prune_lab.models.low_bit.compressed_tensors import linear_names, replace_linear
from prune_lab.models.low_bit.scheme import Scheme

Tensors = dict[str, Tensor]
TOKENS = torch.randint(300, (2, 24), generator=torch.Generator().manual_seed(3))
WAYS = ("memory", "stream", "shards", "streamed shards")


def in_turn(of: Iterable[Any]) -> list[Any]:
    """Each of them in one of the ways: how files are read does not hang on what they hold."""
    return [(one, WAYS[number % len(WAYS)]) for number, one in enumerate(of)]


@pytest.fixture
def own(folder: Path, tmp_path: Path) -> Path:
    """A copy of the small Llama's folder, to be changed."""
    return Path(shutil.copytree(folder, tmp_path / "own"))


def change(folder: Path, changed: Callable[[Tensors], Tensors], way: str = "memory") -> Path:
    """Writes other tensors, in one file or, for `way`, in two with an index."""
    stored = load_file(folder / "model.safetensors")
    tensors = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in changed(stored).items()}
    if "shards" not in way:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, of_file in files.items():
        save_file({name: tensors[name] for name in of_file}, folder / file, {"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": {name: file for file in files for name in files[file]}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def edit_config(folder: Path, **changes: Any) -> Path:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value != "gone"}))
    return folder


def load(folder: Path, way: str = "memory") -> Loaded:
    return HubModel(name=str(folder), stream="stream" in way).load(CPU, 0)


def refused(folder: Path, way: str = "memory") -> str:
    with pytest.raises(Refused) as refusal:
        load(folder, way)
    message = str(refusal.value)
    assert message.startswith(f"model.name={str(folder)!r} ")
    assert len(message.replace(str(folder), "x" * 60)) < 400
    return message.removeprefix(f"model.name={str(folder)!r} ")


@torch.no_grad()
def logits_of(loaded: Loaded) -> Tensor:
    """Whether its blocks are in memory or on disk."""
    if not Anatomy(loaded.model).is_on_disk:
        return loaded.model(input_ids=TOKENS, use_cache=False).logits
    stream = BlockStream(Anatomy(loaded.model), TOKENS, len(TOKENS))
    stream.run(lambda _: None)
    with stream.replayed(0):
        return loaded.model(input_ids=TOKENS, use_cache=False).logits


# Tensors that the model does not take.


@pytest.mark.parametrize("way", WAYS)
def test_more_blocks_than_the_config_says_are_refused(own: Path, way: str) -> None:
    change(own, lambda tensors: tensors, way)
    edit_config(own, num_hidden_layers=1, layer_types="gone")
    assert refused(own, way).startswith(
        "holds 1 more blocks (1) than config.json says (num_hidden_layers=1): set it to 2 there"
    )


@pytest.mark.parametrize("family", ["gemma3_text", "phi3", "gpt2", "opt", "gpt_neox"])
def test_of_families_that_name_their_blocks_otherwise(tmp_path: Path, family: str) -> None:
    key = "n_layer" if family == "gpt2" else "num_hidden_layers"
    own = make_folder(tmp_path / family, family, **{key: 4})
    edit_config(own, **{key: 2, "layer_types": "gone"})
    assert refused(own).startswith("holds 2 more blocks (2 to 3) than config.json says (num_hidden_layers=2)")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("family", "way"), [*in_turn(ALL_FAMILIES), *(("llama", way) for way in WAYS[1:])])
def test_nothing_is_said_of_what_save_pretrained_writes(tmp_path: Path, family: str, tied: bool, way: str) -> None:
    own = make_folder(tmp_path / family, family, tie_word_embeddings=tied)
    loaded = load(change(own, lambda tensors: tensors, way), way)
    assert loaded.warnings == []
    stock = AutoModelForCausalLM.from_pretrained(own, dtype=torch.float32).eval()
    torch.testing.assert_close(logits_of(loaded), stock(input_ids=TOKENS, use_cache=False).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "way"),
    in_turn([
        "model.layers.0.self_attn.q_proj.bias", "model.layers.1.mlp.down_proj.bias",  # attention_bias, mlp_bias not set
        "model.layers.0.self_attn.q_norm.weight",  # those of a Qwen 3
        "model.norm.bias", "lm_head.bias",
    ]),
)  # fmt: skip
def test_what_changes_what_the_model_computes_is_refused(own: Path, name: str, way: str) -> None:
    change(own, lambda tensors: tensors | {name: torch.ones(32)}, way)
    assert refused(own, way).startswith(f"holds 1 tensor that the model of config.json has no place for ({name})")


def test_biases_of_all_blocks_are_counted(own: Path) -> None:
    def with_biases(tensors: Tensors) -> Tensors:
        biases = {n.replace("weight", "bias"): w[:, 0] for n, w in tensors.items() if n.endswith("_proj.weight")}
        return tensors | biases

    change(own, with_biases)
    assert refused(own).startswith("holds 14 tensors that the model of config.json has no place for (model.layers.0.")
    edit_config(own, attention_bias=True, mlp_bias=True)
    assert load(own).warnings == []


ONES = torch.ones(3, 32)
BESIDE: dict[str, tuple[Tensors, str]] = {
    "a classification head": (
        {"score.weight": ONES}, "1 of the 21 tensors of the checkpoint are not used: score.weight"
    ),
    "a value head": (
        {"v_head.summary.weight": ONES, "v_head.summary.bias": torch.ones(3)},
        "2 of the 22 tensors of the checkpoint are not used: v_head.summary.",
    ),
    "a block that predicts further tokens": (
        {f"model.layers.2.{name}": ONES for name in ("eh_proj.weight", "enorm.weight", "mlp.up_proj.weight")},
        "3 of the 23 tensors of the checkpoint are not used: model.layers.*.",
    ),
    "another such part": (
        {f"mtp.layers.{index}.weight": ONES for index in range(4)},
        "4 of the 24 tensors of the checkpoint are not used: mtp.layers.*.weight (4 times)",
    ),
    "zero biases": (
        {f"model.layers.{index}.self_attn.o_proj.bias": torch.zeros(32) for index in range(2)},
        "2 of the 22 tensors of the checkpoint are not used: model.layers.*.self_attn.o_proj.bias (2 times) (biases",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "way"), in_turn(BESIDE))
def test_what_stands_beside_the_model_is_named(folder: Path, own: Path, kind: str, way: str) -> None:
    extra, says = BESIDE[kind]
    change(own, lambda tensors: tensors | {name: tensor.clone() for name, tensor in extra.items()}, way)
    loaded = load(own, way)
    assert len(loaded.warnings) == 1
    assert loaded.warnings[0].startswith(says)
    assert torch.equal(logits_of(loaded), logits_of(load(folder, way)))


@pytest.mark.parametrize("way", ["shards", "stream"])
@pytest.mark.parametrize(
    ("family", "extra"),
    [
        ("llama", {f"model.layers.{index}.self_attn.rotary_emb.inv_freq": torch.ones(4) for index in range(2)}),
        ("llama", {"model.rotary_emb.inv_freq": torch.ones(4)}),
        ("gpt2", {"transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8), "transformer.h.0.attn.masked_bias": ONES[0, 0]}),
        ("gpt_neox", {"gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 8, 8).bool()}),
        ("gpt_neox", {"gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9)}),
        ("opt", {"model.decoder.version": torch.tensor([3.0])}),
    ],
)
def test_buffers_are_not_spoken_of(tmp_path: Path, family: str, extra: Tensors, way: str) -> None:
    own = make_folder(tmp_path / family, family)
    change(own, lambda tensors: tensors | {name: tensor.clone() for name, tensor in extra.items()}, way)
    assert load(own, way).warnings == []


@pytest.mark.parametrize("way", WAYS)
def test_names_without_the_base_models_prefix_are_looked_through_too(tmp_path: Path, way: str) -> None:
    """As GPT-2's first checkpoints have them."""
    own = make_folder(tmp_path / "gpt2", "gpt2", n_layer=3)

    def short(tensors: Tensors) -> Tensors:
        return {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}

    change(own, lambda tensors: short(tensors) | {"h.0.attn.bias": torch.ones(1, 1, 8, 8), "cls.weight": ONES}, way)
    assert load(own, way).warnings[0].startswith("1 of the 42 tensors of the checkpoint are not used: cls.weight")
    edit_config(own, n_layer=2)
    assert refused(own, way).startswith("holds 1 more blocks (2) than config.json says")


def test_exports_of_post_compression_are_looked_through_too(own: Path, tmp_path: Path) -> None:
    loaded = load(own)
    for name in linear_names(loaded.model):
        if name != "lm_head":
            weight = loaded.model.get_submodule(name).weight
            replace_linear(loaded.model, name, Scheme(8, "int", True), torch.float32).store(weight)
    loaded.model.config.quantization_config = Scheme(8, "int", True).to_config(["lm_head"])
    save_model(loaded, tmp_path / "low")
    assert load(tmp_path / "low").warnings == []
    change(tmp_path / "low", lambda tensors: tensors | {"score.weight": ONES.clone()})
    assert "not used: score.weight" in load(tmp_path / "low").warnings[0]
    edit_config(tmp_path / "low", num_hidden_layers=1, layer_types="gone")
    assert refused(tmp_path / "low").startswith("holds 1 more blocks")


def test_bitmask_folders_are_looked_through_too(own: Path, tmp_path: Path) -> None:
    loaded = load(own)
    with torch.no_grad():
        for _, linear in Anatomy(loaded.model).linears():
            linear.weight[:, ::2] = 0
    (tmp_path / "bits").mkdir()
    Bitmask().write(loaded, tmp_path / "bits")
    again = load(tmp_path / "bits")
    assert again.warnings == []
    assert torch.equal(logits(again.model), logits(loaded.model))
    edit_config(tmp_path / "bits", num_hidden_layers=1, layer_types="gone")
    assert refused(tmp_path / "bits").startswith("holds 1 more blocks")


def test_a_run_says_it(own: Path, cli: Cli, small: list[str], tmp_path: Path) -> None:
    change(own, lambda tensors: tensors | {"score.weight": ONES.clone()})
    run = [*small, f"model.name={own}", "measure=quality_only", "tracking=none", "hydra.run.dir=run"]
    done = cli(*run)
    assert done.returncode == 0, done.stderr
    says = "1 of the 21 tensors of the checkpoint are not used: score.weight"
    assert any(
        note.startswith(says) for note in json.loads((tmp_path / "run" / "summary.json").read_text())["warnings"]
    )
    assert says in " ".join(done.stdout.split())


# A head of its own, and none.


def with_head(tensors: Tensors) -> Tensors:
    return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].flip(0) * 1.5}


@pytest.mark.parametrize("way", WAYS)
def test_a_head_of_its_own_is_the_models_whatever_the_config_says(folder: Path, own: Path, way: str) -> None:
    change(own, with_head, way)
    loaded = load(own, way)
    assert "config.json says that the head is the embedding" in loaded.warnings[0]
    assert loaded.model.config.tie_word_embeddings is False
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    stock.config.tie_word_embeddings = False
    stock.lm_head.weight = torch.nn.Parameter(with_head(dict(stock.state_dict()))["lm_head.weight"])
    assert torch.equal(logits_of(loaded), stock(input_ids=TOKENS, use_cache=False).logits)
    assert count_weights(loaded.model) == count_weights(load(folder).model) + 300 * 32
    assert count_nonzero(loaded.model) == sum(
        int(tensor.count_nonzero()) for file in own.glob("*.safetensors") for tensor in load_file(file).values()
    )


def test_it_is_exported_as_what_it_is(own: Path, cli: Cli, small: list[str], tmp_path: Path) -> None:
    """By the command line, streamed and in memory: the same figures, and a config that does not say tied."""
    change(own, with_head)
    run = [*small, f"model.name={own}", "measure=quality_only", "tracking=none", "export=hf", "resume=false"]
    found = []
    for place, stream in (("memory", "false"), ("disk", "true")):
        done = cli(*run, f"model.stream={stream}", f"hydra.run.dir={place}")
        assert done.returncode == 0, done.stderr
        found.append(json.loads((tmp_path / place / "summary.json").read_text()))
        export = tmp_path / place / "export"
        assert json.loads((export / "config.json").read_text())["tie_word_embeddings"] is False
        tensors = load_file(export / "model.safetensors")
        assert torch.equal(tensors["lm_head.weight"], load_file(own / "model.safetensors")["lm_head.weight"])
        assert any("tie_word_embeddings=false" in note for note in found[-1]["warnings"])
        assert load(export).warnings == []
    quality = [{key: value for key, value in of["metrics"].items() if "time/" not in key} for of in found]
    assert quality[0] == quality[1]


@pytest.mark.parametrize(
    ("way", "dtype"), [*((way, torch.float32) for way in WAYS), ("memory", torch.float64), ("stream", torch.float64)]
)
def test_an_equal_copy_stays_tied(folder: Path, own: Path, way: str, dtype: torch.dtype) -> None:
    """Also one of another type."""
    change(own, lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].to(dtype)}, way)
    loaded = load(own, way)
    assert (loaded.warnings, loaded.model.config.tie_word_embeddings) == ([], True)
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
    assert count_weights(loaded.model) == count_weights(load(folder).model)


@pytest.mark.parametrize("way", WAYS)
def test_a_tied_matrix_may_be_stored_as_the_head_alone(folder: Path, own: Path, way: str) -> None:
    def as_head(tensors: Tensors) -> Tensors:
        return {name.replace("model.embed_tokens", "lm_head"): tensor for name, tensor in tensors.items()}

    change(own, as_head, way)
    assert torch.equal(logits_of(load(own, way)), logits_of(load(folder, way)))


@pytest.mark.parametrize("way", WAYS)
def test_a_missing_head_says_what_it_may_be(own: Path, way: str) -> None:
    change(own, lambda tensors: tensors, way)
    edit_config(own, tie_word_embeddings=False)
    assert refused(own, way).startswith(
        "lacks the weights lm_head.weight, and config.json does not tie the head to the embedding: set "
        "tie_word_embeddings=true there"
    )


def test_a_classifier_without_a_head_is_named(own: Path) -> None:
    change(own, lambda tensors: tensors | {"score.weight": ONES.clone()})
    edit_config(own, tie_word_embeddings=False)
    assert refused(own).endswith("it holds score.weight")


# What a checkpoint is, where it is not one of a dense model.


def renamed(prefix: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()}


def linears_as(**parts: Tensor | None) -> Callable[[Tensors], Tensors]:
    """Each Linear as these parts of its name; None stands for its weight."""

    def made(tensors: Tensors) -> Tensors:
        found: Tensors = {}
        for name, tensor in tensors.items():
            stem = name.removesuffix(".weight")
            new = {f"{stem}.{part.replace('__', '.')}": tensor if v is None else v.clone() for part, v in parts.items()}
            found |= new if name.endswith("_proj.weight") else {name: tensor}
        return found

    return made


INT, FLOAT = torch.zeros(4, 4, dtype=torch.int32), torch.zeros(4, 4)
FOREIGN: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "compiled": (renamed("_orig_mod."), "torch.compile"),
    "a compiled block": (lambda t: {n.replace("layers.1.", "layers.1._orig_mod."): v for n, v in t.items()},
                         "torch.compile"),
    "DDP": (renamed("module."), "DistributedDataParallel"),
    "FSDP": (renamed("_fsdp_wrapped_module."), "FSDP"),
    "FSDP, block by block": (
        lambda t: {n.replace("layers.0.", "layers.0._fsdp_wrapped_module."): v for n, v in t.items()}, "FSDP"
    ),
    "checkpointing": (lambda t: {n.replace("mlp.", "_checkpoint_wrapped_module.mlp."): v for n, v in t.items()},
                      "activation checkpointing"),
    "PEFT": (renamed("base_model.model."), "PEFT's wrapper"),
    "LoRA": (linears_as(base_layer__weight=None, lora_A__default__weight=FLOAT, lora_B__default__weight=FLOAT),
             "not merged; merge it"),
    "LoRA in PEFT": (lambda t: renamed("base_model.model.")(linears_as(weight=None, lora_A__weight=FLOAT)(t)),
                     "not merged; merge it"),
    "LoRA beside whole weights": (linears_as(weight=None, lora_A__weight=FLOAT, lora_B__weight=FLOAT), "not merged"),
    "GPTQ": (linears_as(qweight=INT, qzeros=INT, scales=FLOAT, g_idx=INT[0]), "quantized (GPTQ)"),
    "AWQ": (linears_as(qweight=INT, qzeros=INT, scales=FLOAT), "quantized (GPTQ or AWQ)"),
    "bitsandbytes": (linears_as(weight=INT.to(torch.uint8), weight__absmax=FLOAT, weight__quant_map=FLOAT),
                     "bitsandbytes"),
    "bitsandbytes, 8 bits": (linears_as(weight=INT.to(torch.int8), SCB=FLOAT), "bitsandbytes"),
    "compressed-tensors": (linears_as(weight_packed=INT, weight_scale=FLOAT, weight_shape=INT[0]),
                           "compressed-tensors"),
    "sparse": (linears_as(bitmask=INT.to(torch.uint8), compressed=FLOAT[0], shape=INT[0]), "compressed"),
    "fp8": (linears_as(weight=None, weight_scale_inv=FLOAT), "has no quantization_config"),
    "MLX": (linears_as(weight=INT, scales=FLOAT, biases=FLOAT), "MLX"),
    "masks": (linears_as(weight_orig=None, weight_mask=FLOAT), "prune.remove"),
    "GGUF": (lambda t: {"token_embd.weight": FLOAT, "blk.0.attn_q.weight": FLOAT.clone()}, "GGUF"),
    "Meta": (lambda t: {"tok_embeddings.weight": FLOAT, "layers.0.attention.wq.weight": FLOAT.clone()}, "original"),
    "Lightning": (renamed("student.net."), "names that begin with 'student.net.'"),
    "a part of another": (lambda t: renamed("language_model.")(t) | {"vision_tower.x.weight": FLOAT},
                          "names that begin with 'language_model.'"),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "way"), [*in_turn(FOREIGN), *(("PEFT", way) for way in WAYS)])
def test_what_a_folder_is_is_said(own: Path, kind: str, way: str) -> None:
    changed, says = FOREIGN[kind]
    change(own, changed, way)
    message = refused(own, way)
    assert says in message
    assert "download" not in message


def test_no_sign_is_a_name_of_a_model(tmp_path: Path) -> None:
    """Of any family, dense: no name of theirs is explained as something else; and each sign is found by some name."""
    for family in ALL_FAMILIES:
        names = AutoModelForCausalLM.from_pretrained(make_folder(tmp_path / family, family)).state_dict()
        assert explained(list(names)) is None
    assert len({sign.pattern for sign in SIGNS}) == len(SIGNS)


def test_what_is_missing_without_a_sign_is_an_incomplete_download(own: Path) -> None:
    change(own, lambda tensors: {name: tensor for name, tensor in tensors.items() if "layers.0.mlp" not in name})
    assert refused(own).startswith("lacks the weights model.layers.0.mlp.")
    assert refused(own).endswith("the download is not complete; fetch it again")


def test_fewer_blocks_than_the_config_says_are_refused(own: Path) -> None:
    edit_config(own, num_hidden_layers=3, layer_types="gone")
    assert "it holds 2 blocks, and config.json says num_hidden_layers=3" in refused(own)


def test_names_of_another_architecture_are_shown(own: Path) -> None:
    change(own, lambda tensors: {name.replace("mlp.", "ffn."): tensor for name, tensor in tensors.items()})
    message = refused(own)
    assert message.startswith("lacks the weights model.layers.0.mlp.")
    assert "it holds model.layers.0.ffn." in message


def test_a_transposed_matrix_is_called_so(own: Path) -> None:
    """As those of a model that keeps its weights as (in, out)."""
    name = "model.layers.0.mlp.up_proj.weight"
    change(own, lambda tensors: tensors | {name: tensors[name].T})
    assert f"{name} is stored as torch.float32 of shape [32, 48] (transposed)" in refused(own)


# An index, and a config, with more or less in them than transformers expects.


@pytest.mark.parametrize("way", ["shards", "streamed shards"])
@pytest.mark.parametrize("metadata", ["gone", None])
def test_an_index_without_metadata_is_read(folder: Path, own: Path, way: str, metadata: str | None) -> None:
    change(own, lambda tensors: tensors, way)
    path = own / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["metadata"]
    path.write_text(json.dumps(index if metadata == "gone" else index | {"metadata": metadata}))
    before = path.read_bytes()
    assert torch.equal(logits_of(load(own, way)), logits_of(load(folder, way)))
    assert path.read_bytes() == before


DENSE: dict[str, dict[str, Any]] = {
    "no groups": {"config_groups": {}, "format": "dense", "ignore": [], "quant_method": "compressed-tensors"},
    "2:4": {"config_groups": {}, "format": "dense", "quant_method": "compressed-tensors",
            "sparsity_config": {"format": "dense", "sparsity_structure": "2:4", "global_sparsity": 0.5}},
    "sparsity alone": {"quant_method": "compressed-tensors", "sparsity_config": {"format": "dense"}},
    "nothing": {},
}  # fmt: skip


@pytest.mark.parametrize("way", ["memory", "stream"])
@pytest.mark.parametrize("kind", DENSE)
def test_what_says_that_nothing_is_compressed_is_dense(folder: Path, own: Path, kind: str, way: str) -> None:
    edit_config(own, quantization_config=DENSE[kind], compression_config={"sparsity_config": {"format": "dense"}})
    loaded = load(own, way)
    assert not loaded.is_low_bit
    assert torch.equal(logits_of(loaded), logits_of(load(folder, way)))
    if way == "memory":
        save_model(loaded, own / "export")
        check_reload(loaded.model, own / "export", TOKENS[:1])
        config = json.loads((own / "export" / "config.json").read_text())
        assert not {"quantization_config", "compression_config"} & set(config)


@pytest.mark.parametrize(
    "stored",
    [
        {"config_groups": {"a": {}}, "format": "dense", "quant_method": "compressed-tensors"},
        {"config_groups": {}, "format": "dense", "quant_method": "compressed-tensors",
         "sparsity_config": {"format": "sparse-24-bitmask"}},
        {"config_groups": {}, "format": "dense", "quant_method": "compressed-tensors", "kv_cache_scheme": {"bits": 8}},
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
    ],
)  # fmt: skip
def test_what_says_that_something_is_compressed_is_not(own: Path, stored: dict[str, Any]) -> None:
    edit_config(own, quantization_config=stored)
    with pytest.raises(Refused, match=f"quantized already .*{stored['quant_method']}"):
        load(own)
