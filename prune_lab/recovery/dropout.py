"""Dropout while a model trains: what keeps several passes over little text from being learned by heart."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.nn.functional import dropout

from prune_lab.models.anatomy import Anatomy


@contextmanager
def residual_dropout(model: Any, p: float) -> Iterator[None]:
    """Zeroes a fraction `p` of what embedding, attention and MLP add to the residual stream (Srivastava et al., 2014).

    Within the context only, whatever the family; the model and its config are as before afterwards. p=0 does nothing.
    """
    hooks = []
    if p > 0:
        anatomy = Anatomy(model)
        parts = [part for kind in anatomy.family.units for block in anatomy.unit_linears(kind) for part in block]
        writers = [part.linear for part in parts if part.side == "columns"]  # they end in the residual stream

        def _drop(module: Any, inputs: Any, output: Tensor) -> Tensor:
            return dropout(output, p, training=bool(module.training))  # not where pruning looks at activations

        hooks = [module.register_forward_hook(_drop) for module in (model.get_input_embeddings(), *writers)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
