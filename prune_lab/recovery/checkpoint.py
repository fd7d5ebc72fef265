"""A training's state on disk: one safetensors file, written whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.optim import Optimizer


def save(path: Path, step: int, model: Any, optimizer: Optimizer) -> None:
    """Writes weights, optimizer state and random state after `step` steps."""
    tensors = {"rng": torch.get_rng_state()}
    for name, weight in model.named_parameters():
        tensors[f"weight/{name}"] = weight.detach().contiguous()
        for key, value in optimizer.state[weight].items():
            tensors[f"optimizer/{key}/{name}"] = value.contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    save_file(tensors, half, metadata={"training": json.dumps({"step": step})})
    half.replace(path)


@torch.no_grad()
def restore(path: Path, model: Any, optimizer: Optimizer) -> int:
    """Puts the state of `path` back and returns its step; 0 where there is no checkpoint."""
    if not path.exists():
        return 0
    with safe_open(path, framework="pt") as file:
        torch.set_rng_state(file.get_tensor("rng"))
        keys = set(file.keys())
        for name, weight in model.named_parameters():
            weight.copy_(file.get_tensor(f"weight/{name}"))
            stored = [key for key in keys if key.startswith("optimizer/") and key.split("/", 2)[2] == name]
            optimizer.state[weight] = {key.split("/", 2)[1]: file.get_tensor(key).to(weight.device) for key in stored}
        step: int = json.loads(file.metadata()["training"])["step"]
    return step
