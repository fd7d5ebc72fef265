"""Training: the loop is AdamW and nothing else, goes on where it was cut off, and keeps pruned weights at zero."""

from __future__ import annotations

import itertools
import math
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CPU, make_folder, story
from safetensors.torch import load_file
from torch import Tensor
from trainings import half_masks, same, step_of, training_of, weights_of
from warm import Running, start_module

from prune_lab.errors import Refused
from prune_lab.models.load import HubModel, Loaded
from prune_lab.recovery import train as loop
from prune_lab.recovery.distill import Distill
from prune_lab.recovery.dropout import residual_dropout
from prune_lab.recovery.finetune import Finetune
from prune_lab.recovery.losses import soft_losses
from prune_lab.recovery.none import NoRecovery
from prune_lab.recovery.optimizer import lr_factor
from prune_lab.recovery.order import WindowOrder
from prune_lab.system.device import Device
from prune_lab.text.corpus import Documents
from prune_lab.text.tokens import Tokens

SHORT = Finetune(steps=24, lr=0.003, batch_size=4, warmup=0.1, autocast="none", checkpoint_every=4)


def factor(step: int, recipe: Finetune) -> float:
    """The fraction of the peak learning rate at a step."""
    return lr_factor(step, recipe.steps, recipe.warmup, recipe.final_lr)


def test_the_loss_falls(loaded: Loaded, tmp_path: Path) -> None:
    unseen = torch.tensor(loaded.tokenizer(story(99))["input_ids"])[:512].view(16, 32)

    @torch.no_grad()
    def loss() -> float:
        """What transformers itself says of unseen text."""
        return float(loaded.model(input_ids=unseen, labels=unseen).loss)

    seen: dict[int, dict[str, float]] = {}
    before = loss()
    replace(SHORT, steps=60).recover(loaded.model, training_of(loaded, tmp_path, seen.__setitem__))
    assert loss() < 0.7 * before
    assert list(seen) == [10, 20, 30, 40, 50, 60]
    assert seen[60]["train/loss"] < seen[10]["train/loss"]


def test_the_loop_is_a_plain_pytorch_loop(folder: Path, tmp_path: Path) -> None:
    """Five steps by hand: torch's AdamW, transformers' own loss, the same batches."""
    ours, bare = (HubModel(name=str(folder)).load(CPU, 0) for _ in range(2))
    recipe = Finetune(steps=5, lr=0.002, batch_size=3, warmup=0.4, final_lr=0.2, clip_norm=0.5, autocast="none")
    training = training_of(ours, tmp_path)
    recipe.recover(ours.model, training)

    model = bare.model.train().requires_grad_(True)
    matrices = [weight for weight in model.parameters() if weight.ndim == 2]
    norms = [weight for weight in model.parameters() if weight.ndim == 1]
    assert len(matrices) + len(norms) == len(list(model.parameters()))
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}], betas=(0.9, 0.95), eps=1e-8
    )
    order = WindowOrder(training.tokens.stream("train"), 32, 3, 0)
    clipped = []
    for step in range(5):
        for group in optimizer.param_groups:
            group["lr"] = 0.002 * factor(step, recipe)
        batch = order.batch(step)
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        norm = math.sqrt(sum(float(weight.grad.pow(2).sum()) for weight in model.parameters()))
        clipped.append(norm > 0.5)
        for weight in model.parameters():
            weight.grad.mul_(min(1.0, 0.5 / (norm + 1e-6)))
        optimizer.step()
    assert any(clipped)
    start = weights_of(HubModel(name=str(folder)).load(CPU, 0).model)
    for name, weight in weights_of(bare.model).items():
        assert (weight - start[name]).abs().max() > 1e-3, f"{name} has not moved"
        torch.testing.assert_close(weights_of(ours.model)[name], weight, rtol=0, atol=1e-6)


def test_the_learning_rate_by_hand() -> None:
    recipe = Finetune(steps=101, warmup=0.1, final_lr=0.2)  # 11 steps of warm-up, then 90 of decay
    assert factor(0, recipe) == pytest.approx(1 / 11)
    assert factor(4, recipe) == pytest.approx(5 / 11)
    assert factor(10, recipe) == 1.0
    assert factor(11, recipe) == 1.0
    assert factor(11 + 45, recipe) == pytest.approx(0.6, abs=0.02)  # half way between 1 and 0.2
    factors = [factor(step, recipe) for step in range(11, 101)]
    assert factors == sorted(factors, reverse=True)
    assert factor(0, Finetune(steps=10, warmup=0.0)) == 1.0
    assert factor(0, Finetune(steps=1)) == 1.0


