"""Quantized models: every family, their exports here and in stock software, and whole runs by command line."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ALL_FAMILIES, CPU, Cli, make_folder
from safetensors.torch import load_file, save_file
from torch import Tensor

from prune_lab.errors import Refused
from prune_lab.models.anatomy import Anatomy, out_in
from prune_lab.models.export import check_reload, save_model
from prune_lab.models.load import HubModel, Loaded
from prune_lab.models.low_bit.linears import LowBitLinear
from prune_lab.models.low_bit.quantize_model import quantize
from prune_lab.models.low_bit.scheme import Scheme
from prune_lab.post.quantize import Int4WeightOnly, Int8Dynamic, Int8WeightOnly
from prune_lab.system.device import Device

TOKENS = torch.randint(300, (1, 24), generator=torch.Generator().manual_seed(2))
POSTS = {
    "int8_dynamic": Int8Dynamic(), "int8_weight_only": Int8WeightOnly(), "int4_weight_only": Int4WeightOnly(16)
}  # fmt: skip
NEAR = {"int8_dynamic": 0.04, "int8_weight_only": 0.025, "int4_weight_only": 0.3}  # of dense logits, by norm
FP8 = Scheme(bits=8, type="float", dynamic=True)
DOWN = "model.layers.0.mlp.down_proj"


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=TOKENS, use_cache=False).logits


def load(folder: Path) -> Loaded:
    return HubModel(name=str(folder)).load(CPU, seed=0)


def rounded(values: Tensor, largest: int) -> Tensor:
    """Values along the last dimension rounded to integers up to `largest`, times their step."""
    step = values.abs().amax(-1, keepdim=True) / largest
    step[step == 0] = 1
    return (values / step).round() * step


def imitate(model: Any, post: str) -> None:
    """Makes a dense model compute what a quantized one should, in floats: rounded weights and, where so, inputs."""
    for _, linear in Anatomy(model).linears():
        weight = out_in(linear, linear.weight.data)
        if post == "int4_weight_only":
            new = rounded(weight.unflatten(1, (-1, 16)), 7).flatten(1)
        else:
            new = rounded(weight, 127)
        weight.copy_(new)
        if post == "int8_dynamic":
            linear.register_forward_pre_hook(lambda module, inputs: (rounded(inputs[0], 127),))


@pytest.mark.parametrize(
    ("family", "post"), [*zip(ALL_FAMILIES, itertools.cycle(POSTS)), *(("gpt2", post) for post in list(POSTS)[1:])]
)
def test_every_family(tmp_path: Path, family: str, post: str) -> None:
    """Pruned, quantized, saved and loaded: what a model with rounded weights computes, and zeros stay."""
    loaded = load(make_folder(tmp_path / "dense", family))
    for _, linear in Anatomy(loaded.model).linears():
        linear.weight.data[torch.rand(linear.weight.shape, generator=torch.Generator().manual_seed(3)) < 0.3] = 0
    was, before = logits(loaded.model), {k: v.clone() for k, v in loaded.model.state_dict().items()}
    dense = {name: out_in(linear, linear.weight.data.clone()) for name, linear in Anatomy(loaded.model).linears()}
    POSTS[post].compress(Anatomy(loaded.model))

    changed = {name for name, module in loaded.model.named_modules() if isinstance(module, LowBitLinear)}
    assert changed == set(dense)
    for name, tensor in loaded.model.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        if owner not in changed or leaf == "bias":
            assert torch.equal(tensor, before[name]), name
    for name, weight in dense.items():
        layer = loaded.model.get_submodule(name)
        assert bool((layer.codes()[weight == 0] == 0).all())
        assert (layer.bias is not None) == (f"{name}.bias" in before)

    now = logits(loaded.model)
    assert float((now - was).norm() / was.norm()) < NEAR[post]
    save_model(Loaded(loaded.model, loaded.tokenizer, "x", family), tmp_path / "export")
    check_reload(loaded.model, tmp_path / "export", TOKENS)
    assert torch.equal(logits(load(tmp_path / "export").model), now)

    imitation = load(tmp_path / "dense").model
    for name, linear in Anatomy(imitation).linears():
        out_in(linear, linear.weight.data).copy_(dense[name])
    imitate(imitation, post)
    # a value just between two integers may fall to either side; a wrong step or layer moves all logits
    assert float((logits(imitation) - now).norm() / now.norm()) < (5e-3 if post == "int8_dynamic" else 1e-5)


def export(folder: Path, place: Path, scheme: Scheme) -> Any:
    """A quantized model, also saved in `place`."""
    loaded = load(folder)
    quantize(Anatomy(loaded.model), scheme)
    save_model(loaded, place)
    return loaded.model


@pytest.mark.parametrize("scheme", [Scheme(8), Scheme(4, group_size=16), FP8], ids=["int8", "int4", "fp8"])
def test_an_export_is_saved_again_as_it_was(folder: Path, tmp_path: Path, scheme: Scheme) -> None:
    """Layout by name, type and shape; an export of the export is the same, and so is one in several files."""
    model = export(folder, tmp_path / "export", scheme)
    stored = load_file(tmp_path / "export" / "model.safetensors")
    parts = {name.rpartition(".")[2]: t for name, t in stored.items() if name.startswith(DOWN)}
    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in parts.items()}
    if scheme.bits == 4:
        assert found == {
            "weight_packed": (torch.int32, (32, 6)),
            "weight_scale": (torch.float32, (32, 3)),
            "weight_shape": (torch.int64, (2,)),
        }
    else:
        kind = torch.int8 if scheme.type == "int" else torch.float8_e4m3fn
        assert found == {"weight": (kind, (32, 48)), "weight_scale": (torch.float32, (32, 1))}
    check_reload(model, tmp_path / "export", TOKENS)
    again = load(tmp_path / "export")
    assert again.is_low_bit
    save_model(again, tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "export" / name).read_bytes()
    again.tokenizer.save_pretrained(tmp_path / "shards")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert torch.equal(logits(load(tmp_path / "shards").model), logits(model))


def test_an_export_can_be_loaded_in_another_number_type(folder: Path, tmp_path: Path) -> None:
    model = export(folder, tmp_path / "export", Scheme(8))
    half = HubModel(name=str(tmp_path / "export")).load(Device(CPU.torch_device, torch.bfloat16), seed=0).model
    assert torch.equal(half.get_submodule(DOWN).weight, model.get_submodule(DOWN).weight)
    assert float((logits(half) - logits(model)).norm() / logits(model).norm()) < 0.03


def rewrite(folder: Path, name: str, tensor: Tensor | None) -> None:
    """Puts another tensor in an export, or takes one out."""
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors | ({} if tensor is None else {name: tensor}), folder / "model.safetensors", {"format": "pt"})


def test_a_corrupted_scale_does_not_pass(folder: Path, tmp_path: Path) -> None:
    model = export(folder, tmp_path / "export", Scheme(8, dynamic=True))
    scale = model.get_submodule(DOWN).weight_scale.clone()
    scale[5] *= 1.5
    rewrite(tmp_path / "export", f"{DOWN}.weight_scale", scale)
    with pytest.raises(RuntimeError, match="does not reload: its logits differ by"):
        check_reload(model, tmp_path / "export", TOKENS)


@pytest.mark.parametrize("part", ["weight_packed", "weight_scale", "weight_shape"])
def test_an_export_that_lacks_a_part_is_refused(folder: Path, tmp_path: Path, part: str) -> None:
    export(folder, tmp_path / "export", Scheme(4, group_size=16))
    rewrite(tmp_path / "export", f"{DOWN}.{part}", None)
    with pytest.raises(Refused, match=rf"lacks the weights {DOWN}\.{part}: the download is not complete"):
        load(tmp_path / "export")


def test_steps_without_their_config_are_refused(folder: Path, tmp_path: Path) -> None:
    """Codes read as floats would be a model, and a wrong one."""
    export(folder, tmp_path / "export", Scheme(8))
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "export" / "config.json").write_text(json.dumps(config))
    with pytest.raises(Refused, match=r"holds .*weight_scale, but its config\.json has no quantization_config"):
        load(tmp_path / "export")


def test_random_weights_of_a_low_bit_config_are_dense(folder: Path, tmp_path: Path) -> None:
    export(folder, tmp_path / "export", Scheme(8))
    loaded = HubModel(name=str(tmp_path / "export"), weights="random").load(CPU, seed=0)
    save_model(loaded, tmp_path / "again")
    assert not loaded.is_low_bit
    assert "quantization_config" not in json.loads((tmp_path / "again" / "config.json").read_text())


def test_gpt2_says_that_others_cannot_load_it(tmp_path: Path) -> None:
    """Stock software reads low-bit layouts of Linears only: of a Conv1D it makes garbage."""
    loaded = load(make_folder(tmp_path / "gpt2", "gpt2"))
    (note,) = Int8Dynamic().compress(Anatomy(loaded.model))
    assert "only prune_lab can load the export" in note
    assert "Conv1Ds" in note


# A process without prune_lab: argv are the tokens and exports; beside each go its logits, loaded plainly and with the
# weights expanded, and one of these.
STOCK = f"""
import sys
sys.modules["prune_lab"] = None
import torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

