"""A training's state on disk: one safetensors file, written whole or not at all."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer

from prune_lab.models.anatomy import Anatomy
from prune_lab.models.resize import Shape, shape_of
from prune_lab.pruning.masks import Masks
from prune_lab.pruning.pruned import LayerRow, Pruned
from prune_lab.pruning.surgery import take_shape
from prune_lab.recovery.sharding import full
from prune_lab.system.files import atomic_write


@dataclass(frozen=True)
class Checkpoint:
    """A state read back: first the model takes its shape, then, once there is an optimizer, its values."""

    step: int
    shape: Shape
    pruned: Pruned
    best: dict[str, Any]  # what the validation remembers
    tensors: dict[str, Tensor]

    def shape_model(self, model: Any) -> None:
        """Takes out of a dense model the units and blocks that were gone."""
        take_shape(Anatomy(model), self.shape)

    def kept(self, what: str) -> dict[str, Tensor]:
        """Weights by name that were kept under that name, none where there were none."""
        prefix = f"kept/{what}/"
        return {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}

    @torch.no_grad()
    def fill(self, model: Any, optimizer: Optimizer | None) -> None:
        """Puts weights, optimizer state and random state back."""
        torch.set_rng_state(self.tensors["rng"])
        of_optimizer: dict[str, dict[str, Tensor]] = {}
        for key, value in self.tensors.items():
            if key.startswith("optimizer/"):
                _, field, name = key.split("/", 2)
                of_optimizer.setdefault(name, {})[field] = value
        for name in _stored_buffers(model):
            model.get_buffer(name).copy_(self.tensors[f"buffer/{name}"])
        for name, weight in model.named_parameters():
            weight.copy_(self.tensors[f"weight/{name}"])
            if optimizer is None:
                continue
            optimizer.state[weight] = {field: v.to(weight.device) for field, v in of_optimizer.get(name, {}).items()}


def _stored_buffers(model: Any) -> list[str]:
    """Names of the buffers that files hold, such as what the choices of a router are corrected by."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return [name for name in model.state_dict() if name not in parameters]


def save(
    path: Path, step: int, model: Any, optimizer: Optimizer | None, pruned: Pruned, *,
    kept: dict[str, dict[str, Tensor]], best: dict[str, Any], writes: bool = True,
) -> None:  # fmt: skip
    """Writes weights, shape, optimizer state, masks and random state after `step` steps, and other weights it needs.

    kept: those to go back to and the best ones, each by name. best: what the validation remembers beside them.
    What is sharded is put together, a tensor at a time, for which every process calls this; one of them `writes`.
    """
    spread = {f"buffer/{name}": model.get_buffer(name) for name in _stored_buffers(model)}
    for name, weight in model.named_parameters():
        spread[f"weight/{name}"] = weight.detach()
        of_weight = {} if optimizer is None else optimizer.state.get(weight, {})
        for key, value in of_weight.items():
            spread[f"optimizer/{key}/{name}"] = value
    spread |= {f"kept/{what}/{name}": value for what, of in kept.items() for name, value in of.items()}
    tensors = {"rng": torch.get_rng_state()}
    tensors |= {
        f"file/{name}": torch.frombuffer(bytearray(text), dtype=torch.uint8) for name, text in pruned.files.items()
    }
    tensors |= {f"mask/{name}": mask.contiguous() for name, mask in pruned.masks.keep.items()}
    for key, value in spread.items():
        whole = full(value)
        if writes:
            tensors[key] = whole.cpu().contiguous()
    if not writes:
        return
    facts = {
        "step": step,
        "best": best,
        "shape": asdict(shape_of(Anatomy(model))),
        "rows": [asdict(row) for row in pruned.rows],
        "notes": pruned.warnings,
        "metrics": pruned.metrics,
        "counted": pruned.counted,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as half:
        save_file(tensors, half, metadata={"training": json.dumps(facts)})


def read(path: Path) -> Checkpoint | None:
    """The state in `path`, or None where there is none."""
    if not path.exists():
        return None
    with safe_open(path, framework="pt") as file:
        facts = json.loads(file.metadata()["training"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no dictionary
    masks = {key.removeprefix("mask/"): tensors.pop(key) for key in list(tensors) if key.startswith("mask/")}
    rows = [LayerRow(**row) for row in facts["rows"]]
    files = {key.removeprefix("file/"): tensors.pop(key) for key in list(tensors) if key.startswith("file/")}
    texts = {name: bytes(content.tolist()) for name, content in files.items()}
    pruned = Pruned(rows, Masks(masks), facts["notes"], texts, metrics=facts["metrics"])
    pruned.counted = facts["counted"] and tuple(facts["counted"])
    return Checkpoint(facts["step"], Shape(**facts["shape"]), pruned, facts["best"], tensors)
