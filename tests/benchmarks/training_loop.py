"""Our training loop beside a bare PyTorch loop of the same model, with and without masks to hold."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from prune_lab import device as devices
from prune_lab.console import Console
from prune_lab.methods.magnitude import Magnitude
from prune_lab.models.anatomy import Anatomy
from prune_lab.models.load import Tiny
from prune_lab.pruning.masks import Masks
from prune_lab.recovery.base import Training
from prune_lab.recovery.finetune import Finetune, next_token_loss
from prune_lab.recovery.order import WindowOrder
from prune_lab.text.stdlib import Stdlib
from prune_lab.text.tokens import Tokens

STEPS, BATCH, SEQ_LEN, REPEATS = 8, 8, 256, 3


def bare(model: torch.nn.Module, tokens: Tokens) -> None:
    """The least that trains: batches, loss, backward, AdamW."""
    for weight in model.parameters():
        weight.requires_grad_(True)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    order = WindowOrder(tokens.stream("train"), SEQ_LEN, BATCH, 0)
    enabled = devices.native_bfloat16(torch.device("cpu"))
    for step in range(STEPS):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = next_token_loss(model, order.batch(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


if __name__ == "__main__":
    device = devices.resolve("cpu", "float32")
    loaded = Tiny().load(device, seed=0)
    tokens = Tokens(Stdlib().corpus(), loaded.tokenizer)
    tokens.stream("train")
    masks = Magnitude(amount=0.5).prune(Anatomy(loaded.model), 0.5, seed=0).masks
    recipe = Finetune(steps=STEPS, batch_size=BATCH, checkpoint_every=10**6)
    seconds: dict[str, list[float]] = {"bare": [], "ours": [], "ours with masks": []}
    with tempfile.TemporaryDirectory() as place:
        for _ in range(REPEATS):
            for name in seconds:
                began = time.perf_counter()
                if name == "bare":
                    bare(loaded.model, tokens)
                else:
                    held = masks if "masks" in name else Masks()
                    checkpoint = Path(place) / "none.safetensors"
                    recipe.recover(
                        loaded.model,
                        Training(tokens, SEQ_LEN, held, device, 0, Console(), checkpoint, lambda step, figures: None),
                    )
                seconds[name].append(time.perf_counter() - began)
    for name in ("ours", "ours with masks"):
        ratio = median(a / b for a, b in zip(seconds[name], seconds["bare"], strict=True))
        print(f"{name} / bare loop: {ratio:.3f}")
