"""model.stream=true: the same figures and the same files, with one block in memory at a time."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ALL_FAMILIES, CPU, ROOT, make_folder
from model_types import tiny_folder
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

from prune_lab import __main__ as program
from prune_lab import compatibility
from prune_lab.config.parts import Parts, Settings
from prune_lab.errors import Refused
from prune_lab.export.bitmask import Bitmask
from prune_lab.export.hf import HuggingFace
from prune_lab.measure.macs import count_macs
from prune_lab.measure.perplexity import measure_beside
from prune_lab.measure.settings import Measure
from prune_lab.measure.size import measure_size
from prune_lab.methods.base import Method
from prune_lab.methods.depth import Depth
from prune_lab.methods.experts import SCORES, Experts
from prune_lab.methods.magnitude import Magnitude
from prune_lab.methods.none import NoPruning
from prune_lab.methods.random import Random
from prune_lab.methods.ria import Ria
from prune_lab.methods.sparsegpt import SparseGPT
from prune_lab.methods.structured import Structured
from prune_lab.methods.unstructured import Unstructured
from prune_lab.methods.wanda import Wanda
from prune_lab.models.anatomy import Anatomy
from prune_lab.models.export import check_reload, save_model
from prune_lab.models.found import layout_of
from prune_lab.models.load import HubModel, Loaded
from prune_lab.models.offload import states
from prune_lab.models.offload.on_disk import own_copy
from prune_lab.models.offload.prefetch import Prefetch
from prune_lab.models.shards import lay_out, open_shards
from prune_lab.post.none import NoPost
from prune_lab.post.quantize import Int8WeightOnly
from prune_lab.pruning.calibration import Calibrator
from prune_lab.recovery.finetune import Finetune
from prune_lab.recovery.none import NoRecovery
from prune_lab.schedules import OneShot
from prune_lab.system.console import Console
from prune_lab.system.device import Device

WINDOWS = torch.randint(1, 300, (5, 24), generator=torch.Generator().manual_seed(7))
BF16 = Device(torch.device("cpu"), torch.bfloat16)
TURNS = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 6, "num_hidden_layers": 4}
CHANGES: dict[str, dict[str, Any]] = {"gemma2": TURNS, "gemma3_text": TURNS}  # their blocks attend in two ways


class Folders(dict[str, Path]):
    """A small model of each family, and those whose head is their own; each is made when first asked for."""

    def __init__(self, place: Path) -> None:
        super().__init__()
        self.place = place

    def __missing__(self, name: str) -> Path:
        family = name.partition(" ")[2] or ("llama" if name == "untied" else name)
        changes = {"tie_word_embeddings": False} if name.startswith("untied") else CHANGES.get(name, {})
        self[name] = make_folder(self.place / name, family, **changes)
        return self[name]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Made for this module."""
    return Folders(tmp_path_factory.mktemp("streamed"))


def compressed(folder: Path, method: Method, place: Path, stream: bool, propagate: str, device: Device) -> Any:
    """Prunes, measures and saves a model as a run does; its figures, what was removed, and where it was saved."""
    dense = HubModel(name=str(folder), stream=stream).load(device, seed=0)
    loaded = Loaded(own_copy(dense.model, place / "weights"), dense.tokenizer, dense.name, dense.family)
    calibrator = Calibrator(WINDOWS, propagate, batch_size=2) if method.calibrated else None
    pruned = method.prune(Anatomy(loaded.model), method.amount, 0, calibrator)
    quiet = Console(quiet=True)
    quality = []
    for model in (dense.model, loaded.model):
        losses, divergence = measure_beside(model, dense.model, 3, WINDOWS, 2, device, quiet)
        quality.append((losses.tolist(), divergence))
    save_model(loaded, place / "export")
    check_reload(loaded.model, place / "export", WINDOWS[:1])
    size, macs = (
        measure_size(loaded.model, HuggingFace().files(place / "export")),
        count_macs(Anatomy(loaded.model), 16),
    )
    hashes = dense.fingerprint(), loaded.fingerprint()
    said = pruned.rows, pruned.warnings, pruned.files, pruned.metrics
    return (quality, size, macs, said, hashes, dense.describe()), place / "export"