for folder in sys.argv[2:]:
    found = []
    for how in ({{}}, {{"quantization_config": CompressedTensorsConfig(run_compressed=False)}}):
        model = AutoModelForCausalLM.from_pretrained(folder, **how).eval()
        with torch.no_grad():
            found.append(model(input_ids=torch.load(sys.argv[1]), use_cache=False).logits)
    torch.save([*found, dict(model.named_parameters())["{DOWN}.weight"].data], folder + ".out")
try:
    import prune_lab
except ImportError:
    print("without prune_lab")
"""
SCHEMES = {
    "int8": Scheme(8), "int8_dynamic": Scheme(8, dynamic=True), "int4": Scheme(4, group_size=16), "fp8": FP8
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEMES)
def test_the_reader_of_compressed_tensors_itself_opens_an_export(name: str, folder: Path, tmp_path: Path) -> None:
    """Config and tensors of each Linear, without transformers: its weights are ours, and it writes what we wrote."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    model = export(folder, tmp_path / "export", SCHEMES[name])
    config = json.loads((tmp_path / "export" / "config.json").read_text())["quantization_config"]
    scheme = QuantizationConfig.model_validate(config).config_groups["group_0"]
    tensors = load_file(tmp_path / "export" / "model.safetensors")
    reader, linears = BaseCompressor.get_value_from_registry(scheme.format), 0
    for linear, module in model.named_modules():
        if not isinstance(module, LowBitLinear):
            continue
        linears += 1
        stored = {
            key.removeprefix(f"{linear}."): tensor for key, tensor in tensors.items() if key.startswith(f"{linear}.")
        }
        weight = reader.decompress(dict(stored), scheme)["weight"]
        assert torch.equal(weight.float(), module.expand().float()), linear
        again = reader.compress({"weight": weight, "weight_scale": stored["weight_scale"]}, scheme)
        for key, tensor in stored.items():
            assert torch.equal(again[key].view(torch.uint8), tensor.view(torch.uint8)), (linear, key)
    assert linears == 14


