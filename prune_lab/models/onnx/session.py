"""An ONNX graph in ONNX Runtime on the CPU, called as a model of transformers is (needs the extra onnx)."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from prune_lab.models.onnx.graph import FILE


class OnnxModel:
    """A model.onnx that takes what `prefill` and `step` of measure/inference.py give.

    The cache is a dictionary of its own: keys and values by the name of the input that takes them.
    """

    training = False

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # errors
        self._session = onnxruntime.InferenceSession(folder / FILE, options, providers=["CPUExecutionProvider"])
        self._earlier = {one.name: one for one in self._session.get_inputs() if ".cache." in one.name}
        self._outputs = [one.name for one in self._session.get_outputs()]

    def __call__(
        self, input_ids: Tensor, use_cache: bool = True, logits_to_keep: int = 0, cache: Any = None
    ) -> SimpleNamespace:
        """Logits of `input_ids`, shape (batch, tokens), that follow the tokens of `cache`, and the cache of them all.

        use_cache and logits_to_keep change nothing: the graph gives both whole.
        """
        import numpy

        cache = cache if cache is not None else {name: self._nothing(name, len(input_ids)) for name in self._earlier}
        began = next(iter(cache.values())).shape[2]
        positions = numpy.broadcast_to(numpy.arange(began, began + input_ids.shape[1]), tuple(input_ids.shape))
        given = {"input_ids": input_ids.numpy(), "position_ids": numpy.ascontiguousarray(positions), **cache}
        found = dict(zip(self._outputs, self._session.run(None, given), strict=True))
        after = {name: found[name.replace("input.", "output.", 1)] for name in self._earlier}
        return SimpleNamespace(logits=torch.from_numpy(found["logits"]), cache=after)

    def _nothing(self, name: str, rows: int) -> Any:
        """Keys or values of no tokens."""
        import numpy

        described = self._earlier[name]
        heads, size = int(described.shape[1]), int(described.shape[3])
        kind = {"tensor(float)": "float32", "tensor(float16)": "float16"}[described.type]
        return numpy.empty((rows, heads, 0, size), kind)
