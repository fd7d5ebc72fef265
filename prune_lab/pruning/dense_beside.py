"""Refit targets of the dense model: the text passes it beside the pruned one, block by block.

The dense model is the model as it was before this pruning, also where a schedule prunes more than once. Behind pruned
blocks the inputs X of a Linear differ from those it has in it. What its outputs should be:
- dense: the outputs that it has in the dense model, on the dense model's inputs (OSSCAR's: Meng et al., 2403.12983);
- residual: those plus the difference of the states that they are added to, so that a block of which something goes also
  repairs what the blocks before it broke. One refitted Linear of it takes that on: the one by which its MLP writes, or
  its attention.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from prune_lab.errors import Refused
from prune_lab.models.anatomy import Anatomy
from prune_lab.models.blocks import BlockStream, recorded
from prune_lab.pruning.refit import Error
from prune_lab.pruning.statistics import BlockObserver, LinearStatistics, Needs
from prune_lab.system.world import World

OF_TARGETS = ("dense_error", "residual_error")  # needs that bring LinearStatistics.error

Call = dict[str, tuple[Tensor, Tensor]]  # input and output by Linear, of one call of a block


class DenseBeside:
    """States of the dense model at the entrance of a block that is not pruned yet, beside those behind pruned blocks.

    needs: the Linears that want an error; those that want none are not looked at.
    """

    def __init__(self, anatomy: Anatomy, windows: Tensor, batch_size: int, needs: Needs) -> None:
        self._anatomy, self._stream = anatomy, BlockStream(anatomy, windows, batch_size)
        self._of = {name: field for name, fields in needs.items() for field in OF_TARGETS if field in fields}

    def observe(self, index: int, number: int, pruned: BlockStream, observer: BlockObserver, sums: ErrorSums) -> None:
        """Passes one batch of both models through a block, and moves the dense one on; the sums take the errors."""
        block = self._anatomy.blocks[index]
        linears = {name: linear for name, linear in self._anatomy.linears_by_block()[index] if name in self._of}
        with recorded(linears) as of_dense:
            out_of_dense = self._stream.output(index, number)
        with recorded(linears) as of_pruned, observer.watch(block):
            out_of_pruned = pruned.output(index, number)
        carrier, also = self._carrier(index)
        if carrier is not None and index == number == 0:
            check_added(self._anatomy, self._stream, carrier, "method.refit=dense or inputs")
        for name in linears:
            inputs, error = rows(of_pruned[name][0]), _difference(of_dense, of_pruned, name)
            if name == carrier and _is_attention(self._anatomy, name):
                error += rows(self._stream.states[number]).float() - rows(pruned.states[number]).float()
            elif name == carrier:
                error = rows(out_of_dense).float() - rows(out_of_pruned).float()
                if also is not None:  # which its own refit takes on
                    error -= _difference(of_dense, of_pruned, also)
            sums.add(name, inputs, error)
        self._stream.states[number] = out_of_dense

    def _carrier(self, index: int) -> tuple[str | None, str | None]:
        """The Linear of a block that takes on the difference of the states, and another that writes, if refitted."""
        linears = self._anatomy.linears_by_block()[index]
        writers = [name for name, _ in linears if self._of.get(name) == "residual_error"]
        attention = next((name for name in writers if _is_attention(self._anatomy, name)), None)
        of_mlp = next((name for name in writers if name != attention), None)
        return (attention, None) if of_mlp is None else (of_mlp, attention)


class ErrorSums:
    """Running sums of the errors of a block's Linears, float32."""

    def __init__(self) -> None:
        self._products: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = {}

    def add(self, name: str, inputs: Tensor, error: Tensor) -> None:
        """Adds inputs (tokens, in) and errors (tokens, out)."""
        with torch.autocast(inputs.device.type, enabled=False):
            product = inputs.float().T @ error
        self._products[name] = self._products[name].add_(product) if name in self._products else product
        self._sums[name] = self._sums.get(name, 0) + error.sum(0)
        self._tokens[name] = self._tokens.get(name, 0) + len(error)

    def put_into(self, statistics: dict[str, LinearStatistics], world: World) -> dict[str, LinearStatistics]:
        """The statistics of a block with the errors of those Linears that have one, of what all processes saw.

        To be asked for once.
        """
        tokens = torch.tensor([*self._tokens.values()])
        for sums in (self._products.values(), self._sums.values(), [tokens]):
            world.sum(sums)
        self._tokens = dict(zip(self._tokens, tokens.tolist(), strict=True))
        errors = {
            name: Error(product, self._sums[name] / self._tokens[name]) for name, product in self._products.items()
        }
        return {name: replace(of_linear, error=errors.get(name)) for name, of_linear in statistics.items()}


def check_added(anatomy: Anatomy, stream: BlockStream, carrier: str, instead: str) -> None:
    """Raises Refused where the outputs of a Linear of the first block are not added to the states as they are.

    More of its outputs must move those of the block by as much; that of an attention is looked at with an MLP that puts
    out nothing. stream: states at the entrance of the first block. instead: what else a person can give.
    """
    readers = [anatomy.unit_linears(kind)[0][-1].name for kind in anatomy.family.units]
    silent = [name for name in readers if name != carrier and _is_attention(anatomy, carrier)]
    plain, outputs = (found.float() for found in _with_outputs_times(1.0, anatomy, stream, carrier, silent))
    # As much more of them as moves the block's outputs by four times their size, beside which rounding is nothing.
    more = max(1.0, 4 * float(plain.norm() / outputs.norm().clamp(min=torch.finfo(torch.float32).tiny)))
    moved = _with_outputs_times(1 + more, anatomy, stream, carrier, silent)[0].float()
    expected = more * outputs.view_as(plain)
    if not moved.isfinite().all():
        raise Refused(
            f"method.refit=residual: the outputs of {carrier} overflow; give dtype=float32 or bfloat16, or {instead}"
        )
    if (moved - plain - expected).norm() > 0.1 * expected.norm():
        raise Refused(
            f"method.refit=residual: in {anatomy.config.model_type} models the outputs of {carrier.rpartition('.')[2]} "
            f"are not added to the states as they are (they are normed first); give {instead}"
        )


def _with_outputs_times(
    factor: float, anatomy: Anatomy, stream: BlockStream, carrier: str, silent: list[str]
) -> tuple[Tensor, Tensor]:
    """Outputs of the first block with those of `carrier` times a factor and of others silenced; and its own."""
    linears, found = dict(anatomy.linears_by_block()[0]), list[Tensor]()

    def scale(linear: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        found.append(out)
        return factor * out

    hooks = [linears[name].register_forward_hook(lambda _, args, out: torch.zeros_like(out)) for name in silent]
    hooks.append(linears[carrier].register_forward_hook(scale))
    try:
        out = stream.output(0, 0)
    finally:
        for hook in hooks:
            hook.remove()
    return out, found[0]


def _is_attention(anatomy: Anatomy, name: str) -> bool:
    return name.endswith(f".{anatomy.family.attention_output}")


def rows(states: Tensor) -> Tensor:
    """Activations (windows, seq_len, width) as rows (tokens, width)."""
    return states.reshape(-1, states.shape[-1])


def _difference(of_dense: Call, of_pruned: Call, name: str) -> Tensor:
    """Rows of the outputs of a Linear in the dense model, less those behind pruned blocks; float32."""
    return rows(of_dense[name][1]).float() - rows(of_pruned[name][1]).float()