def test_stock_software_loads_an_export(tmp_path: Path) -> None:
    """Transformers with compressed-tensors, in a process without prune_lab: the same weights, the same logits."""
    models = dict[str, Any]()
    for family in ("llama", "qwen2", "phi3"):
        dense = make_folder(tmp_path / "dense" / family, family)
        models |= {f"{family}_{kind}": export(dense, tmp_path / f"{family}_{kind}", s) for kind, s in SCHEMES.items()}
    torch.save(TOKENS, tmp_path / "tokens")
    command = [sys.executable, "-I", "-c", STOCK, *(str(tmp_path / name) for name in ("tokens", *models))]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "without prune_lab" in done.stdout
    for name, model in models.items():
        kind = name.partition("_")[2]
        plain, expanded, weight = torch.load(tmp_path / f"{name}.out")
        assert torch.equal(weight, model.get_submodule(DOWN).expand()), name
        ours = logits(model)
        if kind == "int8_dynamic":  # plainly it rounds inputs by a step of its own, and expanded not at all
            assert float((expanded - ours).norm() / ours.norm()) < 0.03, name
        else:
            assert float((expanded - ours).abs().max()) <= 1e-5 * float(ours.abs().max()), name
        if kind in ("int8", "int4"):
            assert torch.equal(plain, expanded), name
        else:
            assert float((plain - ours).norm() / ours.norm()) < (0.03 if kind == "int8_dynamic" else 0.15), name


def summary_of(done: subprocess.CompletedProcess[str], tmp_path: Path) -> tuple[dict[str, Any], Path]:
    """The summary of the newest run and its folder."""
    assert done.returncode == 0, done.stderr
    path = max((tmp_path / "outputs").rglob("summary.json"), key=lambda path: path.stat().st_mtime_ns)
    return json.loads(path.read_text()), path.parent


