"""Our training loop beside a bare PyTorch loop of the same model, with and without masks to hold.

python tests/benchmarks/training_loop.py

Medians of interleaved repeats, by wall time and by process time, which others on the machine disturb less.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from prune_lab.methods.magnitude import Magnitude
from prune_lab.models.anatomy import Anatomy
from prune_lab.models.load import Tiny
from prune_lab.pruning.pruned import Pruned
from prune_lab.recovery.context import TrainingContext
from prune_lab.recovery.finetune import Finetune
from prune_lab.recovery.losses import next_token_loss
from prune_lab.recovery.order import WindowOrder
from prune_lab.schedules import Event
from prune_lab.system import device as devices
from prune_lab.system.console import Console
from prune_lab.text.stdlib import Stdlib
from prune_lab.text.tokens import Tokens

STEPS, BATCH, SEQ_LEN, REPEATS = 8, 8, 256, 5


def bare(model: torch.nn.Module, tokens: Tokens) -> None:
    """The least that trains so: batches, loss, backward, clipping, AdamW."""
    for weight in model.parameters():
        weight.requires_grad_(True)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    order = WindowOrder(tokens.stream("train"), SEQ_LEN, BATCH, 0)
    enabled = devices.native_bfloat16(torch.device("cpu"))
    for step in range(STEPS):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = next_token_loss()(model, order.batch(step)).total
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


if __name__ == "__main__":
    device = devices.resolve("cpu", "float32")
    loaded = Tiny().load(device, seed=0)
    tokens = Tokens(Stdlib().corpus(), loaded.tokenizer)
    tokens.stream("train")
    masks = Magnitude(amount=0.5).prune(Anatomy(loaded.model), 0.5, seed=0).masks
    recipe = Finetune(steps=STEPS, batch_size=BATCH, checkpoint_every=10**6, validate_every=0)
    names = ("bare", "ours", "ours with masks")
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as place:
        for repeat in range(REPEATS + 1):
            for name in names[::-1] if repeat % 2 else names:
                began = time.perf_counter(), time.process_time()
                if name == "bare":
                    bare(loaded.model, tokens)
                else:
                    training = TrainingContext(
                        dense=loaded,
                        tokens=tokens,
                        seq_len=SEQ_LEN,
                        events=[Event(0, 0.5)] if "masks" in name else [],
                        prune=lambda amount: Pruned(masks=masks),
                        device=device,
                        seed=0,
                        console=Console(),
                        checkpoint=Path(place) / "none.safetensors",
                        log=lambda step, figures: None,
                    )
                    recipe.recover(loaded.model, training)
                if repeat:  # the first is the warm-up
                    seconds[name].append((time.perf_counter() - began[0], time.process_time() - began[1]))
    print(f"torch {torch.__version__}, threads: {torch.get_num_threads()}\n")
    print("| loop | tokens/s | speed by wall time | by process time | beside |\n|---|---|---|---|---|")
    for name, beside in (("bare", "bare"), ("ours", "bare"), ("ours with masks", "bare"), ("ours with masks", "ours")):
        pairs = list(zip(seconds[beside], seconds[name], strict=True))
        wall, work = (f"{median(a[i] / b[i] for a, b in pairs):.3f} x" for i in (0, 1))
        speed = STEPS * BATCH * SEQ_LEN / median(one for one, _ in seconds[name])
        print(f"| {name} | {speed:.0f} | {wall} | {work} | {beside} |")