@pytest.mark.parametrize(("steps", "warmup"), [(10, 0.0), (10, 0.2), (101, 0.1)])
def test_the_last_step_has_the_final_learning_rate(steps: int, warmup: float) -> None:
    """conf/recovery/finetune.yaml: final_lr is the fraction of lr at the last step."""
    assert factor(steps - 1, Finetune(steps=steps, warmup=warmup, final_lr=0.2)) == pytest.approx(0.2)


@pytest.mark.parametrize(("steps", "warmup", "expected"), [(100, 0.07, 7), (100, 0.29, 29), (200, 0.05, 10)])
def test_a_fraction_of_the_steps_is_not_rounded_up_by_float_noise(steps: int, warmup: float, expected: int) -> None:
    recipe = Finetune(steps=steps, warmup=warmup)
    assert factor(expected - 1, recipe) == 1.0


class Interrupter:
    """A log callback that interrupts at a step, and keeps the steps that it heard of."""

    def __init__(self, at: int | None = None) -> None:
        self.at, self.steps = at, []  # type: int | None, list[int]

    def __call__(self, step: int, values: dict[str, float]) -> None:
        self.steps.append(step)
        if step == self.at:
            raise KeyboardInterrupt


def test_a_resumed_training_does_only_the_steps_that_are_left(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "LOG_EVERY", 1)
    first, second = (HubModel(name=str(folder)).load(CPU, 0) for _ in range(2))
    with pytest.raises(KeyboardInterrupt):
        SHORT.recover(first.model, training_of(first, tmp_path, Interrupter(at=19)))
    heard = Interrupter()
    SHORT.recover(second.model, training_of(second, tmp_path, heard))
    assert heard.steps == list(range(17, 25))  # the checkpoint is that of step 16


def test_a_checkpoint_is_safetensors_and_replaced_whole(loaded: Loaded, tmp_path: Path) -> None:
    checkpoint = tmp_path / "training/training.safetensors"
    with pytest.raises(KeyboardInterrupt):
        SHORT.recover(loaded.model, training_of(loaded, tmp_path, Interrupter(at=10)))
    assert [path.name for path in checkpoint.parent.iterdir()] == ["training.safetensors"]
    older = tmp_path / "older.safetensors"
    older.hardlink_to(checkpoint)  # the file itself: writing into it would show here
    before = load_file(older)
    assert {f"weight/{name}" for name, _ in loaded.model.named_parameters()} < before.keys()
    SHORT.recover(loaded.model, training_of(loaded, tmp_path))
    assert same(load_file(older), before)
    assert (step_of(older), step_of(checkpoint)) == (8, 24)
    assert [path.name for path in checkpoint.parent.iterdir()] == ["training.safetensors"]


def seen_steps(process: Running, cache: Path) -> Iterator[int]:
    """The steps of the checkpoints that a process leaves, as they appear, until it ends."""
    deadline = time.monotonic() + 100
    while process.poll() is None and time.monotonic() < deadline:
        for path in cache.glob("training/*/training.safetensors"):
            try:
                yield step_of(path)
            except (FileNotFoundError, RuntimeError):  # torch, which reads it, says the latter
                if path.exists():
                    raise
                continue  # the run has finished and cleaned up
        time.sleep(0.01)


def test_a_killed_process_goes_on_and_exports_the_same_model(small: list[str], tmp_path: Path) -> None:
    """SIGKILL in the middle of training, then the same command again."""
    arguments = [
        *small, "measure=quality_only", "tracking=none", "export=hf", "recovery=finetune", "recovery.steps=100",
        "recovery.batch_size=4", "recovery.lr=0.003", "recovery.checkpoint_every=5", "recovery.autocast=none",
    ]  # fmt: skip

    def start(name: str, cache: Path) -> Running:
        log, own = tmp_path / f"{name}.log", [f"hydra.run.dir={tmp_path / name}"]
        return start_module("prune_lab", [*arguments, *own], tmp_path, [log, log], PRUNE_LAB_CACHE=str(cache))

    def export_of(name: str) -> dict[str, Tensor]:
        return load_file(tmp_path / name / "export/model.safetensors")

    calm, cache = tmp_path / "calm_cache", tmp_path / "killed_cache"
    undisturbed = start("calm", calm)
    assert undisturbed.wait(100) == 0, (tmp_path / "calm.log").read_text()

    victim = start("killed", cache)
    killed_after = next(seen_steps(victim, cache), None)
    victim.send_signal(signal.SIGKILL)
    assert victim.wait(10) == -signal.SIGKILL, (tmp_path / "killed.log").read_text()
    assert killed_after is not None
    assert killed_after < 100
    assert not (tmp_path / "killed/export").exists()
    left = step_of(next(cache.glob("training/*/training.safetensors")))

    second = start("again", cache)
    steps = list(seen_steps(second, cache))
    assert second.wait(10) == 0, (tmp_path / "again.log").read_text()
    assert min(steps) >= left  # from scratch, a checkpoint of an earlier step would have appeared
    assert same(export_of("again"), export_of("calm"))
    assert not list(cache.glob("training/*/*"))  # a finished run keeps no checkpoint


