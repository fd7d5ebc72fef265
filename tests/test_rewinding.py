"""Rewinding: what goes back after each pruning, and to what; compared with weights kept by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CPU, Cli, make_folder
from safetensors.torch import load_file
from torch import Tensor, nn
from trainings import Weights, same, training_of, weights_of

from prune_lab.errors import Refused
from prune_lab.methods.base import Method
from prune_lab.methods.depth import Depth
from prune_lab.methods.magnitude import Magnitude
from prune_lab.methods.structured import Structured
from prune_lab.models.anatomy import Anatomy
from prune_lab.models.load import HubModel, Loaded
from prune_lab.pruning.pruned import Pruned
from prune_lab.recovery import train as loop
from prune_lab.recovery.context import TrainingContext
from prune_lab.recovery.finetune import Finetune
from prune_lab.recovery.lora import Lora
from prune_lab.recovery.order import WindowOrder
from prune_lab.schedules import Gradual, Iterative, OneShot, Rewind, Schedule

RECIPE = Finetune(
    steps=24, lr=0.003, batch_size=4, warmup=0.25, final_lr=0.2, autocast="none", checkpoint_every=4, validate_every=0,
    weight_decay=0.5,
)  # fmt: skip
WINDOWS = torch.randint(300, (4, 16), generator=torch.Generator().manual_seed(1))
BACK_TO_4 = Iterative(rounds=2, start=8, rewind="weights", rewind_to=4)  # prunes before the steps 8 and 16


class Watcher:
    """Keeps the weights that each step begins with, as its forward pass finds them, and those around each pruning."""

    def __init__(self, model: Any, training: TrainingContext) -> None:
        self.model, self._prune = model, training.prune
        self.begins: list[Weights] = []  # by step
        self.before: list[Weights] = []  # each pruning
        self.after: list[Weights] = []
        self.keep: list[Weights] = []  # masks, by name of the weight
        self.blocks: list[list[int]] = []  # places, before it, of those that each pruning left
        model.base_model.register_forward_pre_hook(self._look)
        training.prune = self._watch

    def _look(self, module: Any, inputs: Any) -> None:
        if self.model.training:
            self.begins.append(weights_of(self.model))

    def _watch(self, amount: float) -> Pruned:
        self.before.append(weights_of(self.model))
        norms = _norms(self.model)
        pruned = self._prune(amount)
        self.after.append(weights_of(self.model))
        self.keep.append({f"{name}.weight": keep for name, keep in pruned.masks.keep.items()})
        self.blocks.append([norms.index(norm) for norm in _norms(self.model)])
        return pruned


def _norms(model: Any) -> list[int]:
    """Identity of a parameter of each block that no pruning cuts."""
    return [id(next(p for p in block.parameters() if p.dim() == 1)) for block in Anatomy(model).blocks]


def watched(
    loaded: Loaded, place: Path, method: Method, schedule: Schedule, recipe: Finetune = RECIPE
) -> tuple[Watcher, TrainingContext]:
    """What a whole training looked like."""
    training = training_of(loaded, place, None, method, schedule, steps=recipe.steps)
    watcher = Watcher(loaded.model, training)
    recipe.recover(loaded.model, training)
    assert len(watcher.begins) == recipe.steps
    return watcher, training


# What a schedule says.


@pytest.mark.parametrize(
    ("schedule", "steps", "expected"),
    [
        (Iterative(), 100, None),
        (Iterative(), 0, None),
        (OneShot(), 100, None),
        (Gradual(), 100, None),
        (Iterative(rewind="weights"), 100, Rewind("weights", 0)),
        (Iterative(rewind="random", start=0.5), 100, Rewind("random", 0)),
        (Iterative(rewind="weights", rewind_to=0.1, start=0.25), 200, Rewind("weights", 20)),
        (Iterative(rewind="lr", rewind_to=30, start=0.25), 200, Rewind("lr", 30)),
        (Iterative(rewind="lr", rewind_to=50, start=0.25), 200, Rewind("lr", 50)),  # where it prunes first
        (Iterative(rewind="weights", rewind_to=1, start=8), 8, Rewind("weights", 8)),  # 1 is the whole training
    ],
)
def test_where_it_goes_back_to_by_hand(schedule: Schedule, steps: int, expected: Rewind | None) -> None:
    assert schedule.rewinding(steps) == expected


@pytest.mark.parametrize(
    ("schedule", "steps", "says"),
    [
        (
            Iterative(rewind="weights"), 0,
            r"schedule\.rewind=weights goes back in a training, and recovery=none .*recovery=finetune",
        ),
        (Iterative(rewind="lr"), 0, r"schedule\.rewind=lr goes back in a training"),
        (
            Iterative(rewind="weights", rewind_to=0.5, start=0.25), 100,
            r"schedule\.rewind_to=0\.5 \(step 50\) is after schedule\.start=0\.25 \(step 25\)",
        ),
        (Iterative(rewind="lr", rewind_to=2), 100, r"schedule\.rewind_to=2 \(step 2\) is after schedule\.start=0"),
        (Iterative(rewind="lr", rewind_to=101, start=0.9), 100, r"schedule\.rewind_to=101 is beyond the training"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_training_is_refused(schedule: Schedule, steps: int, says: str) -> None:
    with pytest.raises(Refused, match=says):
        schedule.rewinding(steps)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"rewind": "all"}, "rewind='all' is not one of null, weights, lr, random"),
        ({"rewind": "weights", "rewind_to": -0.1}, "rewind_to=-0.1"),
        ({"rewind": "weights", "rewind_to": math.nan}, "rewind_to=nan"),
        ({"rewind_to": 0.1}, "rewind_to=0.1 has no effect with rewind=None: give weights or lr"),
        ({"rewind": "random", "rewind_to": 4}, "rewind_to=4 has no effect with rewind=random: give weights or lr"),
    ],
)
def test_wrong_keys_are_refused_when_built(keys: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Iterative(**keys)


# The learning rate.


def lr(position: int, of: int) -> float:
    """A quarter of the steps upwards, then half a cosine down to a fifth at the last step."""
    warm = of // 4
    if position < warm:
        return 0.003 * (position + 1) / warm
    falls = (1 + math.cos(math.pi * (position - warm) / (of - 1 - warm))) / 2
    return 0.003 * (0.2 + 0.8 * falls)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Iterative(rounds=2, start=8), [lr(step, 24) for step in range(24)]),
        (
            Iterative(rounds=2, start=8, rewind="lr", rewind_to=4),  # 8 steps, then twice 8 that begin at the fourth
            [
                *(lr(step, 8) for step in range(8)),
                *(lr(step, 12) for step in range(4, 12)),
                *(lr(step, 12) for step in range(4, 12)),
            ],
        ),
        (
            BACK_TO_4,
            [
                *(lr(step, 8) for step in range(8)),
                *(lr(step, 12) for step in range(4, 12)),
                *(lr(step, 12) for step in range(4, 12)),
            ],
        ),
        (Iterative(rounds=2, start=8, rewind="random"), [lr(step, 8) for _ in range(3) for step in range(8)]),
        (Iterative(rounds=2, start=8, rewind="lr"), [lr(step, 8) for _ in range(3) for step in range(8)]),
        (Iterative(rounds=2, rewind="weights"), [lr(step, 12) for _ in range(2) for step in range(12)]),
        (
            Iterative(rounds=1, rewind="lr", rewind_to=8, start=8),
            [*(lr(step, 8) for step in range(8)), *(lr(step, 24) for step in range(8, 24))],
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, Schedule) else "",
)
def test_the_learning_rate_of_every_step_by_hand(
    loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schedule: Schedule, expected: list[float]
) -> None:
    monkeypatch.setattr(loop, "LOG_EVERY", 1)
    seen: dict[int, float] = {}
    training = training_of(
        loaded, tmp_path, lambda step, values: seen.update({step: values["train/lr"]}), Magnitude(amount=0.5), schedule
    )
    RECIPE.recover(loaded.model, training)
    assert list(seen) == list(range(1, 25))
    assert list(seen.values()) == pytest.approx(expected)


# The weights.


@pytest.mark.parametrize(
    ("schedule", "prunings", "back_to"),
    [
        (BACK_TO_4, [8, 16], 4),
        (Iterative(rounds=3, rewind="weights"), [0, 8, 16], 0),
        (Iterative(rounds=2, start=8, rewind="weights", rewind_to=8), [8, 16], 8),
        (Iterative(rounds=2, start=8, rewind="weights"), [8, 16], 0),
    ],
    ids=str,
)
def test_what_stays_goes_back_to_exactly_what_it_was(
    loaded: Loaded, tmp_path: Path, schedule: Schedule, prunings: list[int], back_to: int
) -> None:
    """In every parameter, norms and embeddings too; what is pruned is zero, and was zero before if it was pruned."""
    start = weights_of(loaded.model)
    watcher, training = watched(loaded, tmp_path, Magnitude(amount=0.6), schedule)
    # The weights that the step began with before any pruning: at a step that prunes, what the pruning found.
    kept = {0: start, prunings[0]: watcher.before[0]}.get(back_to) or watcher.begins[back_to]
    if back_to > 0:
        assert not any(torch.equal(kept[name], start[name]) for name in kept)
    gone = {name: torch.zeros_like(keep) for name, keep in watcher.keep[0].items()}
    for number, step in enumerate(prunings):
        keep, found = watcher.keep[number], watcher.begins[step]
        for name, weight in found.items():
            expected = kept[name] * keep[name] if name in keep else kept[name]
            assert torch.equal(weight, expected), f"{name} before step {step}"
            if step > back_to:
                assert not torch.equal(watcher.before[number][name], kept[name]), f"{name} has not been trained"
        for name, mask in keep.items():
            assert int((~mask).sum()) == int(mask.numel() * 0.6 * (number + 1) / len(prunings) + 0.5)
            assert not (gone[name] & mask).any()
            gone[name] = ~mask
    for name, weight in weights_of(loaded.model).items():
        if name in gone:
            assert torch.equal(weight == 0, gone[name])
    assert training.pruned.realized == pytest.approx(0.6, abs=1e-3)


def test_a_pruning_goes_by_the_trained_weights_not_by_those_it_goes_back_to(loaded: Loaded, tmp_path: Path) -> None:
    """The masks are those of the smallest magnitudes that training had left, sorted by hand."""
    watcher, _ = watched(loaded, tmp_path, Magnitude(amount=0.6), BACK_TO_4)
    for number in (0, 1):
        for name, keep in watcher.keep[number].items():
            trained, rewound = watcher.before[number][name].abs(), watcher.begins[4][name].abs()
            count = int((~keep).sum())
            assert set((~keep).flatten().nonzero().flatten().tolist()) == set(
                trained.flatten().argsort(stable=True)[:count].tolist()
            )
            assert not torch.equal(~keep, rewound <= rewound.flatten().sort().values[count - 1])


def test_the_training_after_it_is_one_of_the_pruned_early_weights(folder: Path, tmp_path: Path) -> None:
    """Four steps by hand: torch's AdamW from the beginning, without what the first steps left in its moments."""
    ours, bare = (HubModel(name=str(folder)).load(CPU, 0) for _ in range(2))
    recipe = replace(RECIPE, steps=8, warmup=0.0, weight_decay=0.1)
    watcher, training = watched(
        ours, tmp_path, Magnitude(amount=0.5), Iterative(rounds=1, start=4, rewind="weights"), recipe
    )
    (keep,), model = watcher.keep, bare.model.train().requires_grad_(True)
    parameters = dict(model.named_parameters())
    groups = [
        {"params": [w for w in parameters.values() if w.ndim == 2], "weight_decay": 0.1},
        {"params": [w for w in parameters.values() if w.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    order = WindowOrder(training.tokens.stream("train"), 32, 4, 0)

    @torch.no_grad()
    def hold() -> None:
        for name, mask in keep.items():
            parameters[name].mul_(mask)

    hold()
    for step in range(4):
        for group in optimizer.param_groups:
            group["lr"] = 0.003 * (0.2 + 0.8 * (1 + math.cos(math.pi * step / 3)) / 2)
        batch = order.batch(4 + step)
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        hold()
    for name, weight in weights_of(model).items():
        torch.testing.assert_close(weights_of(ours.model)[name], weight, rtol=0, atol=1e-6)


def test_lr_rewinding_leaves_the_weights_as_they_were_trained(loaded: Loaded, tmp_path: Path) -> None:
    schedule = Iterative(rounds=2, start=8, rewind="lr", rewind_to=4)
    watcher, training = watched(loaded, tmp_path, Magnitude(amount=0.6), schedule)
    for number, step in enumerate((8, 16)):
        for name, weight in watcher.begins[step].items():
            keep = watcher.keep[number].get(name, torch.tensor(True))
            assert torch.equal(weight, watcher.before[number][name] * keep), name
            assert not torch.equal(weight, watcher.begins[4][name] * keep)
    assert training.pruned.realized == pytest.approx(0.6, abs=1e-3)


def test_lr_rewinding_goes_on_with_the_moments_and_weight_rewinding_does_not(folder: Path, tmp_path: Path) -> None:
    """How many steps AdamW counts at the end: all of them, or those since the last pruning."""
    for rewind, expected in (("lr", 24), ("weights", 8), ("random", 8), (None, 24)):
        loaded = HubModel(name=str(folder)).load(CPU, 0)
        schedule = Iterative(rounds=2, start=8, rewind=rewind)
        RECIPE.recover(loaded.model, training_of(loaded, tmp_path / str(rewind), None, Magnitude(amount=0.5), schedule))
        state = load_file(tmp_path / str(rewind) / "training/training.safetensors")
        counts = {float(value) for name, value in state.items() if name.startswith("optimizer/step/")}
        assert counts == {float(expected)}, rewind


@pytest.mark.parametrize(("start", "prunings"), [(8, [8, 16]), (0, [0, 12])])
@pytest.mark.parametrize("method", [Magnitude(amount=0.6), Structured(amount=0.5), Depth(amount=0.5)], ids=str)
def test_random_rewinding_draws_what_stays_anew_as_transformers_does(
    loaded: Loaded, tmp_path: Path, start: int, prunings: list[int], method: Method
) -> None:
    """A stock model of the present shape, drawn under the seed of that step; each round draws others."""
    from transformers import AutoModelForCausalLM

    original, drawn = weights_of(loaded.model), dict[int, Weights]()
    training = training_of(loaded, tmp_path, None, method, Iterative(rounds=2, start=start, rewind="random"))
    watcher, prune = Watcher(loaded.model, training), training.prune

    def drawing(amount: float) -> Pruned:
        pruned, step = prune(amount), prunings[len(drawn)]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1_000_003 * (step + 1))
            drawn[step] = weights_of(AutoModelForCausalLM.from_config(loaded.model.config, dtype=torch.float32))
        return pruned

    training.prune = drawing
    RECIPE.recover(loaded.model, training)
    assert list(drawn) == prunings
    for number, (step, of_step) in enumerate(drawn.items()):
        assert watcher.begins[step].keys() == of_step.keys()
        for name, weight in watcher.begins[step].items():
            keep = watcher.keep[number].get(name, torch.tensor(True))
            assert torch.equal(weight, of_step[name] * keep), f"{name} before step {step}"
            if weight.ndim == 2:  # norms are all one in every drawing
                assert not torch.equal(weight, watcher.after[number][name])
                if weight.shape == original[name].shape:
                    assert not torch.equal(weight, original[name] * keep)
    first, second = drawn.values()
    assert not torch.equal(first["model.embed_tokens.weight"], second["model.embed_tokens.weight"])


def test_random_rewinding_keeps_the_masks_nested(loaded: Loaded, tmp_path: Path) -> None:
    """Zeros stay zero through a drawing, and the next round prunes on from them."""
    watcher, training = watched(loaded, tmp_path, Magnitude(amount=0.6), Iterative(rounds=2, start=8, rewind="random"))
    for name, first in watcher.keep[0].items():
        second = watcher.keep[1][name]
        assert not (~first & second).any()
        assert torch.equal(loaded.model.get_parameter(name) == 0, ~second)
    assert training.pruned.realized == pytest.approx(0.6, abs=1e-3)


def rows_left(before: Tensor, after: Tensor) -> list[int]:
    """Which rows of a matrix are still there, in order, found by their values."""
    left = [index for index, row in enumerate(before) if (after == row).all(1).any()]
    assert len(left) == len(after)
    return left


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_cut_units_go_back_with_their_rows_and_columns(tmp_path: Path, family: str) -> None:
    """Which channels a round left is read from the matrices around it; the early ones are cut alike by hand."""
    loaded = HubModel(name=str(make_folder(tmp_path / family, family))).load(CPU, 0)
    watcher, training = watched(loaded, tmp_path, Structured(amount=0.5), BACK_TO_4)
    if family == "gpt2":  # Conv1D: (in, out)
        blocks, up, bias, down = (
            ["transformer.h.0.", "transformer.h.1."],
            "mlp.c_fc.weight",
            "mlp.c_fc.bias",
            "mlp.c_proj.weight",
        )
        others, across = [], 1
    else:
        blocks, up, bias, down = (
            ["model.layers.0.", "model.layers.1."],
            "mlp.up_proj.weight",
            None,
            "mlp.down_proj.weight",
        )
        others, across = ["mlp.gate_proj.weight"], 0
    early = {name: weight.clone() for name, weight in watcher.begins[4].items()}
    for number, (step, count) in enumerate(((8, 36), (16, 24))):
        for block in blocks:
            matrices = watcher.before[number][block + up], watcher.after[number][block + up]
            index = rows_left(*(matrix.T if across else matrix for matrix in matrices))
            assert len(index) == count
            for name in [up, *others]:
                early[block + name] = early[block + name].index_select(across, torch.tensor(index))
            if bias:
                early[block + bias] = early[block + bias][index]
            early[block + down] = early[block + down].index_select(1 - across, torch.tensor(index))
        assert same(watcher.begins[step], early), f"before step {step}"
    assert training.pruned.realized == 0.5


def test_cut_heads_and_channels_go_back_together(loaded: Loaded, tmp_path: Path) -> None:
    """One of two KV groups goes in the first round: half of every attention matrix."""
    watcher, _ = watched(loaded, tmp_path, Structured(amount=0.5, units=("mlp", "heads")), BACK_TO_4)
    early, found = watcher.begins[4], watcher.begins[8]
    for block in (0, 1):
        name = f"model.layers.{block}.self_attn."
        queries, keys = (
            rows_left(watcher.before[0][f"{name}{part}_proj.weight"], watcher.after[0][f"{name}{part}_proj.weight"])
            for part in "qk"
        )
        assert (len(queries), len(keys)) == (16, 8)
        assert torch.equal(found[f"{name}q_proj.weight"], early[f"{name}q_proj.weight"][queries])
        assert torch.equal(found[f"{name}k_proj.weight"], early[f"{name}k_proj.weight"][keys])
        assert torch.equal(found[f"{name}v_proj.weight"], early[f"{name}v_proj.weight"][keys])
        assert torch.equal(found[f"{name}o_proj.weight"], early[f"{name}o_proj.weight"][:, queries])
        channels = rows_left(
            *(of[0][f"model.layers.{block}.mlp.up_proj.weight"] for of in (watcher.before, watcher.after))
        )
        gate = f"model.layers.{block}.mlp.gate_proj.weight"
        assert torch.equal(found[gate], early[gate][channels])


def test_blocks_that_stay_go_back_though_they_are_numbered_anew(tmp_path: Path) -> None:
    loaded = HubModel(name=str(make_folder(tmp_path / "deep", num_hidden_layers=4))).load(CPU, 0)
    with torch.no_grad():  # the second block does next to nothing, so that it goes
        for linear in (loaded.model.model.layers[1].self_attn.o_proj, loaded.model.model.layers[1].mlp.down_proj):
            linear.weight.mul_(1e-3)
    watcher, training = watched(loaded, tmp_path, Depth(amount=0.5), BACK_TO_4)
    places, early = [0, 1, 2, 3], watcher.begins[4]
    for number, (step, count) in enumerate(((8, 3), (16, 2))):
        places = [places[index] for index in watcher.blocks[number]]
        assert len(places) == count
        expected = {name: weight for name, weight in early.items() if ".layers." not in name}
        for now, was in enumerate(places):
            of_block = f"model.layers.{was}."
            expected |= {
                f"model.layers.{now}.{name.removeprefix(of_block)}": weight
                for name, weight in early.items()
                if name.startswith(of_block)
            }
        assert same(watcher.begins[step], expected), f"before step {step}"
    assert 1 not in places
    assert training.pruned.realized == 0.5


@pytest.mark.parametrize("rewind_to", [0, 4])
def test_lora_goes_back_to_the_weights_with_what_its_adapters_had_learned_by_then(
    loaded: Loaded, tmp_path: Path, rewind_to: int
) -> None:
    """W + scale B A at that step, added up by hand."""
    recipe = Lora(
        steps=24, lr=0.01, batch_size=4, autocast="none", checkpoint_every=4, validate_every=0, rank=4, scale=1.5
    )
    schedule = replace(BACK_TO_4, rewind_to=rewind_to)
    watcher, _ = watched(loaded, tmp_path, Magnitude(amount=0.6), schedule, recipe)
    early = watcher.begins[rewind_to]
    for number, step in enumerate((8, 16)):
        for name, keep in watcher.keep[number].items():
            a, b = (early[name.replace("weight", f"lora_{part}")] for part in "ab")
            expected = (early[name] + 1.5 * b @ a) * keep
            torch.testing.assert_close(watcher.begins[step][name], expected, rtol=0, atol=1e-6)
            assert not watcher.begins[step][name.replace("weight", "lora_b")].any()


def test_rewinding_in_bfloat16_goes_back_to_the_float32_weights(folder: Path, tmp_path: Path) -> None:
    """The run's number type is that of the model before and after, not of what is kept while it trains."""
    device = replace(CPU, dtype=torch.bfloat16)
    loaded = HubModel(name=str(folder)).load(device, 0)
    training = training_of(loaded, tmp_path, None, Magnitude(amount=0.6), BACK_TO_4, device=device)
    watcher = Watcher(loaded.model, training)
    RECIPE.recover(loaded.model, training)
    for name, weight in watcher.begins[16].items():
        assert weight.dtype == torch.float32
        keep = watcher.keep[1].get(name, torch.tensor(True))
        assert torch.equal(weight, watcher.begins[4][name] * keep)
    assert {weight.dtype for weight in loaded.model.parameters()} == {torch.bfloat16}


# From the command line. Interrupted: test_interrupted.py.


def test_the_command_line_rewinds_and_refuses_it_without_training(small: list[str], cli: Cli, tmp_path: Path) -> None:
    arguments = [
        *small, "measure=quality_only", "tracking=none", "schedule=iterative", "schedule.rewind=weights",
        "schedule.rounds=2", "amount=0.5", "hydra.run.dir=run",
    ]  # fmt: skip
    refused = cli(*arguments)
    assert refused.returncode == 2
    assert "schedule.rewind=weights goes back in a training, and recovery=none trains nothing" in refused.stderr
    done = cli(*arguments, "recovery=finetune", "recovery.steps=10", "recovery.batch_size=4", "export=hf")
    assert done.returncode == 0, done.stderr
    stored = load_file(tmp_path / "run/export/model.safetensors")
    pruned = {name: weight for name, weight in stored.items() if name.endswith("_proj.weight")}
    assert len(pruned) == 14
    for name, weight in pruned.items():
        assert int((weight == 0).sum()) == weight.numel() // 2, name
