"""Two processes that share one model out (FSDP): each has half of it while it trains, and it ends as in one process.

This file is also the program that `accelerate launch --use_fsdp` runs in both processes: see `main`.
"""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CPU, make_folder, story
from processes import ACCELERATE_FSDP, launched
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.testing import assert_close
from trainings import training_of

from prune_lab.errors import Refused
from prune_lab.methods.base import Method
from prune_lab.methods.magnitude import Magnitude
from prune_lab.methods.structured import Structured
from prune_lab.models import loss
from prune_lab.models.load import HubModel
from prune_lab.recovery import train as loop
from prune_lab.recovery.distill import Distill
from prune_lab.recovery.finetune import Finetune
from prune_lab.recovery.lora import Lora
from prune_lab.schedules import Gradual, Iterative, OneShot, Schedule
from prune_lab.system.world import World, join
from prune_lab.text.corpus import Documents
from prune_lab.text.tokens import Tokens

STEPS = 10
STORIES = Documents("stories", tuple(map(story, range(8))), (), tuple(map(story, range(8, 12))), ())
PLAIN = Finetune(
    steps=STEPS,
    lr=0.003,
    batch_size=4,
    clip_norm=0.5,
    autocast="none",
    validate_every=2,
    validate_windows=4,
    checkpoint_every=6,
)
ROUNDS = Iterative(rounds=2)
TIGHT, LOOSE = {"atol": 1e-4, "rtol": 1e-3}, {"atol": 2e-2, "rtol": 2e-2}
Case = tuple[Finetune, Method, Schedule]
CASES: dict[str, Case] = {
    "masks": (replace(PLAIN, accumulate=2, gradient_checkpointing=True), Magnitude(0.7), Gradual(end=0.7, interval=2)),
    "cuts": (Distill(**vars(PLAIN)), Structured(0.5), ROUNDS),
    "best": (replace(PLAIN, lr=0.3, warmup=1.0, patience=2), Magnitude(0.5), OneShot()),  # stops at 6 with those of 2
    "rewound": (PLAIN, Magnitude(0.6), Iterative(rounds=2, start=5, rewind="weights", rewind_to=2)),
    "lora": (Lora(**vars(PLAIN)), Magnitude(0.5), ROUNDS),
    "bfloat16": (replace(PLAIN, autocast="bfloat16"), Magnitude(0.5), OneShot()),
}
LEFT = ("masks", "best", "rewound")  # of which a checkpoint has something that others have not


def train(name: str, model: Path, folder: Path, world: World) -> dict[str, Any]:
    """Trains as a case says, from the checkpoint in `folder` if there is one, and tells all about it."""
    recipe, method, schedule = CASES[name]
    loaded, dense = (HubModel(name=str(model)).load(CPU, seed=0) for _ in range(2))
    figures: dict[str, dict[str, float]] = {}
    held: list[dict[str, int]] = []
    at_work: dict[str, Any] = {}

    def log(step: int, values: dict[str, float]) -> None:
        figures.setdefault(str(step), {}).update(values)
        if "train/loss" in values:
            keep = {key: mask.chunk(world.size)[world.rank] for key, mask in training.pruned.masks.keep.items()}
            held.append(holdings(at_work["model"], at_work["optimizer"], keep, loaded.model))

    training = training_of(
        loaded, folder, log, method, schedule, steps=STEPS, dense=dense, tokens=Tokens(STORIES, loaded.tokenizer),
        checkpoint=folder / name / "training.safetensors", world=world,
    )  # fmt: skip
    hooks = [  # of the model that computes (losses go past its head's forward), and of the optimizer that steps
        loaded.model.base_model.register_forward_pre_hook(lambda module, *_: at_work.update(model=module)),
        register_optimizer_step_post_hook(lambda optimizer, *_: at_work.update(optimizer=optimizer)),
    ]
    recipe.recover(loaded.model, training)
    for hook in hooks:
        hook.remove()
    return {
        "weights": {key: weight.detach() for key, weight in loaded.model.named_parameters()},
        "figures": figures,
        "held": held,
        "notes": training.pruned.warnings,
    }


@torch.no_grad()
def holdings(model: Any, optimizer: Any, keep: dict[str, Tensor], start: Any) -> dict[str, int]:
    """What this process has of a base model after a step, in elements; and how many pruned weights are not 0."""
    weights = {f"model.{name}": weight for name, weight in model.named_parameters()}  # the head is the embedding
    states = [value for weight in weights.values() for key, value in optimizer.state.get(weight, {}).items()]
    moved = sum(int((local(weights[f"{name}.weight"])[~mask] != 0).sum()) for name, mask in keep.items())
    return {
        "weights": sum(map(own, [*weights.values(), *(() if start.base_model is model else start.parameters())])),
        "state": sum(own(value) for value in states if value.ndim > 0),
        "moved": moved,
    }