def test_pruned_weights_are_zero_after_every_step(
    loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AdamW's momentum moves a zero weight, so masks are held again after each step."""
    monkeypatch.setattr(loop, "LOG_EVERY", 1)
    masks = half_masks(loaded.model)
    masks.hold(loaded.model)
    start = weights_of(loaded.model)
    checked: list[int] = []

    def check(step: int = -1, values: dict[str, float] | None = None) -> None:
        for name, keep in masks.keep.items():
            weight = loaded.model.get_submodule(name).weight
            assert (weight[~keep] == 0).all(), f"{name} at step {step}"
            assert (weight[keep] != 0).float().mean() > 0.99
        checked.append(step)

    replace(SHORT, steps=8, weight_decay=0.5, warmup=0.0).recover(
        loaded.model, training_of(loaded, tmp_path, check, masks=masks)
    )
    assert checked == list(range(1, 9))
    check()
    for name, weight in weights_of(loaded.model).items():
        assert not torch.equal(weight, start[name]), f"{name} has not been trained"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_leaves_a_model_ready_to_measure(folder: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    """In its former number type, in eval mode, without gradients; the rotary frequencies as they were."""
    device = Device(torch.device("cpu"), dtype)
    loaded = HubModel(name=str(folder)).load(device, 0)
    buffers = {name: buffer.clone() for name, buffer in loaded.model.named_buffers()}
    assert buffers
    assert all(buffer.dtype == torch.float32 for buffer in buffers.values())
    during: list[torch.dtype] = []

    def log(step: int, values: dict[str, float]) -> None:
        during.extend({weight.dtype for weight in loaded.model.parameters()})

    masks = half_masks(loaded.model)
    replace(SHORT, steps=2).recover(loaded.model, training_of(loaded, tmp_path, log, masks=masks, device=device))
    assert during == [torch.float32]
    assert {weight.dtype for weight in loaded.model.parameters()} == {dtype}
    assert same(buffers, dict(loaded.model.named_buffers()))
    assert all(buffer.dtype == torch.float32 for buffer in loaded.model.buffers())
    assert not any(module.training for module in loaded.model.modules())
    assert not any(weight.requires_grad for weight in loaded.model.parameters())
    assert loaded.model.lm_head.weight is loaded.model.get_input_embeddings().weight  # still tied
    for name, keep in masks.keep.items():
        assert (loaded.model.get_submodule(name).weight[~keep] == 0).all()


def test_autocast_computes_in_bfloat16_and_keeps_float32_weights(loaded: Loaded, tmp_path: Path) -> None:
    seen: list[torch.dtype] = []
    hook = loaded.model.model.layers[0].mlp.up_proj.register_forward_hook(lambda m, x, y: seen.append(y.dtype))
    replace(SHORT, steps=1, autocast="bfloat16").recover(loaded.model, training_of(loaded, tmp_path))
    hook.remove()
    assert seen == [torch.bfloat16]
    assert all(weight.dtype == torch.float32 for weight in loaded.model.parameters())


def test_dropout_zeroes_what_is_added_to_the_residual_stream(loaded: Loaded) -> None:
    """Half of it, the rest doubled, in every block and after the embedding; and nothing is left of it afterwards."""
    model, ids = loaded.model, torch.arange(40)[None]
    seen: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        return lambda module, inputs, output: seen.__setitem__(name, output)

    names = ["model.embed_tokens"]
    names += [f"model.layers.{i}.{part}" for i in (0, 1) for part in ("mlp.down_proj", "self_attn.o_proj")]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        torch.manual_seed(0)
        with residual_dropout(model, 0.5):
            assert torch.equal(model(input_ids=ids).logits, expected)  # in eval mode, where pruning looks at it
            model.train()
            hooks = [model.get_submodule(name).register_forward_hook(watch(name)) for name in names]
            first = model(input_ids=ids).logits
            embedded = seen["model.embed_tokens"]
            second = model(input_ids=ids).logits
        model.eval()
        for hook in hooks:
            hook.remove()
        for name in names:
            assert float((seen[name] == 0).float().mean()) == pytest.approx(0.5, abs=0.1), name
        kept = embedded != 0
        table = model.get_input_embeddings().weight[ids]
        torch.testing.assert_close(embedded[kept], 2 * table[kept])
        assert not torch.equal(first, second)
        with residual_dropout(model, 0.0):
            assert torch.equal(model(input_ids=ids).logits, expected)
        assert torch.equal(model(input_ids=ids).logits, expected)


def test_no_recovery_changes_nothing(loaded: Loaded, tmp_path: Path) -> None:
    before = weights_of(loaded.model)
    NoRecovery().recover(loaded.model, training_of(loaded, tmp_path))
    assert same(before, weights_of(loaded.model))


def windows_of_pass(order: WindowOrder, batch_size: int, number: int) -> list[int]:
    """First tokens of a pass's windows, in order, from a stream that counts."""
    first = number * order.windows_per_pass
    rows = range(first, first + order.windows_per_pass)
    return [int(order.batch(row // batch_size)[row % batch_size, 0]) for row in rows]


@pytest.mark.parametrize(("tokens", "seq_len"), [(1000, 32), (96, 32), (127, 32), (32, 32), (63, 32), (64, 2)])
def test_a_pass_reads_disjoint_windows(tokens: int, seq_len: int) -> None:
    order = WindowOrder(torch.arange(tokens), seq_len, 4, seed=3)
    for batch in map(order.batch, range(10)):
        assert batch.shape == (4, seq_len)
        assert torch.equal(batch, batch[:, :1] + torch.arange(seq_len))  # whole, and in the text's order
        assert 0 <= int(batch.min()) <= int(batch.max()) < tokens
    starts = sorted(windows_of_pass(order, 4, 1))
    assert all(later - earlier == seq_len for earlier, later in itertools.pairwise(starts))
    assert len(starts) * seq_len > tokens - 2 * seq_len  # all but the ends is read


def test_the_order_depends_on_seed_and_step_alone() -> None:
    stream = torch.arange(1000)
    forward = [WindowOrder(stream, 32, 4, seed=1).batch(step) for step in range(20)]
    order = WindowOrder(stream, 32, 4, seed=1)
    for step in (19, 3, 3, 11, 0, 18, 7):
        assert torch.equal(order.batch(step), forward[step])
    assert not torch.equal(WindowOrder(stream, 32, 4, seed=2).batch(0), forward[0])


def test_passes_differ_in_order_and_cut() -> None:
    order = WindowOrder(torch.arange(1000), 32, 4, seed=1)
    passes = [windows_of_pass(order, 4, number) for number in range(4)]
    assert len({tuple(starts) for starts in passes}) == 4
    assert len({min(starts) % 32 for starts in passes}) > 1
    assert passes[0] != sorted(passes[0])


def test_every_seed_that_a_run_may_have_gives_an_order() -> None:
    """seed is allowed up to 2^63."""
    assert WindowOrder(torch.arange(100), 8, 2, seed=2**63 - 1).batch(5).shape == (2, 8)


def test_too_little_training_text_is_refused(loaded: Loaded, tmp_path: Path) -> None:
    tokens = Tokens(Documents("scrap", ("the cat",), (), (), ()), loaded.tokenizer)
    with pytest.raises(Refused, match=r"dataset\.seq_len=32: the train split of .* has only \d+ tokens") as refused:
        SHORT.recover(loaded.model, training_of(loaded, tmp_path, tokens=tokens))
    assert len(str(refused.value)) < 200


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("steps", 0), ("steps", -1), ("lr", 0.0), ("lr", 1.0), ("lr", -0.1), ("lr", math.nan), ("batch_size", 0),
        ("warmup", -0.1), ("warmup", 1.1), ("final_lr", 2.0), ("weight_decay", -1.0), ("weight_decay", math.nan),
        ("beta1", 1.0), ("beta2", -0.1), ("clip_norm", 0.0), ("clip_norm", math.nan), ("dropout", 1.0),
        ("dropout", -0.1), ("autocast", "float16"),
        ("checkpoint_every", 0),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_refused_by_its_name(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{key}=") as refused:
        Finetune(**{key: value})
    assert len(str(refused.value)) < 120


# Distillation.


def test_the_soft_loss_by_hand() -> None:
    """Two tokens over three words, with plain exponentials; averaged over tokens, not over the vocabulary."""
    student, teacher, temperature = [[1.0, 0.0, -1.0], [0.0, 2.0, 0.5]], [[0.5, 0.5, 0.0], [1.0, 1.0, -1.0]], 2.0

    def softened(logits: list[float]) -> list[float]:
        powers = [math.exp(value / temperature) for value in logits]
        return [power / sum(powers) for power in powers]

    divergences = [
        sum(p * math.log(p / q) for p, q in zip(softened(wanted), softened(found), strict=True))
        for found, wanted in zip(student, teacher, strict=True)
    ]
    expected = temperature**2 * sum(divergences) / 2
    found = soft_losses(torch.tensor(student), torch.tensor(teacher), temperature)
    assert float(found.mean()) == pytest.approx(expected)


def test_alpha_0_is_finetune_and_alpha_1_never_looks_at_the_text(folder: Path, tmp_path: Path) -> None:
    plain, hard, soft = (HubModel(name=str(folder)).load(CPU, 0) for _ in range(3))
    SHORT.recover(plain.model, training_of(plain, tmp_path / "plain"))
    teacher = HubModel(name=str(folder)).load(CPU, 0)
    keys = {"steps": 24, "lr": 0.003, "batch_size": 4, "warmup": 0.1, "autocast": "none", "weight_decay": 0.1}
    Distill(**keys, alpha=0.0).recover(hard.model, training_of(hard, tmp_path / "hard", dense=teacher))
    assert same(weights_of(hard.model), weights_of(plain.model))
    losses: list[float] = []
    Distill(**keys, alpha=1.0).recover(
        soft.model,
        training_of(soft, tmp_path / "soft", lambda step, values: losses.append(values["train/loss"]), dense=teacher),
    )
    assert len(losses) == 3
    assert max(losses) < 5e-2  # its own teacher has nothing to teach it, where the text has 5 nats


def test_a_pruned_student_comes_closer_to_its_teacher(folder: Path, tmp_path: Path) -> None:
    """And the teacher is as it was, in eval mode, without gradients."""
    teacher, student = (HubModel(name=str(folder)).load(CPU, 0) for _ in range(2))
    masks, before = half_masks(student.model), weights_of(teacher.model)
    masks.hold(student.model)
    tokens = torch.randint(300, (4, 32), generator=torch.Generator().manual_seed(2))

    def apart() -> float:
        with torch.no_grad():
            found, wanted = (model(input_ids=tokens).logits.flatten(0, 1) for model in (student.model, teacher.model))
        return float(soft_losses(found, wanted, 1.0).mean())

    was = apart()
    recipe = Distill(steps=60, lr=0.003, batch_size=4, warmup=0.1, autocast="none", alpha=1.0)
    recipe.recover(student.model, training_of(student, tmp_path, masks=masks, dense=teacher))
    assert apart() < 0.9 * was
    assert same(weights_of(teacher.model), before)
    assert not teacher.model.training
    assert all(weight.grad is None for weight in teacher.model.parameters())
    for name, keep in masks.keep.items():
        assert (student.model.get_submodule(name).weight[~keep] == 0).all()


def test_another_teacher_must_have_the_same_tokenizer(loaded: Loaded, tmp_path: Path) -> None:
    """Refused when a run looks at what it is made of, before anything is measured."""
    other = make_folder(tmp_path / "other", vocab_size=310)
    with pytest.raises(Refused, match=r"recovery\.teacher='.*other' has another tokenizer \(vocabulary of 310\)"):
        Distill(teacher=str(other)).hashes(loaded, CPU)


def test_another_teacher_is_part_of_what_a_run_is(folder: Path, tmp_path: Path) -> None:
    first, second = Distill(teacher=str(folder)), Distill(teacher=str(make_folder(tmp_path / "second", seed=1)))
    dense = HubModel(name=str(folder)).load(CPU, 0)
    assert Distill().hashes(dense, CPU) == {}
    assert first.hashes(dense, CPU)["teacher_weights"] != second.hashes(dense, CPU)["teacher_weights"]
