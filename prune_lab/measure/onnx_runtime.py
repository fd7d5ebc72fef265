"""ONNX graphs in ONNX Runtime: perplexity, peak memory, and times in pairs (measure.engine=onnxruntime).

The functions take what those of llama_cpp.py take, so that measure.engine chooses between the two modules.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from prune_lab.export.onnx import Onnx
from prune_lab.measure.memory import measure_memory
from prune_lab.measure.settings import Measure
from prune_lab.measure.speed import Latency, measure_latency
from prune_lab.models.onnx.session import OnnxModel
from prune_lab.system.console import Console
from prune_lab.system.device import Device

_CPU = Device(torch.device("cpu"), torch.float32)


def build() -> str:
    """Words of ONNX Runtime on how it was built."""
    import onnxruntime

    return str(onnxruntime.get_build_info())


def mean_loss(file: Path, windows: Tensor, prefix: int, console: Console, repack: bool = True) -> float:
    """Mean cross-entropy of the tokens of windows, shape (windows, prefix + tokens), in nats, as perplexity has it.

    repack: of llama.cpp; nothing here. The logits of a whole window are held.
    """
    graph, found = OnnxModel(file.parent), list[float]()
    with console.progress(windows.numel(), "perplexity in ONNX Runtime", unit="tok") as bar:
        for window in windows.long():
            logits = graph(input_ids=window[None]).logits[0].float()
            found += cross_entropy(logits[prefix:-1], window[prefix + 1 :], reduction="none").tolist()
            bar.update(len(window))
    return sum(found) / len(found)


def peak_mb(file: Path, prompt: Tensor, settings: Measure, console: Console) -> float:
    """Peak memory in MB by which loading a graph, a prefill of `prompt`, shape (1, tokens), and a decode raise it."""
    console.note("measuring memory of ONNX Runtime in a fresh process")
    return measure_memory(None, file.parent, Onnx(), prompt, settings, _CPU)


def measure_pairs(files: list[Path], prompt: Tensor, settings: Measure, console: Console) -> Latency:
    """Times of the graphs of the dense and of the compressed model on `prompt`, shape (1, tokens), as in speed.py."""
    dense, compressed = (OnnxModel(file.parent) for file in files)
    plain = replace(settings, accelerate="none")
    return measure_latency(dense, compressed, prompt.cpu(), plain, _CPU, console, "latency in ONNX Runtime")
