"""Gates of experts: what a mixture multiplies the output of a token's expert by, for each row of a product."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from prune_lab.errors import Refused
from prune_lab.models.found import evaluating, probe_tokens
from prune_lab.models.found_experts import gated_mixtures
from prune_lab.models.products import Place, Products, eager_experts
from prune_lab.models.watched_experts import Mixture, by_block, watched


class ExpertGates:
    """Gates of the rows of products with experts' matrices, while the experts compute one after the other.

    They are the model's own: after the choice of experts, normalisation and scaling.
    """

    def __init__(self, model: Any, mixtures: list[Mixture]) -> None:
        self._model, self._mixtures = model, mixtures
        self._blocks = {
            f"{mixture.experts}.{name}": mixture.block
            for mixture in mixtures
            for name, _ in model.get_submodule(mixture.experts).named_parameters()
        }
        self._calls: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self._rows: dict[tuple[int, int], Tensor] = {}  # gates of the rows of each expert in the call of its block

    @classmethod
    def of_model(cls, model: Any) -> ExpertGates:
        """Gates of a model; raises Refused where they cannot be seen."""
        mixtures = gated_mixtures(model)
        if isinstance(mixtures, str):
            raise Refused(f"the gates of this {model.config.model_type} model cannot be seen: {mixtures}")
        return cls(model, mixtures)

    @property
    def parameters(self) -> list[str]:
        """Full names of the experts' parameters."""
        return list(self._blocks)

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Context in which the calls of experts are seen."""
        try:
            with watched(self._model, by_block(self._mixtures), self._note):
                yield
        finally:
            self._calls.clear()
            self._rows.clear()

    def of(self, place: Place, inputs: Tensor) -> Tensor | None:
        """Gates of the rows of a product's inputs, (rows,), float32; None of a matrix that is no expert's.

        Raises Refused where the rows are not an expert's tokens in an order that is known.
        """
        block = self._blocks.get(place.parameter)
        if block is None:
            return None
        states, chosen, gates = self._calls[block]
        expert = place.offset // (place.shape[0] * place.shape[1])
        if inputs.shape[1] == states.shape[1]:
            at = chosen == expert
            by_choice, by_token = torch.where(at.T)[::-1], torch.where(at)
            for token, choice in (by_choice, by_token):
                if len(token) == len(inputs) and torch.equal(inputs, states[token].to(inputs.dtype)):
                    self._rows[block, expert] = gates[token, choice].float()
                    break
        found = self._rows.get((block, expert))  # the matrices after the first one have its rows
        if found is None or len(found) != len(inputs):
            raise Refused(f"{place.parameter} does not multiply the states of the tokens that chose an expert")
        return found

    def _note(self, block: int, states: Tensor, chosen: Tensor, gates: Tensor) -> None:
        self._calls[block] = states, chosen, gates
        self._rows = {key: rows for key, rows in self._rows.items() if key[0] != block}


def why_no_gates(model: Any) -> str | None:
    """The reason why the gates of a model's experts cannot be seen, tried on a few tokens; None where they can."""
    mixtures = gated_mixtures(model)
    if isinstance(mixtures, str):
        return mixtures
    gates = ExpertGates(model, mixtures)

    def tell(place: Place, inputs: Tensor, _: Tensor) -> None:
        gates.of(place, inputs)

    try:
        with (
            evaluating(model),
            eager_experts(model),
            gates.watch(),
            Products(model, gates.parameters, tell),
        ):
            model(input_ids=probe_tokens(model), use_cache=False)
    except Refused as error:
        return str(error)
    return None
