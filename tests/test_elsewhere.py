"""An export goes on in other people's training: the Trainer of transformers, TRL's SFT, LoRA of PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CPU, make_folder, story
from transformers import AutoModelForCausalLM, AutoTokenizer

from prune_lab.methods.magnitude import Magnitude
from prune_lab.methods.structured import Structured
from prune_lab.models.anatomy import Anatomy
from prune_lab.models.export import save_model
from prune_lab.models.load import HubModel
from prune_lab.recovery.hold_zeros import HoldZeros

TEXTS = [story(seed, 6) for seed in range(24)]


def exported(tmp_path: Path, method: Any) -> Path:
    loaded = HubModel(name=str(make_folder(tmp_path / "made"))).load(CPU, seed=0)
    method.prune(Anatomy(loaded.model), method.amount, 0)
    save_model(loaded, tmp_path / "export")
    return tmp_path / "export"


def zeros(model: Any) -> int:
    return sum(int((linear.weight == 0).sum()) for _, linear in Anatomy(model).linears())


def train(folder: Path, place: Path, callbacks: list[Any]) -> tuple[Any, float, float]:
    """The model after 6 steps of the Trainer of transformers, and its loss before and after."""
    from transformers import Trainer, TrainingArguments

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    rows = [{"input_ids": (ids := tokenizer(text)["input_ids"][:48]), "labels": ids} for text in TEXTS]
    rows = [row for row in rows if len(row["input_ids"]) == 48]
    arguments = TrainingArguments(
        str(place), max_steps=6, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True, weight_decay=0.1,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:4], callbacks=callbacks)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    return model, before, trainer.evaluate()["eval_loss"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_structured_export_goes_on_in_the_trainer_of_transformers(tmp_path: Path) -> None:
    folder = exported(tmp_path, Structured(units=("mlp", "heads"), amount=0.5))
    model, before, after = train(folder, tmp_path / "trained", [])
    assert after < before
    model.save_pretrained(tmp_path / "again")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "again")
    again = HubModel(name=str(tmp_path / "again")).load(CPU, seed=0)
    assert all(torch.equal(own, model.state_dict()[name]) for name, own in again.model.state_dict().items())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_zeros_are_lost_there_unless_they_are_held(tmp_path: Path) -> None:
    folder = exported(tmp_path, Magnitude(amount=0.5))
    pruned = zeros(AutoModelForCausalLM.from_pretrained(folder))
    held, before, after = train(folder, tmp_path / "held", [HoldZeros()])
    assert zeros(held) == pruned > 0
    assert after < before
    lost, _, _ = train(folder, tmp_path / "lost", [])
    assert zeros(lost) == 0
    with pytest.raises(ValueError, match="was not pruned in single weights"):
        train(tmp_path / "made", tmp_path / "dense", [HoldZeros()])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("with_lora", [False, True], ids=["whole", "with LoRA"])
def test_an_export_goes_on_in_trl(with_lora: bool, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="trl is not installed")
    from datasets import Dataset

    folder = exported(tmp_path, Magnitude(amount=0.5))
    more: dict[str, Any] = {"callbacks": [HoldZeros()]}
    if with_lora:
        peft = pytest.importorskip("peft", reason="peft is not installed")
        more = {"peft_config": peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")}
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    arguments = trl.SFTConfig(
        str(tmp_path / "trl"), max_steps=4, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[],
        use_cpu=True, save_strategy="no", disable_tqdm=True, max_length=48, bf16=False,
    )  # fmt: skip
    dataset = Dataset.from_dict({"text": TEXTS})
    trainer = trl.SFTTrainer(model, arguments, train_dataset=dataset, processing_class=tokenizer, **more)
    pruned = zeros(AutoModelForCausalLM.from_pretrained(folder))
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    if not with_lora:
        assert zeros(trainer.model) == pruned
    else:
        merged = trainer.model.merge_and_unload()
        assert zeros(merged) < pruned  # the adapter's product fills the zeros of what it is merged into
        others = [linear.weight for name, linear in Anatomy(merged).linears() if name.endswith("up_proj")]
        assert all(bool((weight == 0).any()) for weight in others)
    assert all(loss == loss for loss in losses)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_lora_of_peft_fits_what_is_left_of_a_model(tmp_path: Path) -> None:
    """Its adapters have the shapes of the pruned matrices, and are saved and read with the export as their base."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    folder = exported(tmp_path, Structured(units=("mlp", "heads"), amount=0.5))
    model = AutoModelForCausalLM.from_pretrained(folder)
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW((p for p in tuned.parameters() if p.requires_grad), lr=1e-2)
    ids = torch.randint(300, (4, 24), generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(5):
        loss = tuned(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    tuned.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")
    with torch.no_grad():
        assert torch.allclose(again(input_ids=ids).logits, tuned.eval()(input_ids=ids).logits, atol=1e-5)
