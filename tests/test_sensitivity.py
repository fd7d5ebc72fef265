"""method=sensitivity measures what pruning one block alone would cost, removes nothing, and leaves three files."""

from __future__ import annotations

import copy
import json
import math
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CPU, Cli, make_folder
from test_families import HEAD_DIM, HIDDEN, MLP
from torch import Tensor
from warm import give_store

from prune_lab.methods.sensitivity import PARTS, Sensitivity
from prune_lab.models.anatomy import Anatomy
from prune_lab.models.load import HubModel
from prune_lab.pruning.calibration import Calibrator
from prune_lab.pruning.pruned import Pruned

FILES = ("sensitivity.json", "sensitivity.md", "sensitivity.png")
MEASURED = 32  # windows, however many are looked at
WINDOWS = torch.randint(1, 300, (MEASURED + 3, 12), generator=torch.Generator().manual_seed(4))
AMOUNTS = (0.25, 0.75)
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Small models in float32; to be copied, never changed."""
    place = tmp_path_factory.mktemp("sensitivity")
    families = ("llama", "gemma2", "gpt2", "opt", "phi3")
    return {
        family: HubModel(name=str(make_folder(place / family, family))).load(CPU, seed=0).model for family in families
    }


def scan(model: Any, **keys: Any) -> Pruned:
    method = Sensitivity(**{"amounts": AMOUNTS, **keys})
    return method.prune(Anatomy(model), method.amount, 0, Calibrator(WINDOWS))


def table_of(pruned: Pruned) -> dict[str, Any]:
    return json.loads(pruned.files["sensitivity.json"])


@torch.no_grad()
def naive_loss(model: Any) -> float:
    losses = [
        float(model(input_ids=window[None], labels=window[None], use_cache=False).loss) for window in WINDOWS[:MEASURED]
    ]
    return sum(losses) / MEASURED


@torch.no_grad()
def norms_of_inputs(model: Any) -> dict[str, Tensor]:
    """L2 norm of each input of each Linear over all windows, in one stock forward pass."""
    found: dict[str, Tensor] = {}
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            hook = lambda _, args, name=name: found.update({name: args[0].flatten(0, 1).norm(dim=0)})  # noqa: E731
            hooks.append(module.register_forward_pre_hook(hook))
    model(input_ids=WINDOWS, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


def lowest(values: Tensor, amount: float) -> list[int]:
    numbers = values.flatten().tolist()
    return sorted(range(len(numbers)), key=lambda i: (numbers[i], i))[: math.floor(len(numbers) * amount + 0.5)]


# What a Llama's block loses by hand, by |W| * ||X||; a unit is worth what its reader's weights are.


def lose_weights(block: Any, norms: dict[str, Tensor], amount: float) -> None:
    for name, linear in block.named_modules():
        if isinstance(linear, torch.nn.Linear):
            linear.weight.view(-1)[lowest(linear.weight.abs() * norms[name], amount)] = 0


def lose_channels(block: Any, norms: dict[str, Tensor], amount: float) -> None:
    mlp = block.mlp
    gone = lowest((mlp.down_proj.weight.abs() * norms["mlp.down_proj"]).sum(0), amount)
    assert len(gone) == round(MLP * amount)
    mlp.gate_proj.weight[gone], mlp.up_proj.weight[gone], mlp.down_proj.weight[:, gone] = 0, 0, 0


def lose_groups(block: Any, norms: dict[str, Tensor], amount: float) -> None:
    attention, per_group = block.self_attn, 2 * HEAD_DIM
    worth = (attention.o_proj.weight.abs() * norms["self_attn.o_proj"]).sum(0).view(-1, per_group).sum(1)
    assert len(worth) == HIDDEN // per_group
    for group in lowest(worth, amount):
        queries = slice(group * per_group, (group + 1) * per_group)
        one = slice(group * HEAD_DIM, (group + 1) * HEAD_DIM)
        attention.q_proj.weight[queries], attention.o_proj.weight[:, queries] = 0, 0
        attention.k_proj.weight[one], attention.v_proj.weight[one] = 0, 0


def lose_everything(block: Any, norms: dict[str, Tensor], amount: float) -> None:
    """A block that adds nothing to the states is as good as not there."""
    block.self_attn.o_proj.weight[:], block.mlp.down_proj.weight[:] = 0, 0


BY_HAND: dict[str, Callable[[Any, dict[str, Tensor], float], None]] = {
    "weights": lose_weights,
    "mlp": lose_channels,
    "heads": lose_groups,
    "block": lose_everything,
}


@pytest.mark.parametrize("part", PARTS)
@torch.no_grad()
def test_ratios_are_those_of_a_copy_pruned_by_hand(models: dict[str, Any], part: str) -> None:
    dense = models["llama"]
    table, norms = table_of(scan(copy.deepcopy(dense), parts=(part,))), norms_of_inputs(dense)
    amounts = [1.0] if part == "block" else list(AMOUNTS)
    assert table["columns"] == (["block"] if part == "block" else [f"{part} {a:g}" for a in AMOUNTS])
    assert table["windows"] == MEASURED
    assert table["dense_perplexity"] == pytest.approx(math.exp(naive_loss(dense)), rel=1e-5)
    for index, ratios in enumerate(table["blocks"]):
        expected = []
        for amount in amounts:
            pruned, prefix = copy.deepcopy(dense), f"model.layers.{index}."
            of_block = {name.removeprefix(prefix): value for name, value in norms.items() if name.startswith(prefix)}
            BY_HAND[part](pruned.model.layers[index], of_block, amount)
            expected.append(math.exp(naive_loss(pruned) - naive_loss(dense)))
        assert ratios == pytest.approx(expected, rel=1e-4)
        assert max(abs(math.log(ratio)) for ratio in ratios) > 1e-3  # it does something


UNTOUCHED = [(family, "wanda") for family in ("llama", "gemma2", "gpt2", "opt", "phi3")]
UNTOUCHED += [("gpt2", "taylor"), ("opt", "taylor2"), ("llama", "random")]


@pytest.mark.parametrize(("family", "score"), UNTOUCHED)
def test_the_model_is_bit_identical_afterwards(models: dict[str, Any], family: str, score: str) -> None:
    """Weights, biases, config, hooks, and nothing to hold at zero."""
    model = copy.deepcopy(models[family])
    config = model.config.to_dict()
    pruned = scan(model, score=score, amounts=(0.5,))
    after = model.state_dict()
    for name, value in models[family].state_dict().items():
        assert torch.equal(after[name], value), name
    assert model.config.to_dict() == config
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert pruned.masks.keep == {}
    assert pruned.rows == []
    assert pruned.realized == 0
    assert all(math.isfinite(ratio) for of_block in table_of(pruned)["blocks"] for ratio in of_block)


def test_a_scan_says_the_same_twice(models: dict[str, Any]) -> None:
    """Of one seed, random scores too."""
    model = copy.deepcopy(models["llama"])
    first, second = (scan(model, score="random") for _ in range(2))
    assert first.files == second.files


def check_files(files: dict[str, bytes], blocks: int, columns: int) -> dict[str, Any]:
    """JSON, table and picture, of as many blocks and columns; returns the JSON."""
    table = json.loads(files["sensitivity.json"])
    assert len(table["columns"]) == columns
    assert [len(of_block) for of_block in table["blocks"]] == [columns] * blocks
    lines = files["sensitivity.md"].decode().splitlines()
    assert len(lines) == 2 + blocks
    assert [cell.strip() for cell in lines[0].strip("|").split("|")] == ["block", *table["columns"]]
    for index, (line, of_block) in enumerate(zip(lines[2:], table["blocks"], strict=True)):
        cells = [float(cell) for cell in line.strip("|").split("|")]
        assert cells[0] == index
        assert cells[1:] == pytest.approx(of_block, rel=1e-3)
    picture = files["sensitivity.png"]
    assert picture.startswith(PNG)
    assert picture.rstrip(b"\n").endswith(b"IEND\xaeB`\x82")
    width, height = (int.from_bytes(picture[place : place + 4], "big") for place in (16, 20))
    assert min(width, height) > 100
    return table


def test_three_files_say_it(models: dict[str, Any]) -> None:
    pruned = scan(copy.deepcopy(models["llama"]))
    assert tuple(pruned.files) == FILES
    table = check_files(pruned.files, blocks=2, columns=3 * len(AMOUNTS) + 1)
    assert table["columns"] == [*(f"{part} {a:g}" for part in PARTS[:3] for a in AMOUNTS), "block"]
    assert table["score"] == "wanda"
    assert any("nothing was removed" in note for note in pruned.warnings)


def test_a_ruined_model_is_still_told(models: dict[str, Any]) -> None:
    """Ratios beyond what a float or a picture can show are cut, and the JSON stays valid."""
    model = copy.deepcopy(models["llama"])
    model.model.layers[0].mlp.down_proj.weight.data.mul_(1e4)
    model.model.norm.weight.data.mul_(1e3)
    pruned = scan(model, parts=("block", "mlp"))
    table = json.loads(pruned.files["sensitivity.json"], parse_constant=pytest.fail)
    assert all(0 <= ratio < math.inf for of_block in table["blocks"] for ratio in of_block)
    assert pruned.files["sensitivity.png"].startswith(PNG)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"parts": ()}, r"parts=\[\] must be some of weights, mlp, heads, block"),
        ({"parts": ("weights", "nope")}, "must be some of"),
        ({"parts": ("mlp", "mlp")}, "must be some of"),
        ({"amounts": ()}, "must rise"),
        ({"amounts": (0.5, 0.3)}, r"amounts=\[0\.5, 0\.3\] must rise"),
        ({"amounts": (0.0, 0.3)}, "must rise"),
        ({"amounts": (0.5, 1.0)}, "must rise"),
        ({"amounts": (0.5, 0.5)}, "must rise"),
        ({"amounts": (0.5, math.nan)}, "must rise"),
        ({"score": "nope"}, "score='nope' is none of"),
        ({"score": "l2"}, "score='l2' is none of"),  # of units alone
    ],
)
def test_wrong_keys_are_refused(keys: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Sensitivity(**keys)


def test_the_files_lie_in_the_run_folder_and_in_the_store(small: list[str], tmp_path: Path, cli: Cli) -> None:
    keys = ["method=sensitivity", "method.amounts=[0.5]", "measure=quality_only", "hydra.run.dir=run"]
    keys += ["dataset.calibration.n_samples=6", "dataset.calibration.seq_len=16", "tracking=mlflow"]
    give_store(tmp_path)
    done = cli(*small, *keys)
    assert done.returncode == 0, done.stderr
    stored = {name: (tmp_path / "run" / name).read_bytes() for name in FILES}
    check_files(stored, blocks=2, columns=4)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "FINISHED"
    assert summary["metrics"]["quality/perplexity"] == summary["metrics"]["quality/dense_perplexity"]
    assert summary["metrics"]["amount/realized"] == 0
    assert summary["not_applicable"]["method"] == ["amount"]
    assert summary["protocol"]["calibration"]["n_samples"] == 6
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as store:
        ((uri,),) = store.execute("select artifact_uri from runs where status = 'FINISHED'").fetchall()
    for name in FILES:
        assert (Path(uri.removeprefix("file://")) / name).read_bytes() == stored[name]
