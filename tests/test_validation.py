"""What a training shows of itself: the validation perplexity and what goes by it, the sparsity; and checkpointing."""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import trainings
from conftest import CPU, make_folder, story
from torch import Tensor, nn
from trainings import interrupted, same, weights_of

from prune_lab.errors import Refused
from prune_lab.methods.base import Method
from prune_lab.methods.magnitude import Magnitude
from prune_lab.methods.structured import Structured
from prune_lab.models.anatomy import Anatomy
from prune_lab.models.load import HubModel, Loaded
from prune_lab.recovery import train as loop
from prune_lab.recovery.finetune import Finetune
from prune_lab.recovery.lora import Lora
from prune_lab.schedules import Gradual, Iterative, OneShot, Schedule

RECIPE = Finetune(
    steps=24, lr=0.003, batch_size=4, warmup=0.1, autocast="none", validate_every=4, validate_windows=6,
    checkpoint_every=4,
)  # fmt: skip
LORA = Lora(
    steps=24, lr=0.01, batch_size=4, warmup=0.1, autocast="none", validate_every=4, validate_windows=6,
    checkpoint_every=4, rank=4,
)  # fmt: skip
UNSEEN = tuple(story(seed, sentences=20) for seed in (50, 51))
# Trainings on other text than is validated on: the perplexity falls for some steps, and rises from then on.
SHOUTED, ALPHABET = tuple(story(seed).upper() for seed in range(4)), ("abcdefghijklmnopqrstuvwxyz " * 40,)
FORGETFUL = replace(RECIPE, lr=0.03, validate_every=2)
WORSENING = [
    pytest.param(FORGETFUL, SHOUTED, id="finetune"),
    pytest.param(replace(LORA, lr=0.1, validate_every=2), ALPHABET, id="lora"),
]

training_of = functools.partial(trainings.training_of, validation=UNSEEN)


class Watcher:
    """A log callback that keeps the perplexities, and the weights and logits that each was measured on."""

    def __init__(self, model: Any, stop_at: int | None = None) -> None:
        self.model, self.stop_at = model, stop_at
        self.perplexity: dict[int, float] = {}
        self.weights: dict[int, dict[str, Tensor]] = {}
        self.logits: dict[int, Tensor] = {}
        self.steps: list[int] = []

    def __call__(self, step: int, values: dict[str, float]) -> None:
        if "validation/perplexity" in values:
            self.perplexity[step] = values["validation/perplexity"]
            self.weights[step] = weights_of(self.model)
            self.logits[step] = logits_of(self.model)
        else:
            self.steps.append(step)
        if step == self.stop_at and "train/loss" in values:
            raise KeyboardInterrupt

    def best(self, after: int = 0) -> int:
        """The step of the lowest perplexity among those after a step."""
        return min((step for step in self.perplexity if step > after), key=lambda step: self.perplexity[step])


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    was = model.training
    logits: Tensor = model.eval()(input_ids=torch.arange(100, 140)[None]).logits
    model.train(was)
    return logits


def test_the_perplexity_is_that_of_a_naive_loop_at_every_measured_step(loaded: Loaded, tmp_path: Path) -> None:
    """Stock transformers' loss on the same windows, one by one, in eval mode though dropout is on while it trains."""
    ids = loaded.tokenizer("\n\n".join(UNSEEN))["input_ids"]
    assert len(ids) > 7 * 32  # more than are asked for
    logged, expected = dict[int, float](), dict[int, float]()

    @torch.no_grad()
    def naive() -> float:
        losses = []
        loaded.model.eval()
        for window in range(5):
            of = torch.tensor([ids[32 * window : 32 * window + 32]])
            losses.append(float(loaded.model(input_ids=of, labels=of).loss))
        loaded.model.train()
        return math.exp(sum(losses) / len(losses))

    def look(step: int, values: dict[str, float]) -> None:
        if "validation/perplexity" in values:
            assert values.keys() == {"validation/perplexity"}
            logged[step], expected[step] = values["validation/perplexity"], naive()

    recipe = replace(RECIPE, validate_every=10, validate_windows=5, batch_size=2, dropout=0.3)
    recipe.recover(loaded.model, training_of(loaded, tmp_path, look))
    assert list(logged) == [0, 10, 20, 24]
    assert logged == pytest.approx(expected, rel=1e-5)
    assert logged[24] < 0.9 * logged[0]


