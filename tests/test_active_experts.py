"""method=active_experts: a lower top k, compared with stock models that were built with it from the start."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CPU, Cli, copied, logits, make_folder, story
from model_types import tiny_folder
from safetensors.torch import load_file
from trainings import interrupted, weights_of
from transformers import AutoConfig, AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from prune_lab.dense_cache import DenseCache
from prune_lab.errors import Refused
from prune_lab.measure.macs import count_macs
from prune_lab.measure.size import active_parameters
from prune_lab.methods.active_experts import ActiveExperts
from prune_lab.models.anatomy import Anatomy
from prune_lab.models.export import save_model
from prune_lab.models.found_units import units_of
from prune_lab.models.load import HubModel, Loaded
from prune_lab.pruning.pruned import Pruned
from prune_lab.recovery.finetune import Finetune
from prune_lab.schedules import Iterative

# By hand: the field of each type's config.json, and how many experts it has in the small models.
FIELDS = {
    "mixtral": "num_experts_per_tok", "qwen3_moe": "num_experts_per_tok", "deepseek_v3": "num_experts_per_tok",
    "dbrx": "ffn_config.moe_top_k", "ernie4_5_moe": "moe_k", "hunyuan_v1_moe": "moe_topk",
    "kimi_linear": "num_experts_per_token", "gpt_oss": "num_experts_per_tok", "jamba": "num_experts_per_tok",
    "granitemoehybrid": "num_experts_per_tok", "nemotron_h": "num_experts_per_tok", "qwen3_next": "num_experts_per_tok",
}  # fmt: skip
GROUPED = {"n_routed_experts": 8, "n_group": 2, "topk_group": 1}


SLOW = (pytest.mark.slow, pytest.mark.process)
FAST = ("mixtral", "gpt_oss", "dbrx", "deepseek_v3", "nemotron_h")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("active")


def folder_of(place: Path, model_type: str, **changes: Any) -> Path:
    folder = place / "_".join([model_type, *map(str, changes.values())])
    changes = GROUPED | changes if model_type == "deepseek_v3" else changes
    return folder if folder.exists() else tiny_folder(folder, model_type, **changes)


def loaded_of(place: Path, model_type: str, **changes: Any) -> Loaded:
    """A small model of a type, to be changed; deepseek-v3's experts in groups."""
    return HubModel(name=str(folder_of(place, model_type, **changes))).load(CPU, seed=0)


def prune(loaded: Loaded, amount: float = 0.5) -> Pruned:
    method = ActiveExperts(amount=amount)
    method.check_model(Anatomy(loaded.model), [amount])
    return method.prune(Anatomy(loaded.model), amount, 0)


def lower(folder: Path, field: str, count: int, place: Path) -> Any:
    """The stock model that is built where config.json says another number, in float32, with weights of its own."""
    config = json.loads((folder / "config.json").read_text())
    *parts, key = field.split(".")
    part = config
    for name in parts:
        part = part[name]
    assert part[key] == 2
    part[key] = count
    place.mkdir()
    (place / "config.json").write_text(json.dumps(config))
    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(place), dtype=torch.float32).eval()


@pytest.mark.parametrize("model_type", [name if name in FAST else pytest.param(name, marks=SLOW) for name in FIELDS])
def test_a_type_with_fewer_active_experts_is_stocks(model_type: str, place: Path, tmp_path: Path) -> None:
    """Equal logits to a model that was built so; no weight changes; the export is stock and says so."""
    loaded = loaded_of(place, model_type)
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    dense = logits(loaded.model)
    pruned = prune(loaded)
    assert (pruned.realized, pruned.rows) == (0.5, [])
    after = loaded.model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    stock = lower(folder_of(place, model_type), FIELDS[model_type], 1, tmp_path / "stock")
    stock.load_state_dict(before, strict=False)
    found = logits(loaded.model)
    torch.testing.assert_close(found, logits(stock), rtol=1e-5, atol=1e-5)
    assert (found - dense).abs().max() > 0.01
    save_model(loaded, tmp_path / "saved")
    said = json.loads((tmp_path / "saved" / "config.json").read_text())
    for name in FIELDS[model_type].split("."):
        said = said[name]
    assert said == 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    torch.testing.assert_close(logits(again), found)


def test_active_parameters_and_work_follow(place: Path) -> None:
    loaded = loaded_of(place, "mixtral", num_experts_per_tok=3)
    model, anatomy = loaded.model, Anatomy(loaded.model)
    of = model.model.layers[0].mlp.experts
    each = of.gate_up_proj[0].numel() + of.down_proj[0].numel()
    total, blocks = model.num_parameters(), len(model.model.layers)
    assert active_parameters(anatomy) == total - blocks * each  # three of four
    macs = count_macs(anatomy, 16).total
    prune(loaded, 2 / 3)
    assert model.num_parameters() == total
    assert active_parameters(Anatomy(model)) == total - 3 * blocks * each
    assert macs - count_macs(Anatomy(model), 16).total == 2 * blocks * each


@pytest.mark.parametrize(
    ("amount", "count"), [(0, 4), (0.1, 4), (0.12, 4), (0.125, 3), (0.25, 3), (0.375, 2), (0.5, 2), (0.7, 1), (0.99, 1)]
)
def test_counts_round_half_up_and_one_stays(amount: float, count: int, place: Path) -> None:
    loaded = loaded_of(place, "qwen3_moe", num_experts_per_tok=4)
    pruned = prune(loaded, amount)
    assert loaded.model.config.num_experts_per_tok == count
    assert pruned.realized == 1 - count / 4
    assert bool(pruned.warnings) == (count < 4)


