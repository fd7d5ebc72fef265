"""measure.engine: an exported model measured in the program that people run it in, beside PyTorch.

llama_cpp: the GGUF files of the dense and of the compressed model, in llama.cpp (llama_cpp.py). onnxruntime: their ONNX
graphs, in ONNX Runtime (onnx_runtime.py). Both on the processor.
"""

from __future__ import annotations

from collections.abc import Collection
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from prune_lab.errors import Refused

ENGINES = ("none", "llama_cpp", "onnxruntime")
_EXPORTS = {"llama_cpp": "gguf", "onnxruntime": "onnx"}
_MODULES = {"llama_cpp": "llama_cpp", "onnxruntime": "onnx_runtime"}


def check_engine(engine: str, export: str, loads: Collection[str]) -> None:
    """Raises Refused where the option `export` writes no file that `engine` loads, or its package is not installed.

    loads: names of the engines that load what the option writes.
    """
    if engine == "none":
        return
    if engine not in loads:
        raise Refused(
            f"measure.engine={engine} runs the exported file, and export={export} writes none that it loads: give "
            f"export={_EXPORTS[engine]}, or measure.engine=none"
        )
    if engine == "llama_cpp" and find_spec("llama_cpp") is None:
        raise Refused(
            f"measure.engine={engine} needs the package llama-cpp-python, which is not installed: pip install "
            '"prune-lab[llama-cpp]" compiles it in some minutes (docs/exports.md), or give measure.engine=none'
        )


def engine_module(engine: str) -> Any:
    """The module that measures in an engine: `build`, `mean_loss`, `peak_mb` and `measure_pairs`, as llama_cpp.py."""
    return import_module(f"prune_lab.measure.{_MODULES[engine]}")


def stamp_of(engine: str, windows: int) -> dict[str, Any] | None:
    """Protocol of what is measured in an engine: its version, and how many test windows; None without one."""
    if engine == "none":
        return None
    return {
        "name": engine,
        "version": version({"llama_cpp": "llama_cpp_python"}.get(engine, engine)),
        "device": "cpu",
        "windows": windows,
        "cache": "float32 for perplexity, float16 for time and memory" if engine == "llama_cpp" else "the graph's",
    }