def check_alike(folder: Path, place: Path, method: Method, propagate: str = "pruned", device: Device = CPU) -> None:
    """Streamed and in memory: equal figures, equal files, byte for byte."""
    here, saved_here = compressed(folder, method, place / "memory", False, propagate, device)
    there, saved_there = compressed(folder, method, place / "disk", True, propagate, device)
    assert here == there
    files = sorted(path.name for path in saved_here.iterdir())
    assert files == sorted(path.name for path in saved_there.iterdir())
    for name in files:
        assert (saved_here / name).read_bytes() == (saved_there / name).read_bytes(), name


@pytest.mark.parametrize("family", [*ALL_FAMILIES, "untied", "untied gpt2", "untied gpt_neox"])
def test_every_family_streams_to_the_same_files(folders: Folders, tmp_path: Path, family: str) -> None:
    check_alike(folders[family], tmp_path, Wanda(amount=0.5))


def test_a_head_under_the_models_own_name_for_it_is_saved_alike(folders: Folders, tmp_path: Path) -> None:
    """The files of GPT-NeoX call it embed_out, the model lm_head; it may be stored as either."""
    own = Path(shutil.copytree(folders["untied gpt_neox"], tmp_path / "own"))
    tensors = load_file(own / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("embed_out.weight")
    save_file(tensors, own / "model.safetensors", {"format": "pt"})
    check_alike(own, tmp_path, Wanda(amount=0.5))
    assert "embed_out.weight" in load_file(tmp_path / "disk" / "export" / "model.safetensors")


@pytest.mark.parametrize(
    ("method", "propagate"),
    [
        (Magnitude(amount=0.4), "pruned"),
        (Magnitude(amount=0.5, pattern="2:4"), "pruned"),
        (Random(amount=0.5), "pruned"),
        (Wanda(amount=0.5), "dense"),
        (Wanda(amount=0.5, allocation="owl"), "pruned"),
        (Ria(amount=0.5), "pruned"),
        (SparseGPT(amount=0.5), "pruned"),
        (SparseGPT(amount=0.5), "dense"),
        (NoPruning(), "pruned"),
    ],
    ids=str,
)
def test_every_streamed_method_gives_the_same_files(
    folders: Folders, tmp_path: Path, method: Method, propagate: str
) -> None:
    check_alike(folders["qwen2"], tmp_path, method, propagate)


# Experts that lie one by one in files, fused there, with biases, in every block or in some, beside shared ones, behind
# routers with corrections that are parameters or buffers.
MIXTURES = [
    "deepseek_v3", "qwen3_moe", "olmoe", "gpt_oss", "dbrx", "ernie4_5_moe", "qwen2_moe", "granitemoehybrid", "jamba",
    "lfm2_moe", "phimoe", "nemotron_h", "minimax_m2", "granitemoe", "glm4_moe",
]  # fmt: skip
# Some of them, recurrences, other norms, scaled logits, a wrapper of text and images, a tied head before all else, and
# experts that cannot be removed.
OTHERS = [
    "gpt_oss", "dbrx", "qwen3_next", "lfm2", "mamba2", "nemotron_h", "olmo2", "gemma3", "granite", "camembert",
    "longcat_flash", "llama4_text",
]  # fmt: skip
OF_WEIGHTS = [
    Magnitude(amount=0.5, pattern="2:4"), SparseGPT(amount=0.5), Ria(amount=0.5), NoPruning(),
    Wanda(amount=0.5, allocation="owl"), Wanda(amount=0.5, refit="inputs"),
    Unstructured(score="moe_pruner", amount=0.5),
]  # fmt: skip
FOUND: list[tuple[str, Method]] = [
    *(("mixtral", Experts(amount=0.5, score=score)) for score in SCORES if score != "reap"),
    *((model_type, Experts(amount=0.5)) for model_type in MIXTURES),
    *(("mixtral", method) for method in OF_WEIGHTS),
    *((model_type, Wanda(amount=0.5)) for model_type in OTHERS),
]
SLOW = (pytest.mark.slow, pytest.mark.process)


@pytest.mark.parametrize(
    ("model_type", "method"),
    [
        ("mixtral", Experts(amount=0.5)), ("mixtral", Wanda(amount=0.5)), ("mamba", Wanda(amount=0.5)),
        *(pytest.param(*of, marks=SLOW) for of in FOUND),
    ],
    ids=str,
)  # fmt: skip
def test_every_type_whose_layout_is_found_streams_to_the_same_files(
    model_type: str, method: Method, tmp_path: Path
) -> None:
    check_alike(tiny_folder(tmp_path / "model", model_type), tmp_path, method)


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize("method", [Experts(amount=0.5), Wanda(amount=0.5)], ids=str)
def test_a_mixture_in_half_precision_streams_to_the_same_files(method: Method, tmp_path: Path) -> None:
    check_alike(tiny_folder(tmp_path / "model", "mixtral"), tmp_path, method, device=BF16)


def test_two_prunings_in_a_row_of_a_streamed_mixture(tmp_path: Path) -> None:
    """Single weights, then experts twice: what was changed before is there still, and the layout is what is found."""
    folder, saved = tiny_folder(tmp_path / "model", "mixtral"), list[Path]()
    for stream in (False, True):
        place = tmp_path / str(stream)
        dense = HubModel(name=str(folder), stream=stream).load(CPU, seed=0)
        loaded = Loaded(own_copy(dense.model, place / "weights"), dense.tokenizer, dense.name, dense.family)
        anatomy, calibrator = Anatomy(loaded.model), Calibrator(WINDOWS, batch_size=2)
        Magnitude(amount=0.3).prune(anatomy, 0.3, 0)
        for amount in (0.25, 0.5):
            pruned = Experts(amount=amount).prune(anatomy, amount, 0, calibrator)
        assert pruned.realized == pytest.approx(0.5)
        save_model(loaded, place / "export")
        check_reload(loaded.model, place / "export", WINDOWS[:1])
        saved.append(place / "export" / "model.safetensors")
    assert saved[0].read_bytes() == saved[1].read_bytes()
    own = list((tmp_path / "True" / "weights").rglob("*.safetensors"))
    assert len(own) == 1  # those of the larger models are gone
    kept, anew = layout_of(loaded.model), layout_of(AutoModelForCausalLM.from_pretrained(saved[1].parent).eval())
    assert [[m.name for m in of] for of in kept.matrices] == [[m.name for m in of] for of in anew.matrices]
    for matrix, wanted in zip(chain(*kept.matrices), chain(*anew.matrices), strict=True):
        assert (matrix.place, matrix.active) == (wanted.place, pytest.approx(wanted.active))
    assert kept.share == pytest.approx(anew.share)


def test_a_mixture_runs_as_a_whole_from_disk(tmp_path: Path) -> None:
    """Each block is read when it is called, and gone afterwards, whatever ends the call."""
    folder = tiny_folder(tmp_path / "model", "mixtral")
    streamed, whole = (HubModel(name=str(folder), stream=stream).load(CPU, seed=0).model for stream in (True, False))
    with torch.no_grad():
        assert torch.equal(streamed(input_ids=WINDOWS[:2]).logits, whole(input_ids=WINDOWS[:2]).logits)
    hook = streamed.model.layers[1].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        streamed(input_ids=WINDOWS[:2])
    hook.remove()
    assert all(tensor.is_meta for tensor in streamed.model.layers.parameters())
    with torch.no_grad():
        assert torch.equal(streamed(input_ids=WINDOWS[:2]).logits, whole(input_ids=WINDOWS[:2]).logits)


@pytest.mark.parametrize(
    ("model_type", "said"),
    [
        ("falcon", "called one by one, do not give its states"),
        pytest.param("zamba2", "is shared with another block", marks=SLOW),
    ],
)
def test_blocks_that_cannot_be_read_one_by_one_are_refused(model_type: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=f"^model.stream=true: .*{model_type}.*{said}.*give model.stream=false"):
        HubModel(name=str(tiny_folder(tmp_path, model_type)), stream=True).load(CPU, seed=0)


def test_states_in_a_file_and_half_precision_change_nothing(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three batches of states one fits into memory here."""
    monkeypatch.setattr(states, "IN_MEMORY", 2 * 24 * 32 * 2)
    check_alike(folders["untied"], tmp_path, Wanda(amount=0.5), device=BF16)
    assert not list((tmp_path / "cache").iterdir())  # the file has no name and goes with the states


def test_shards_and_names_without_the_prefix_are_read(folders: Folders, tmp_path: Path) -> None:
    """As Hub repositories have them: several files and an index; GPT-2's tensors without `transformer.`."""
    stock = AutoModelForCausalLM.from_pretrained(folders["gpt2"])
    stock.save_pretrained(tmp_path / "stock", max_shard_size="20KB")
    index = json.loads((tmp_path / "stock" / "model.safetensors.index.json").read_text())
    short = {name: name.removeprefix("transformer.") for name in index["weight_map"]}
    for file in (tmp_path / "stock").glob("*.safetensors"):
        save_file({short[name]: tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    index["weight_map"] = {short[name]: file for name, file in index["weight_map"].items()}
    (tmp_path / "stock" / "model.safetensors.index.json").write_text(json.dumps(index))
    for file in folders["gpt2"].glob("tokenizer*"):
        (tmp_path / "stock" / file.name).write_bytes(file.read_bytes())
    check_alike(tmp_path / "stock", tmp_path, Magnitude(amount=0.5))


def test_files_are_laid_out_as_the_library_does(tmp_path: Path) -> None:
    """Several shards of tensors of two types, and the index, byte for byte; the room is there before the content."""
    config = LlamaConfig(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    config.tie_word_embeddings = True
    stock = AutoModelForCausalLM.from_config(config)
    stock.model.norm.bfloat16()
    stock.save_pretrained(tmp_path / "stock", max_shard_size="20KB")
    (tmp_path / "ours").mkdir()
    kept = {name: tensor for name, tensor in stock.state_dict().items() if name != "lm_head.weight"}
    shards = lay_out(tmp_path / "ours", {name: tensor.to("meta") for name, tensor in kept.items()}, "20KB")
    files = sorted(path.name for path in (tmp_path / "stock").glob("model*"))
    assert [(tmp_path / "ours" / name).stat().st_size for name in files] == [
        (tmp_path / "stock" / name).stat().st_size for name in files
    ]
    for name, tensor in kept.items():
        shards.write(name, tensor)
    assert len(files) > 2
    for name in files:
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "stock" / name).read_bytes()
    again = open_shards(tmp_path / "stock")
    assert all(torch.equal(again.read(name), tensor) for name, tensor in kept.items())


def test_a_block_is_there_only_while_it_is_at_hand(folders: Folders, tmp_path: Path) -> None:
    loaded = HubModel(name=str(folders["gemma2"]), stream=True).load(CPU, seed=0)
    before = {path: path.read_bytes() for path in folders["gemma2"].iterdir()}
    copied = Anatomy(own_copy(loaded.model, tmp_path / "own"))
    with copied.at_hand(1), torch.no_grad():
        there = [not next(block.parameters()).is_meta for block in copied.blocks]
        assert there == [False, True, False, False]
        copied.blocks[1].mlp.up_proj.weight.zero_()
    assert all(tensor.is_meta for block in copied.blocks for tensor in block.parameters())
    for model, is_zero in ((copied.model, True), (loaded.model, False)):
        anatomy = Anatomy(model)
        with anatomy.at_hand(1):
            assert bool((anatomy.blocks[1].mlp.up_proj.weight == 0).all()) is is_zero
    with pytest.raises(AssertionError, match="dense model was changed"), Anatomy(loaded.model).at_hand(0):
        Anatomy(loaded.model).blocks[0].mlp.up_proj.weight.detach().zero_()
    assert {path: path.read_bytes() for path in folders["gemma2"].iterdir()} == before


def test_what_is_fetched_ahead_is_what_was_asked_for() -> None:
    """As on a GPU, but for its stream; what is on its way for another block is let go."""
    ahead, zero, one = Prefetch(CPU.torch_device), {"w": torch.zeros(2)}, {"w": torch.ones(2)}
    ahead.start("blocks.1", lambda: one)
    assert ahead.take("blocks.1", lambda: zero) is one
    ahead.start("blocks.1", lambda: one)
    assert ahead.take("blocks.0", lambda: zero) is zero
    assert ahead.take("blocks.1", lambda: zero) is zero


@pytest.mark.parametrize("method", ["wanda", "experts"])
def test_a_streamed_run_is_the_run_in_memory(method: str, tmp_path: Path, folders: Folders, corpus: Path) -> None:
    """By the command line: equal metrics and exports; so one is served for the other; nothing else is left."""
    folder = tmp_path / "model"
    if method == "wanda":
        shutil.copytree(folders["untied"], folder)
    else:
        tiny_folder(folder, "mixtral")
    (folder / "generation_config.json").unlink()  # then config.json says what it would
    shared = [
        "model=hf", f"model.name={folder}", "dataset=text", f"dataset.path={corpus}", "dataset.seq_len=32",
        "measure=quality_only", "measure.max_windows=8", "measure.batch_size=3", f"method={method}",
        "dataset.calibration.n_samples=20",
        "tracking=none", "quiet=true", "export=hf",
    ]  # fmt: skip
    for name, stream in (("disk", "true"), ("memory", "false")):
        run = [f"model.stream={stream}", f"hydra.run.dir={tmp_path / name}", "resume=false"]
        assert program._run([*shared, *run]) == 0
    disk, memory = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("disk", "memory"))
    assert disk["fingerprint"] == memory["fingerprint"]
    assert disk["protocol"] == memory["protocol"]
    here, there = (
        {key: value for key, value in of["metrics"].items() if not key.startswith("time/")} for of in (disk, memory)
    )
    assert here == there
    assert here["params/nonzero"] < here["params/dense_total"]
    assert ("routing/same_experts" in here) == (method == "experts")
    names = sorted(path.name for path in (tmp_path / "disk" / "export").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "memory" / "export").iterdir())
    for name in set(names) - {"README.md"}:  # the card has the command and the times
        assert len({(tmp_path / run / "export" / name).read_bytes() for run in ("disk", "memory")}) == 1, name
    left = {path.name for path in (tmp_path / "disk").iterdir()}
    assert left == {path.name for path in (tmp_path / "memory").iterdir()}


@pytest.mark.slow
def test_the_next_run_removes_the_weights_of_a_killed_one(folder: Path, corpus: Path, tmp_path: Path) -> None:
    """As large as the model, in a folder that no later run uses: each run has one of its own."""
    words = [
        "model=hf", f"model.name={folder}", "model.stream=true", "dataset=text", f"dataset.path={corpus}", "quiet=true",
        "dataset.seq_len=32", "measure=quality_only", "method=magnitude", "amount=0.5", "tracking=none",
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    killed = subprocess.Popen([sys.executable, "-m", "prune_lab", *words], cwd=tmp_path, env=environment)
    weights = list[Path]()
    while not weights and killed.poll() is None:
        weights = list(tmp_path.glob("outputs/*/*/.weights*"))
        time.sleep(0.001)
    killed.kill()
    killed.wait()
    assert weights
    assert weights[0].exists()
    subprocess.run([sys.executable, "-m", "prune_lab", *words], cwd=tmp_path, env=environment, check=True)
    assert not list(tmp_path.glob("outputs/*/*/.weights*"))


# What it refuses.


def parts(folder: Path, **changes: Any) -> Parts:
    chosen: dict[str, Any] = {
        "method": Wanda(), "recovery": NoRecovery(), "post": NoPost(), "export": HuggingFace(),
        "measure": Measure(latency=False, memory=False, generation_prompts=0),
    }  # fmt: skip
    model = HubModel(name=str(folder), stream=True)
    return Parts(Settings(), model, dataset=None, schedule=OneShot(), tracking=None, **{**chosen, **changes})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"recovery": Finetune()}, "training needs the whole model in memory; give recovery=none"),
        ({"post": Int8WeightOnly()}, "post-compression works on a model in memory; give post=none"),
        ({"export": Bitmask()}, "export=bitmask is made of a model in memory; give export=hf or export=none"),
        ({"measure": Measure(memory=False)}, "cannot be timed; give measure=quality_only"),
        ({"measure": Measure(latency=False)}, "give measure.memory=false"),
        ({"measure": Measure(latency=False, memory=False, tasks=("piqa",))}, "give measure.tasks=[]"),
        ({"measure": Measure(latency=False, memory=False)}, "give measure.generation_prompts=0"),
        ({"method": Structured()}, "give a method for single weights"),
        ({"method": Depth()}, "give a method for single weights"),
        ({"method": Depth(refit="residual")}, "give a method for single weights"),
        ({"method": Magnitude(scope="global")}, "one ranking over all blocks"),
        ({"method": Wanda(allocation="sensitivity")}, "give uniform or owl"),
        ({"method": Unstructured(score="taylor")}, "gradients of the whole model"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_needs_a_whole_model_is_refused(folder: Path, changes: dict[str, Any], reason: str) -> None:
    compatibility.check_parts(parts(folder), {})
    with pytest.raises(Refused) as refusal:
        compatibility.check_parts(parts(folder, **changes), {"export": "bitmask"})
    assert str(refusal.value).startswith("model.stream=true: ")
    assert reason in str(refusal.value)


def test_random_weights_are_on_no_disk(folder: Path) -> None:
    with pytest.raises(ValueError, match="weights=random has none there"):
        HubModel(name=str(folder), stream=True, weights="random")


def damaged(folder: Path, place: Path, change: Any) -> str:
    """What is said of a copy of the folder with other tensors."""
    place.mkdir()
    for file in folder.iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    tensors = load_file(place / "model.safetensors")
    change(tensors)
    save_file(tensors, place / "model.safetensors", {"format": "pt"})
    with pytest.raises(Refused) as refusal:
        HubModel(name=str(place), stream=True).load(CPU, seed=0)
    return str(refusal.value)


def test_checkpoints_that_do_not_fit_are_refused(folder: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    assert "lacks the weights model.layers.1.mlp.up_proj.weight: the download is not complete" in damaged(
        folder, tmp_path / "missing", lambda tensors: tensors.pop(name)
    )
    assert "is stored as torch.int8" in damaged(
        folder, tmp_path / "int8", lambda tensors: tensors.update({name: tensors[name].to(torch.int8)})
    )
    assert "is stored as torch.float32 of shape [48, 31]" in damaged(
        folder, tmp_path / "shape", lambda tensors: tensors.update({name: tensors[name][:, 1:].contiguous()})
    )
    assert "holds NaN or infinite weights" in damaged(
        folder, tmp_path / "nan", lambda tensors: tensors[name].fill_(float("nan"))
    )


def test_a_file_that_is_cut_off_is_refused(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(Refused, match="cut off or damaged"):
        HubModel(name=str(tmp_path), stream=True).load(CPU, seed=0)


# Memory.

MEASURED = """
import sys
import time
from pathlib import Path
import torch
from prune_lab.system.console import Console
from prune_lab.system.device import Device
from prune_lab.system.resident import peak, reset_peak
from prune_lab.measure.perplexity import measure_losses
from prune_lab.methods.experts import Experts
from prune_lab.methods.wanda import Wanda
from prune_lab.models.anatomy import Anatomy
from prune_lab.models.load import HubModel
from prune_lab.models.offload.on_disk import own_copy
from prune_lab.pruning.calibration import Calibrator

device = Device(torch.device("cpu"), torch.float32)
HubModel(name=sys.argv[2]).load(device, 0)  # a small one brings in the code and the thread pool
before = peak()
reset_peak()
dense = HubModel(name=sys.argv[1], stream=True).load(device, 0)
copied = own_copy(dense.model, Path(sys.argv[3]))
windows = torch.randint(1, 300, (4, 32))
(Wanda if sys.argv[4] == "wanda" else Experts)().prune(Anatomy(copied), 0.5, 0, Calibrator(windows))
measure_losses(copied, windows, 2, device, Console(quiet=True))
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["wanda", "experts"])
def test_memory_does_not_grow_with_the_number_of_blocks(folder: Path, tmp_path: Path, method: str) -> None:
    """A model of 24 blocks of 17 MB each, pruned and evaluated in a fresh process: 403 MB, of which 17 at a time."""
    config: Any = LlamaConfig(
        vocab_size=300, hidden_size=512, intermediate_size=2048, num_hidden_layers=24, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=128,
    )  # fmt: skip
    if method == "experts":
        folder = tiny_folder(tmp_path / "small", "mixtral")
        config = MixtralConfig(
            vocab_size=300, hidden_size=256, intermediate_size=688, num_hidden_layers=24, num_attention_heads=4,
            num_key_value_heads=4, num_local_experts=8, max_position_embeddings=128,
        )  # fmt: skip
    large = tmp_path / "large"
    AutoModelForCausalLM.from_config(config).save_pretrained(large)
    for file in folder.glob("tokenizer*"):
        (large / file.name).write_bytes(file.read_bytes())
    command = [sys.executable, "-c", MEASURED, large, folder, tmp_path / "own", method]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 120e6
    assert (large / "model.safetensors").stat().st_size > 400e6