def test_a_whole_run(cli: Cli, small: list[str], tmp_path: Path) -> None:
    """Pruned and quantized, against pruned alone: counts, bytes, card, config; and the export is measured again."""
    args = [*small, "tracking=none", "method=structured", "amount=0.25", "export=hf"]
    cut, _ = summary_of(cli(*args), tmp_path)
    low, place = summary_of(cli(*args, "post=int8_dynamic"), tmp_path)
    ours, others = low["metrics"], cut["metrics"]
    assert low["fingerprint"] != cut["fingerprint"]
    assert ours["params/total"] == others["params/total"] < ours["params/dense_total"]
    assert ours["size/disk_mb"] * 1e6 == (place / "export" / "model.safetensors").stat().st_size
    assert ours["size/reduction"] > others["size/reduction"] > 0
    assert ours["quality/perplexity"] == pytest.approx(others["quality/perplexity"], rel=0.02)
    card = (place / "export" / "README.md").read_text()
    assert "post int8_dynamic" in card
    assert "Loads with: prune_lab, or stock transformers with the package compressed-tensors" in card
    config = (place / "export" / "config.json").read_text()
    assert "prune_lab" not in config
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False, "strategy": "channel"}
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}
    assert json.loads(config)["quantization_config"] == {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": inputs,
                "format": "int-quantized",
            }
        },
        "ignore": ["lm_head"],
    }
    measured = [*small, "tracking=none", f"model.name={place / 'export'}", "method=none"]
    again, place = summary_of(cli(*measured, "export=hf"), tmp_path)
    assert again["metrics"]["quality/perplexity"] == ours["quality/perplexity"]
    assert again["metrics"]["params/dense_total"] == ours["params/total"]
    assert "Loads with: prune_lab, or stock transformers with the" in (place / "export" / "README.md").read_text()
    for override in ("method=magnitude", "post=int8_dynamic", "recovery=finetune"):
        refused = cli(*measured, override)
        assert refused.returncode == 2
        assert "has quantized weights already" in one_line(refused)
    refused = cli(*measured, "export=bitmask")
    assert refused.returncode == 2
    assert "export=bitmask cannot hold quantized weights, which model.name=" in one_line(refused)
    assert "give export=hf or export=none" in one_line(refused)


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that a refusal says."""
    assert done.stderr.startswith("prune_lab: "), done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["post=int4_weight_only", "post.group_size=7"], "group_size=7 must be a multiple of 8"),
        (["post=fp8"], "post=fp8 needs a GPU that multiplies 8-bit floats"),
        (["post=sparse_2_4"], "post=sparse_2_4 needs a GPU with 2:4 kernels"),
    ],
)
def test_what_cannot_work_is_refused_before_the_model_is_read(
    cli: Cli, small: list[str], folder: Path, tmp_path: Path, overrides: list[str], message: str
) -> None:
    """Reading this model would be the first thing to fail."""
    shutil.copytree(folder, tmp_path / "damaged")
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"")
    args = [*small, f"model.name={tmp_path / 'damaged'}", "tracking=none", "device=cpu", "method=none"]
    done = cli(*args, *overrides)
    assert done.returncode == 2
    assert message in one_line(done)


def test_a_group_that_does_not_divide_names_the_layer(cli: Cli, small: list[str]) -> None:
    done = cli(*small, "tracking=none", "method=none", "post=int4_weight_only", "post.group_size=32")
    assert done.returncode == 2
    assert f"post.group_size=32 does not divide the 48 inputs of {DOWN}" in one_line(done)


def quantized_by(config: dict[str, Any], folder: Path, place: Path) -> Path:
    """A copy of `folder` whose config.json says so."""
    shutil.copytree(folder, place)
    stored = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(stored | {"quantization_config": config}))
    return place


def test_a_model_that_others_quantized_is_refused(cli: Cli, small: list[str], folder: Path, tmp_path: Path) -> None:
    foreign = quantized_by({"quant_method": "gptq", "bits": 4}, folder, tmp_path / "foreign")
    done = cli(*small, "tracking=none", f"model.name={foreign}", "method=none")
    assert done.returncode == 2
    assert "the model is quantized already (quant_method 'gptq'" in one_line(done)


@pytest.mark.parametrize(
    ("group", "values"),
    [("weights", {"num_bits": 8}), ("weights", {"symmetric": False}), ("input_activations", {"num_bits": 8})],
)
def test_what_is_not_computed_here_is_refused(folder: Path, tmp_path: Path, group: str, values: dict[str, Any]) -> None:
    """The library's layout holds more than is read: 8 bits in groups, zero points, 4-bit weights and 8-bit inputs."""
    config = Scheme(4, group_size=16).to_config(["lm_head"])
    part = config["config_groups"]["group_0"]
    part[group] = (part[group] or {}) | values
    with pytest.raises(Refused, match=r"the model is quantized already .*'pack-quantized'"):
        load(quantized_by(config, folder, tmp_path / "foreign"))


def test_a_sweep_over_post_options(cli: Cli, small: list[str], tmp_path: Path) -> None:
    """A job's quantization does not leak into the next one's dense model, and every option is a run of its own."""
    done = cli(*small, "tracking=none", "method=none", "post=int8_weight_only,int8_dynamic,none", "-m")
    assert done.returncode == 0, done.stderr
    found = [json.loads(path.read_text()) for path in sorted((tmp_path / "multirun").rglob("*/summary.json"))]
    low = [one for one in found if one["status"] == "FINISHED"][-3:]
    assert len({one["fingerprint"] for one in low}) == 3
    assert len({one["metrics"]["quality/dense_perplexity"] for one in low}) == 1
    plain = next(one for one in low if one["choices"]["post"] == "none")["metrics"]
    assert plain["quality/perplexity"] == plain["quality/dense_perplexity"]
