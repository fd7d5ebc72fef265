"""Peak memory of inference.

On a GPU: the allocator's peak. On a CPU: the peak resident memory of a fresh process that reads the export
and runs a prefill and a decode, less what the same process held before loading (run as
`python -m prune_lab.measure.memory FOLDER PROMPT_TOKENS DECODE_TOKENS THREADS MODULE CLASS KEYS`, the last three those
of the export that reads FOLDER; it prints bytes).
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prune_lab.export.base import Export
from prune_lab.measure.inference import decode, prefill
from prune_lab.measure.settings import Measure
from prune_lab.measure.size import MB, held_bytes
from prune_lab.models.families import FAMILIES
from prune_lab.system.device import Device
from prune_lab.system.resident import peak, reset_peak

# glibc then gives freed pages back at once instead of keeping them in per-thread pools: four runs on a model of 11 MB
# spread over 0.3 MB instead of 5 MB.
EXACT_ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def measure_memory(
    model: Any, folder: Path, export: Export, prompt: Tensor, settings: Measure, device: Device
) -> float:
    """Peak memory in mb of loading and running `model`, which `export` wrote into `folder`."""
    if device.is_cuda:
        return _peak_of_allocator(model, prompt.to(device.torch_device), settings.decode_tokens, device) / MB
    arguments = [folder, prompt.shape[1], settings.decode_tokens, torch.get_num_threads()]
    arguments += [type(export).__module__, type(export).__qualname__, json.dumps(asdict(export))]
    command = [sys.executable, "-m", __name__, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | EXACT_ALLOCATOR)
    if done.returncode:
        raise RuntimeError(f"the process that measures memory failed: {done.stderr.strip()[-500:]}")
    return int(done.stdout.split()[-1]) / MB


def _peak_of_allocator(model: Any, prompt: Tensor, decode_tokens: int, device: Device) -> int:
    """The model's weights plus what inference adds to them; other models may lie on the GPU."""
    device.synchronize()
    before = torch.cuda.memory_allocated(device.torch_device)
    torch.cuda.reset_peak_memory_stats(device.torch_device)
    decode(model, prefill(model, prompt), decode_tokens)
    device.synchronize()
    weights = sum(held_bytes(tensor) for tensor in [*model.parameters(), *model.buffers()])
    return weights + torch.cuda.max_memory_allocated(device.torch_device) - before


def _peak_of_this_process(folder: str, export: Export, prompt_tokens: int, decode_tokens: int) -> int:
    """Bytes by which reading and running what `export` wrote raised this process's peak resident memory."""
    import psutil
    from transformers import AutoConfig, AutoModelForCausalLM

    for name in export.readers:  # the code that reads is not what is measured
        importlib.import_module(name)

    config = AutoConfig.from_pretrained(folder)
    # A first, tiny model brings in the code, the thread pool and the kernels that every model needs; of a type that is
    # not described, one that is much like any.
    one_block: dict[str, Any] = {"num_hidden_layers": 1}
    if config.model_type in FAMILIES:
        config_small = AutoConfig.from_pretrained(folder, **one_block)
    else:
        config_small = AutoConfig.for_model("llama", hidden_size=64, intermediate_size=64, **one_block)
    small = AutoModelForCausalLM.from_config(config_small, dtype=config.dtype).eval()
    prompt = torch.arange(prompt_tokens)[None] % config.get_text_config().vocab_size
    decode(small, prefill(small, prompt[:, :2]), 1)
    del small
    before = psutil.Process().memory_info().rss
    reset_peak()
    model = export.read(Path(folder))
    decode(model, prefill(model, prompt), decode_tokens)
    return peak() - before


def _main(folder: str, numbers: list[int], module: str, name: str, keys: str) -> None:
    prompt_tokens, decode_tokens, threads = numbers
    torch.set_num_threads(threads)
    export = getattr(importlib.import_module(module), name)(**json.loads(keys))
    sys.stdout.write(f"{_peak_of_this_process(folder, export, prompt_tokens, decode_tokens)}\n")


if __name__ == "__main__":
    _main(sys.argv[1], [int(number) for number in sys.argv[2:5]], *sys.argv[5:])