@pytest.mark.parametrize(("every", "steps", "expected"), [(12, 24, [0, 12, 24]), (50, 7, [0, 7]), (0, 7, [])])
def test_it_is_measured_at_the_beginning_every_so_often_and_at_the_end(
    loaded: Loaded, tmp_path: Path, every: int, steps: int, expected: list[int]
) -> None:
    watcher = Watcher(loaded.model)
    replace(RECIPE, validate_every=every, steps=steps).recover(loaded.model, training_of(loaded, tmp_path, watcher))
    assert list(watcher.perplexity) == expected


def test_fewer_windows_than_asked_for_are_all_measured(loaded: Loaded, tmp_path: Path) -> None:
    ids = loaded.tokenizer("\n\n".join(UNSEEN))["input_ids"]
    whole = torch.tensor(ids[: len(ids) // 32 * 32]).view(-1, 32)
    with torch.no_grad():
        expected = math.exp(float(loaded.model(input_ids=whole, labels=whole).loss))
    watcher = Watcher(loaded.model)
    replace(RECIPE, steps=1, validate_windows=10_000).recover(loaded.model, training_of(loaded, tmp_path, watcher))
    assert watcher.perplexity[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("recipe", [RECIPE, LORA], ids=["finetune", "lora"])
def test_measuring_does_not_disturb_the_training(folder: Path, tmp_path: Path, recipe: Finetune) -> None:
    """The same weights bit for bit, dropout's random numbers included."""
    ends = []
    for every in (0, 3):
        loaded = HubModel(name=str(folder)).load(CPU, 0)
        torch.manual_seed(3)
        replace(recipe, validate_every=every, dropout=0.2).recover(
            loaded.model, training_of(loaded, tmp_path / str(every))
        )
        ends.append(weights_of(loaded.model))
    assert same(*ends)


@pytest.mark.parametrize(("recipe", "text"), WORSENING)
def test_keep_best_ends_with_the_weights_of_the_lowest_perplexity(
    loaded: Loaded, tmp_path: Path, recipe: Finetune, text: tuple[str, ...]
) -> None:
    """What is kept computes what the model computed when it was measured; for finetune its weights are those."""
    watcher = Watcher(loaded.model)
    training = training_of(loaded, tmp_path, watcher, text=text)
    replace(recipe, keep_best=True, validate_every=1).recover(loaded.model, training)
    best = watcher.best()
    assert 0 < best < 24
    assert watcher.perplexity[24] > 1.1 * watcher.perplexity[best]
    torch.testing.assert_close(logits_of(loaded.model), watcher.logits[best], rtol=1e-5, atol=1e-5)
    if not isinstance(recipe, Lora):
        assert same(weights_of(loaded.model), watcher.weights[best])
    (note,) = training.pruned.warnings
    assert note.startswith(f"trained 24 of 24 steps; kept are the weights of step {best}, where")
    assert note.endswith(f"{watcher.perplexity[best]:.4g}")


def test_without_keep_best_the_last_weights_stay(loaded: Loaded, tmp_path: Path) -> None:
    watcher = Watcher(loaded.model)
    training = training_of(loaded, tmp_path, watcher, text=SHOUTED)
    FORGETFUL.recover(loaded.model, training)
    assert watcher.best() < 24
    assert same(weights_of(loaded.model), watcher.weights[24])
    assert training.pruned.warnings == []


def test_where_the_last_weights_are_the_best_nothing_is_said(folder: Path, tmp_path: Path) -> None:
    """Nor is anything different from a training that did not look."""
    plain, kept = (HubModel(name=str(folder)).load(CPU, 0) for _ in range(2))
    RECIPE.recover(plain.model, training_of(plain, tmp_path / "plain"))
    watcher = Watcher(kept.model)
    training = training_of(kept, tmp_path / "kept", watcher)
    replace(RECIPE, keep_best=True, patience=3).recover(kept.model, training)
    assert watcher.best() == 24
    assert same(weights_of(kept.model), weights_of(plain.model))
    assert training.pruned.warnings == []


@pytest.mark.parametrize("patience", [1, 3])
def test_patience_ends_a_training_that_no_longer_improves(loaded: Loaded, tmp_path: Path, patience: int) -> None:
    """After that many measurements in a row that were no better than the best, counted here by hand."""
    watcher = Watcher(loaded.model)
    training = training_of(loaded, tmp_path, watcher, steps=60, text=SHOUTED)
    replace(FORGETFUL, steps=60, patience=patience).recover(loaded.model, training)
    lowest, best, since = math.inf, 0, 0
    for step, perplexity in watcher.perplexity.items():
        assert since < patience, f"measured at step {step} though it was over"
        if step > 0:
            better = perplexity < lowest
            lowest, best, since = (perplexity, step, 0) if better else (lowest, best, since + 1)
    last = max(watcher.perplexity)
    assert since == patience
    assert last < 60
    assert max(watcher.steps, default=0) <= last
    assert same(weights_of(loaded.model), watcher.weights[best])
    assert not loaded.model.training
    (note,) = training.pruned.warnings
    assert note.startswith(f"trained {last} of 60 steps; kept are the weights of step {best}, where")


KEEPING: tuple[dict[str, Any], ...] = ({"keep_best": True}, {"patience": 5})
EVENTS = [
    (Magnitude(amount=0.9), OneShot(start=20)),
    (Magnitude(amount=0.9), Iterative(rounds=2, start=16)),
    (Structured(amount=0.9), OneShot(start=20)),
    (Structured(amount=0.9), Iterative(rounds=2, start=16)),
]


@pytest.mark.parametrize(
    ("method", "schedule", "every", "keys"),
    [(*event, every, keys) for event, (every, keys) in zip(EVENTS, itertools.product((1, 10), KEEPING), strict=True)],
    ids=str,
)
def test_what_was_measured_before_the_last_pruning_is_not_the_best(
    loaded: Loaded, tmp_path: Path, method: Method, schedule: Schedule, every: int, keys: dict[str, Any]
) -> None:
    """Nor is the figure after the 20 steps that go before it, though it is logged at its step."""
    assert schedule.events(method.amount, 24)[-1].step == 20
    watcher = Watcher(loaded.model)
    training = training_of(loaded, tmp_path, watcher, method, schedule)
    replace(RECIPE, **keys, validate_every=every, checkpoint_every=100).recover(loaded.model, training)
    best = watcher.best(after=20)
    assert watcher.perplexity[20] < watcher.perplexity[best], "the model before the last pruning was better"
    assert same(weights_of(loaded.model), watcher.weights[best])
    assert training.pruned.realized == pytest.approx(method.amount, abs=0.01)
    for name, keep in training.pruned.masks.keep.items():
        assert (loaded.model.get_submodule(name).weight[~keep] == 0).all()


def test_a_training_that_gets_worse_is_not_stopped_before_the_last_pruning(loaded: Loaded, tmp_path: Path) -> None:
    """Where it is stopped after that, the whole amount has been pruned."""
    watcher = Watcher(loaded.model)
    plan = Magnitude(amount=0.6), OneShot(start=16)
    training = training_of(loaded, tmp_path, watcher, *plan, steps=40, text=SHOUTED)
    replace(FORGETFUL, steps=40, patience=1).recover(loaded.model, training)
    early = [watcher.perplexity[step] for step in range(2, 16, 2)]
    assert early != sorted(early, reverse=True), "it would have been stopped"
    assert max(watcher.perplexity) > 16
    assert training.pruned.realized == pytest.approx(0.6, abs=1e-3)
    weight = loaded.model.model.layers[0].mlp.up_proj.weight
    assert float((weight == 0).float().mean()) == pytest.approx(0.6, abs=1e-3)


def test_a_pruning_at_the_end_leaves_the_last_weights_pruned(folder: Path, tmp_path: Path) -> None:
    """No measurement is one of the pruned model, so there is none to keep."""
    plain, kept = (HubModel(name=str(folder)).load(CPU, 0) for _ in range(2))
    for name, loaded, keep_best in (("plain", plain, False), ("kept", kept, True)):
        training = training_of(loaded, tmp_path / name, None, Magnitude(amount=0.5), OneShot(start=1), text=SHOUTED)
        replace(FORGETFUL, keep_best=keep_best).recover(loaded.model, training)
    assert same(weights_of(kept.model), weights_of(plain.model))
    assert float((kept.model.model.layers[0].mlp.up_proj.weight == 0).float().mean()) == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("validation", [(), ("the cat",)], ids=["none", "less than a window"])
def test_without_validation_text_the_training_goes_on_and_says_so(
    folder: Path, tmp_path: Path, validation: tuple[str, ...]
) -> None:
    unwatched, plain = (HubModel(name=str(folder)).load(CPU, 0) for _ in range(2))
    watcher = Watcher(unwatched.model)
    training = training_of(unwatched, tmp_path / "unwatched", watcher, validation=validation)
    RECIPE.recover(unwatched.model, training)
    replace(RECIPE, validate_every=0).recover(plain.model, training_of(plain, tmp_path / "plain"))
    assert watcher.perplexity == {}
    assert watcher.steps == [10, 20, 24]
    (note,) = training.pruned.warnings
    assert note.startswith("no validation perplexity while it trained: ")
    assert "the validation split of stories" in note
    assert same(weights_of(unwatched.model), weights_of(plain.model))


def test_that_there_is_no_validation_text_is_still_said_after_a_pruning(loaded: Loaded, tmp_path: Path) -> None:
    """Each round answers with notes of its own."""
    training = training_of(loaded, tmp_path, None, Magnitude(amount=0.5), Iterative(rounds=3), validation=())
    RECIPE.recover(loaded.model, training)
    assert [note for note in training.pruned.warnings if note.startswith("no validation perplexity")]


@pytest.mark.parametrize("keys", [{"keep_best": True}, {"patience": 2}], ids=str)
def test_without_validation_text_what_would_go_by_it_is_refused(
    loaded: Loaded, tmp_path: Path, keys: dict[str, Any]
) -> None:
    before = weights_of(loaded.model)
    with pytest.raises(Refused, match="the validation split of stories has no text: its 8 documents are too few"):
        replace(RECIPE, **keys).recover(loaded.model, training_of(loaded, tmp_path, validation=()))
    assert same(weights_of(loaded.model), before)


@pytest.mark.parametrize(("recipe", "text"), WORSENING)
@pytest.mark.parametrize(("keys", "pruned"), [({"keep_best": True}, False), ({"patience": 3}, True)], ids=str)
def test_interrupted_after_its_best_step_it_still_ends_in_the_best_weights(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: Finetune, text: tuple[str, ...],
    keys: dict[str, Any], pruned: bool,
) -> None:  # fmt: skip
    """The checkpoint holds the best weights beside the present ones, and how long ago they were."""
    monkeypatch.setattr(loop, "LOG_EVERY", 1)
    watchers: list[Watcher] = []

    def watch(model: Any) -> Watcher:
        watchers.append(Watcher(model))
        return watchers[-1]

    method, schedule = (Structured(amount=0.25), OneShot()) if pruned else (None, None)
    whole, _, resumed = interrupted(
        replace(recipe, **keys, checkpoint_every=2), folder, tmp_path, 5, watch=watch, method=method, schedule=schedule,
        text=text, validation=UNSEEN,
    )  # fmt: skip
    calm, _, later = watchers
    best, last = calm.best(), max(calm.perplexity)
    assert 0 < best < 5 < last, "this must be interrupted after the best step, and before the end"
    assert later.steps == list(range(5, last + 1))  # the checkpoint is that of step 4
    assert later.perplexity == {step: value for step, value in calm.perplexity.items() if step > 4}
    assert same(weights_of(resumed.loaded.model), weights_of(whole.loaded.model))
    assert resumed.training.pruned.warnings == whole.training.pruned.warnings
    assert f"kept are the weights of step {best}, where" in resumed.training.pruned.warnings[-1]


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"validate_every": -1}, "validate_every=-1"),
        ({"patience": -1}, "patience=-1"),
        ({"validate_windows": 0}, "validate_windows=0"),
        ({"validate_every": 0, "patience": 2}, "validate_every=0 measures nothing that patience=2"),
        ({"validate_every": 0, "keep_best": True}, "validate_every=0 measures nothing that .*keep_best=True"),
    ],
)
@pytest.mark.parametrize("cls", [Finetune, Lora])
def test_a_wrong_setting_is_refused_by_its_name(cls: Any, keys: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says) as refused:
        cls(**keys)
    assert len(str(refused.value)) < 150