def test_prunings_in_a_row_are_of_the_dense_models_number(place: Path) -> None:
    loaded = loaded_of(place, "qwen3_moe", num_experts_per_tok=4)
    assert [prune(loaded, amount).realized for amount in (0.25, 0.5, 0.5, 0.75)] == [0.25, 0.5, 0.5, 0.75]
    assert loaded.model.config.num_experts_per_tok == 1
    assert units_of(loaded.model).groups["experts"].count == 4


class InPairs(MixtralConfig):
    """Config of a router that takes as many experts from each of two groups."""

    def __post_init__(self, **keys: Any) -> None:
        super().__post_init__(**keys)
        if self.num_experts_per_tok % 2:
            raise ValueError("num_experts_per_tok must be even")


def test_a_number_that_the_router_cannot_choose_is_refused(place: Path) -> None:
    shape = loaded_of(place, "mixtral", num_experts_per_tok=4).model.config.to_dict()
    torch.manual_seed(0)
    anatomy = Anatomy(MixtralForCausalLM(InPairs(**shape)).eval())
    with pytest.raises(Refused, match=r"amount=0\.25 leaves 3 of 4 .*possible are 2 \(amount=0\.5\), 4 \(amount=0\)"):
        ActiveExperts().check_model(anatomy, [0.25])
    ActiveExperts().prune(anatomy, 0.5, 0)
    assert anatomy.model.config.num_experts_per_tok == 2


@pytest.mark.parametrize(
    ("model_type", "said"),
    [
        ("olmo2", "no experts that a field of its config counts"),
        ("llama4_text", "not called with states, choices and gates"),
        ("phimoe", "no field of its config changes how many experts"),  # its router takes two
        ("zaya", "balancing_biases would change"),
    ],
)
def test_what_cannot_be_done_is_refused(model_type: str, said: str, place: Path) -> None:
    with pytest.raises(Refused, match=rf"^method=active_experts: .*{said}"):
        ActiveExperts().check_model(Anatomy(loaded_of(place, model_type).model), [0.5])


def test_one_expert_of_a_token_stays(place: Path) -> None:
    loaded = loaded_of(place, "mixtral", num_experts_per_tok=1)
    assert prune(loaded, 0.5).realized == 0
    assert loaded.model.config.num_experts_per_tok == 1


def test_a_family_without_experts_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    config: Any = AutoModelForCausalLM.from_pretrained(make_folder(tmp_path, "llama")).config
    with pytest.raises(Refused, match="llama models have no experts"):
        ActiveExperts().check(config, [0.5])


def test_results_of_the_dense_model_are_not_served_for_it(place: Path) -> None:
    """Though it has the same tensors."""
    dense = loaded_of(place, "mixtral")
    cache = DenseCache(dense.model, dense.fingerprint(), CPU)
    other = copied(dense)
    assert Anatomy(other.model, cache).dense_cache is cache
    prune(other)
    assert Anatomy(other.model, cache).dense_cache is None
    assert dense.model.config.num_experts_per_tok == 2


@pytest.mark.parametrize("model_type", ["mixtral", pytest.param("deepseek_v3", marks=SLOW)])
def test_an_interrupted_training_goes_on_with_fewer_active_experts(
    model_type: str, place: Path, tmp_path: Path
) -> None:
    folder = folder_of(place, model_type, num_experts_per_tok=4)
    recipe = Finetune(steps=24, batch_size=2, lr=0.01, checkpoint_every=9, validate_every=0)
    schedule = Iterative(start=0.25, rounds=2)
    for at, saved in ((10, 9), (20, 18)):
        whole, cut, gone_on = interrupted(
            recipe, folder, tmp_path / str(at), at, method=ActiveExperts(amount=0.5), schedule=schedule
        )
        assert cut.saved == saved
        ends = [weights_of(ended.loaded.model) for ended in (whole, gone_on)]
        assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
        assert gone_on.loaded.model.config.num_experts_per_tok == 2
        assert gone_on.training.pruned.realized == whole.training.pruned.realized == 0.5
        assert gone_on.training.pruned.warnings == whole.training.pruned.warnings


def test_the_command_line_lowers_the_top_k(cli: Cli, place: Path, tmp_path: Path) -> None:
    folder = folder_of(place, "mixtral")
    (tmp_path / "text.txt").write_text(story(1, 400))
    words = [
        "model=hf", f"model.name={folder}", "dataset=text", "dataset.path=text.txt", "dataset.seq_len=32",
        "measure=quick", "measure.max_windows=2", "measure.prompt_tokens=16", "measure.decode_tokens=2",
        "measure.pairs=10", "method=active_experts", "export=hf", "tracking=none",
    ]  # fmt: skip
    done = cli(*words, "amount=0.5", "hydra.run.dir=run")
    assert done.returncode == 0, done.stderr
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "export")
    assert again.config.num_experts_per_tok == 1
    dense, kept = load_file(folder / "model.safetensors"), load_file(tmp_path / "run" / "export" / "model.safetensors")
    assert dense.keys() == kept.keys()
    assert all(torch.equal(dense[name], kept[name]) for name in dense)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    figures = summary["metrics"]
    assert (figures["amount/requested"], figures["amount/realized"]) == (0.5, 0.5)
    assert figures["params/reduction"] == figures["params/physical_reduction"] == figures["size/reduction"] == 0
    assert figures["params/active"] < figures["params/dense_active"]
    assert figures["compute/macs_per_token"] < figures["compute/dense_macs_per_token"]
    assert figures["quality/perplexity"] != figures["quality/dense_perplexity"]
    assert figures["latency/prefill_speedup"] > 0
    assert any("no weight is gone" in warning for warning in summary["warnings"])
    assert summary["protocol"]["calibration"] is None
    done = cli(*words, "amount=0.5", "hydra.run.dir=again")
    assert json.loads((tmp_path / "again" / "summary.json").read_text())["reused_from"] is not None, done.stderr