def local(tensor: Any) -> Tensor:
    """What this process has of a tensor."""
    mine: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return mine


def own(tensor: Tensor) -> int:
    """How many elements lie in this process's memory for a tensor."""
    return local(tensor).untyped_storage().nbytes() // tensor.element_size()


def main(model: str, place: str) -> None:
    """In each of two processes: every case from its beginning, and from the checkpoint that one process left."""
    warnings.simplefilter("error")
    loop.LOG_EVERY = 1
    loss.LEAST, loss.LOGITS_AT_ONCE = 16, 1  # several chunks of the head; one process has the logits whole
    world = join(CPU)
    for start, names in (("new", tuple(CASES)), ("left", LEFT)):
        for name in names:
            told = train(name, Path(model), Path(place) / start, world)
            save_file(told.pop("weights"), Path(place) / f"{start}-{name}-{world.rank}.safetensors")
            (Path(place) / f"{start}-{name}-{world.rank}.json").write_text(json.dumps(told))
    torch.distributed.destroy_process_group()


@dataclass(frozen=True)
class Told:
    """What one process and two tell of the same trainings."""

    model: Path
    place: Path
    one: dict[str, dict[str, Any]]

    def two(self, name: str, start: str = "new") -> list[dict[str, Any]]:
        """What each of the two tells of a case."""
        files = [self.place / f"{start}-{name}-{rank}" for rank in (0, 1)]
        return [
            {"weights": load_file(f"{file}.safetensors"), **json.loads(Path(f"{file}.json").read_text())}
            for file in files
        ]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Told]:
    place = tmp_path_factory.mktemp("fsdp")
    model = make_folder(place / "model", intermediate_size=45)  # no even number of rows
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "LOG_EVERY", 1)
        one = {name: train(name, model, place / "one", World()) for name in CASES}
        shutil.copytree(place / "one", place / "left")
        done = launched(ACCELERATE_FSDP, place, str(Path(__file__)), str(model), str(place))
        assert done.returncode == 0, done.stderr
        yield Told(model, place, one)


@pytest.mark.parametrize("name", CASES)
def test_a_sharded_training_ends_as_one_in_one_process(told: Told, name: str) -> None:
    """At the same global batch; also where one process left off, and where one process goes on from two."""
    one, tolerance = told.one[name], LOOSE if name == "bfloat16" else TIGHT
    again = [train(name, told.model, told.place / "new", World()), *told.two(name, "left")] if name in LEFT else []
    for other in (*told.two(name), *again):
        assert other["weights"].keys() == one["weights"].keys()
        for key, weight in one["weights"].items():
            assert_close(other["weights"][key], weight, **tolerance)
        for step, figures in other["figures"].items():
            assert figures == pytest.approx(one["figures"][step], rel=1e-4 if tolerance is TIGHT else 1e-2)
    first, second = told.two(name)
    assert list(first["figures"]) == list(one["figures"])
    assert all(torch.equal(second["weights"][key], weight) for key, weight in first["weights"].items())
    assert first["notes"] == one["notes"]
    assert any(note.startswith("trained 6 of 10 steps; kept are the weights of step 2") for note in one["notes"]) == (
        name == "best"
    )


@pytest.mark.parametrize("name", CASES)
def test_each_process_holds_half_of_the_model_and_no_pruned_weight_moves(told: Told, name: str) -> None:
    """Counted after every step of the optimizer, in the storage of weights, of their state, and of what they were."""
    whole = told.one[name]["held"]
    for parts in zip(whole, *(other["held"] for other in told.two(name)), strict=True):
        assert [part["moved"] for part in parts] == [0, 0, 0]
        for kind in ("weights", "state"):
            alone, *shared = (part[kind] for part in parts)
            assert sum(shared) == pytest.approx(alone, rel=0.02)  # rows are padded to be as many in every process
            assert max(shared) <= 0.52 * alone


def test_what_is_not_built_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    with pytest.raises(Refused, match=r"^FSDP_OFFLOAD_PARAMS=true is not built: the shards stay on their device$"):
        join(CPU)


if __name__ == "__main__":
    main(*sys.argv[1:])