# The sparsity of every step.


@pytest.mark.parametrize("schedule", [Gradual(end=0.75, interval=2), Iterative(rounds=3, start=0.25)], ids=str)
def test_the_sparsity_of_a_step_is_the_fraction_of_zeros_counted_in_the_weights(
    loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schedule: Schedule
) -> None:
    monkeypatch.setattr(loop, "LOG_EVERY", 1)
    logged, counted = dict[int, float](), dict[int, float]()

    def look(step: int, values: dict[str, float]) -> None:
        if "train/sparsity" in values:
            weights = [
                module.weight
                for name, module in loaded.model.named_modules()
                if isinstance(module, nn.Linear) and ".layers." in name
            ]
            zeros, all_of_them = sum(int((w == 0).sum()) for w in weights), sum(w.numel() for w in weights)
            logged[step], counted[step] = values["train/sparsity"], zeros / all_of_them

    RECIPE.recover(loaded.model, training_of(loaded, tmp_path, look, Magnitude(amount=0.7), schedule))
    assert list(logged) == list(range(1, 25))
    assert logged == pytest.approx(counted, abs=1e-9)
    assert logged[1] == 0
    assert logged[24] == pytest.approx(0.7, abs=1e-3)


def test_the_sparsity_of_cut_units_is_the_fraction_that_is_gone(
    loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """48 channels: 48, then 42, 36, 30, 24, six steps each."""
    monkeypatch.setattr(loop, "LOG_EVERY", 1)
    logged: list[float] = []

    def look(step: int, values: dict[str, float]) -> None:
        if "train/sparsity" in values:
            assert values["train/sparsity"] == 1 - loaded.model.config.intermediate_size / 48
            logged.append(values["train/sparsity"])

    RECIPE.recover(loaded.model, training_of(loaded, tmp_path, look, Structured(amount=0.5), Iterative(rounds=4)))
    assert logged == [0.125] * 6 + [0.25] * 6 + [0.375] * 6 + [0.5] * 6


def test_the_sparsity_of_a_resumed_training_is_that_of_the_whole_one(folder: Path, tmp_path: Path) -> None:
    seen: list[dict[int, float]] = []

    def watch(model: Any) -> trainings.Log:
        mine = dict[int, float]()
        seen.append(mine)
        return lambda step, values: mine.update({step: values["train/sparsity"]} if "train/sparsity" in values else {})

    interrupted(RECIPE, folder, tmp_path, 10, watch=watch, method=Magnitude(amount=0.5), schedule=OneShot(start=4))
    whole, _, resumed = seen
    assert resumed == whole == pytest.approx({10: 0.5, 20: 0.5, 24: 0.5}, abs=1e-3)


# Gradient checkpointing.


@contextmanager
def counted(model: Any) -> Iterator[Counter[str]]:
    """How often the MLP of each block begins to compute, and how many bytes autograd keeps for the backward pass."""
    counts: Counter[str] = Counter()

    def pack(tensor: Tensor) -> Tensor:
        counts["bytes"] += tensor.numel() * tensor.element_size()
        return tensor

    blocks = Anatomy(model).blocks
    hooks = [
        block.mlp.register_forward_pre_hook(lambda module, inputs, i=i: counts.update([f"block {i}"]))
        for i, block in enumerate(blocks)
    ]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield counts
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("recipe", [RECIPE, LORA], ids=["finetune", "lora"])
def test_checkpointed_blocks_compute_twice_keep_less_and_train_the_same(
    tmp_path: Path, family: str, recipe: Finetune
) -> None:
    recipe = replace(recipe, steps=6, validate_every=0)
    folder, ends, counts = make_folder(tmp_path / family, family), [], []
    for checkpointed in (False, True):
        loaded = HubModel(name=str(folder)).load(CPU, 0)
        training = training_of(loaded, tmp_path / str(checkpointed), None, Magnitude(amount=0.5), OneShot(), steps=6)
        torch.manual_seed(3)  # GPT-2's config has dropout of its own
        with counted(loaded.model) as count:
            replace(recipe, gradient_checkpointing=checkpointed).recover(loaded.model, training)
        ends.append(weights_of(loaded.model))
        counts.append(count)
    plain, again = counts
    assert [plain["block 0"], plain["block 1"]] == [6, 6]
    assert [again["block 0"], again["block 1"]] == [12, 12]
    assert again["bytes"] < 0.7 * plain["bytes"]
    assert same(*ends)


def test_checkpointing_repeats_the_dropout_it_had(folder: Path, tmp_path: Path) -> None:
    ends = []
    for checkpointed in (False, True):
        loaded = HubModel(name=str(folder)).load(CPU, 0)
        torch.manual_seed(3)
        recipe = replace(RECIPE, steps=6, dropout=0.3, gradient_checkpointing=checkpointed)
        recipe.recover(loaded.model, training_of(loaded, tmp_path / str(checkpointed)))
        ends.append(weights_of(loaded.model))
    assert same(*ends)


def test_checkpointing_goes_on_through_prunings(folder: Path, tmp_path: Path) -> None:
    """Units cut in rounds, adapters merged in between."""
    for recipe in (RECIPE, LORA):
        ends = []
        for checkpointed in (False, True):
            loaded = HubModel(name=str(folder)).load(CPU, 0)
            place = tmp_path / f"{type(recipe).__name__}{checkpointed}"
            training = training_of(loaded, place, None, Structured(amount=0.5), Iterative(rounds=3))
            replace(recipe, gradient_checkpointing=checkpointed).recover(loaded.model, training)
            ends.append(weights_of(loaded.model))
        assert same(*ends)


@pytest.mark.parametrize("interrupted", [False, True])
def test_checkpointing_is_off_afterwards(loaded: Loaded, tmp_path: Path, interrupted: bool) -> None:
    """A training by hand computes each block once again, and no hook is left at the embedding."""
    model, recipe = loaded.model, replace(RECIPE, steps=10, gradient_checkpointing=True)
    if interrupted:
        with pytest.raises(KeyboardInterrupt):
            recipe.recover(model, training_of(loaded, tmp_path, Watcher(model, stop_at=10)))
    else:
        recipe.recover(model, training_of(loaded, tmp_path))
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert not model.get_input_embeddings()._forward_hooks
    model.train().requires_grad_(True)
    ids = torch.arange(40)[None]
    with counted(model) as count:
        model(input_ids=ids, labels=ids).loss.backward()
    assert [count["block 0"], count["block 1"]] == [1, 1]
