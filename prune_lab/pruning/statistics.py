"""Calibration statistics of Linears: norms, moments and gram matrices of inputs and outputs, as text passes a block.

A score asks for them by Linear (`Needs`): of a Linear that is not named nothing is observed. Linears that are given one
tensor share its statistics, which are running sums in float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from prune_lab.models.blocks import ReachedError
from prune_lab.models.found import Matrix
from prune_lab.models.products import Place, Products, eager_experts
from prune_lab.pruning.expert_gates import ExpertGates
from prune_lab.pruning.gram import multiplying_in_bfloat16
from prune_lab.pruning.refit import Error
from prune_lab.pruning.thresholds import ScoreCounts
from prune_lab.pruning.unseen import FEW_TOKENS
from prune_lab.system.world import World

# Fields of LinearStatistics that are observed of any Linear while text passes; `variance` brings `mean`.
GATED = "gated_norm"  # needs the gates of experts (expert_gates.py)
OF_INPUTS, OF_OUTPUTS = frozenset({"input_norm", "variance", "gram"}), frozenset({"output_norm"})
Needs = Mapping[str, frozenset[str]]  # fields of LinearStatistics that are wanted, by full name of a Linear

# Columns of a gram matrix that are computed at once, from the diagonal on (the rest is their mirror); and on a GPU.
PANEL, PANEL_ON_GPU = 256, 1024
IN_CACHE = 2**19  # numbers
# Products of bfloat16 or float16 numbers are exact in float32, in which a GPU's tensor cores add them up.
_ADDS_IN_FLOAT32 = "dtype" in torch.ops.aten.mm.overloads()  # from PyTorch 2.8 on


@dataclass(frozen=True)
class LinearStatistics:
    """Statistics of one Linear with a weight of shape (out, in); a field that was not asked for is None.

    input_norm, output_norm: L2 norm of each input and output over all tokens, (in,) and (out,). gated_norm: the same of
    an expert's inputs, each token's times its gate; of a matrix outside experts, of its inputs as they are. mean,
    variance: of each input over all tokens, (in,), the variance unbiased. gram: X^T X over all tokens, (in, in);
    tokens: their number. error: how far its outputs are from those that a refit is to give, where these are not its own
    (dense_beside.py). saliency: mean over windows of |w * gradient|, saliency2: of (w * gradient)^2, both (out, in).
    random: the run's generator, for scores that draw. score_counts: counts of this Linear's scores, where those depend
    on the weight alone, for all amounts. rows: tokens that it saw, of a matrix that does not see all of them (an
    expert).
    """

    input_norm: Tensor | None = None
    output_norm: Tensor | None = None
    gated_norm: Tensor | None = None
    mean: Tensor | None = None
    variance: Tensor | None = None
    gram: Tensor | None = None
    tokens: Tensor | None = None
    error: Error | None = None
    saliency: Tensor | None = None
    saliency2: Tensor | None = None
    random: torch.Generator = field(default_factory=torch.Generator)
    score_counts: ScoreCounts | None = None
    rows: int | None = None

    @property
    def is_unseen(self) -> bool:
        """True for a matrix that hardly a token came to, or none with a gradient (an expert, what makes a choice)."""
        if self.rows is not None and self.rows < FEW_TOKENS:
            return True
        gradients = [value for value in (self.saliency, self.saliency2) if value is not None]
        return bool(gradients) and not any(bool(value.any()) for value in gradients)


class RunningStatistics:
    """Running statistics of one input or output, float32, fed with rows of activations."""

    def __init__(self) -> None:
        self._tokens = 0  # that the moments are of
        self._squares: Tensor | None = None
        self._gated: Tensor | None = None  # squares of activations times gates
        self._mean: Tensor | None = None
        self._deviations: Tensor | None = None  # sum of squared distances from the mean
        self._gram: Tensor | None = None
        self._gram_tokens = 0

    def add(self, rows: Tensor, needs: frozenset[str], gates: Tensor | None = None) -> None:
        """Adds activations of shape (tokens, width) to the sums that `needs` names: norm, gated_norm, variance, gram.

        gates: of each token, (tokens,), float32; None: 1.
        """
        with torch.autocast(rows.device.type, enabled=False):
            if GATED in needs:
                squares = _squares(rows if gates is None else rows.float() * gates[:, None])
                self._gated = squares if self._gated is None else self._gated + squares
            if "norm" in needs:
                squares = _squares(rows)
                self._squares = squares if self._squares is None else self._squares + squares
            if "variance" in needs:
                self._add_moments(rows.float())
            if "gram" in needs:
                self._add_gram(rows)

    def add_up(self, world: World) -> None:
        """Makes the sums those of all processes, in each of which the same ones are gathered, if only of no rows."""
        if world.size == 1:
            return
        world.sum(sums for sums in (self._gated, self._squares, self._gram) if sums is not None)
        if self._mean is not None and self._deviations is not None:
            share = self._tokens / max(1, self._sum_of(world, self._tokens))
            mean = self._mean * share
            world.sum([mean])
            self._deviations += (self._mean - mean).square_() * self._tokens  # deviations from the mean of all
            world.sum([self._deviations])
            self._mean = mean
        self._tokens, self._gram_tokens = (self._sum_of(world, n) for n in (self._tokens, self._gram_tokens))

    @staticmethod
    def _sum_of(world: World, number: int) -> int:
        count = torch.tensor(number)
        world.sum([count])
        return int(count)

    def result(self) -> dict[str, Tensor]:
        """The statistics by name: norm, gated_norm, mean, variance, gram; those that were gathered."""
        found = {}
        if self._gated is not None:
            found[GATED] = self._gated.sqrt()
        if self._squares is not None:
            found["norm"] = self._squares.sqrt()
        if self._mean is not None and self._deviations is not None:
            found["mean"] = self._mean
            found["variance"] = self._deviations / max(1, self._tokens - 1)
        if self._gram is not None:
            found["gram"] = self._gram.triu() + self._gram.triu(1).T
            found["tokens"] = torch.tensor(self._gram_tokens)
        return found

    def _add_gram(self, rows: Tensor) -> None:
        width = rows.shape[1]
        self._gram_tokens += len(rows)
        if self._gram is None:
            self._gram = torch.zeros(width, width, dtype=torch.float32, device=rows.device)
        panel = PANEL_ON_GPU if rows.is_cuda else PANEL
        narrow = rows.is_cuda and _ADDS_IN_FLOAT32 and rows.dtype in (torch.bfloat16, torch.float16)
        were_bfloat16 = rows.dtype == torch.bfloat16
        rows = rows if narrow else rows.float()
        with multiplying_in_bfloat16(were_bfloat16 and not rows.is_cuda):
            for first in range(0, width, panel):
                left, right = rows[:, first : first + panel].T, rows[:, first:]
                if narrow:
                    self._gram[first : first + panel, first:] += torch.mm(left, right, out_dtype=torch.float32)
                else:
                    self._gram[first : first + panel, first:].addmm_(left, right)

    def _add_moments(self, rows: Tensor) -> None:
        """Welford's update, a batch at a time (Chan, Golub & LeVeque, 1979)."""
        if not len(rows):  # of an expert that no token of this process came to
            nothing = rows.new_zeros(rows.shape[1])
            self._mean, self._deviations = (nothing if of is None else of for of in (self._mean, self._deviations))
            return
        mean = rows.mean(0)
        deviations = (rows - mean).square().sum(0)
        n, more = self._tokens, len(rows)
        self._tokens += more
        if self._mean is None or self._deviations is None:
            self._mean, self._deviations = mean, deviations
            return
        apart = mean - self._mean
        self._deviations = self._deviations + deviations + apart.square() * (n * more / (n + more))
        self._mean = self._mean + apart * (more / (n + more))


def _squares(rows: Tensor) -> Tensor:
    """The sum of each column's squares, float32."""
    if rows.is_cuda:  # in one pass over them, as they are
        return torch.linalg.vector_norm(rows, dim=0, dtype=torch.float32).square()
    if rows.dtype == torch.float32:
        return rows.square().sum(0)
    # In chunks that stay in the processor's cache: ten times as fast as a float32 copy of all.
    chunks = rows.split(max(1, IN_CACHE // rows.shape[1]))
    return torch.stack([chunk.float().square_().sum(0) for chunk in chunks]).sum(0)


class BlockObserver:
    """Observer of one block: hooks on its Linears that feed running statistics while the block runs.

    linears: full name and module of each Linear of the block. needs: what to observe, by name. stop: end a call of the
    block as soon as all that is wanted was seen, since its output is not.
    """

    def __init__(self, linears: list[tuple[str, Any]], needs: Needs, stop: bool) -> None:
        self._linears = [(name, linear) for name, linear in linears if needs.get(name)]
        self._stop = stop
        sides = [(name, is_output) for name, _ in self._linears for is_output in (False, True)]
        self._needs = {side: wanted for side in sides if (wanted := _of_side(needs[side[0]], side[1]))}
        self._gathered: dict[tuple[str, bool], RunningStatistics] = {}
        # Of this call of the block: tensors that were seen, their statistics, and which of those have been updated.
        self._seen: list[tuple[Tensor, RunningStatistics, set[str]]] = []
        self._waiting: set[tuple[str, bool]] = set()

    @contextmanager
    def watch(self, block: nn.Module) -> Iterator[None]:
        """Context in which each call of `block` is observed."""
        hooks = [block.register_forward_pre_hook(self._begin)]
        for name, linear in self._linears:
            if (key := (name, False)) in self._needs:
                hooks.append(linear.register_forward_pre_hook(lambda _, args, key=key: self._look(key, args[0])))
            if (key := (name, True)) in self._needs:
                hooks.append(linear.register_forward_hook(lambda _, args, out, key=key: self._look(key, out)))
        try:
            yield
        finally:
            self._seen.clear()
            for hook in hooks:
                hook.remove()

    def statistics(self, world: World) -> dict[str, LinearStatistics]:
        """Statistics of what all processes saw, by full name of Linear, to be asked for once.

        Linears that were given one input share its tensors.
        """
        results = dict[int, dict[str, Tensor]]()
        for running in self._gathered.values():
            if id(running) not in results:
                running.add_up(world)
                results[id(running)] = running.result()
        fields: dict[str, dict[str, Any]] = {name: {} for name, _ in self._linears}
        for (name, is_output), running in self._gathered.items():
            found = results[id(running)]
            for wanted in self._needs[name, is_output]:
                fields[name] |= {_field(one, is_output): found[one] for one in _RESULTS[wanted]}
        return {name: LinearStatistics(**of_linear) for name, of_linear in fields.items()}

    def _begin(self, *_: Any) -> None:
        self._seen.clear()
        self._waiting.update(self._needs)

    def _look(self, key: tuple[str, bool], activations: Tensor) -> None:
        known = next(((running, done) for other, running, done in self._seen if other is activations), None)
        if known is None:
            known = self._gathered.setdefault(key, RunningStatistics()), set[str]()
            self._seen.append((activations, *known))
        running, done = known
        running.add(activations.reshape(-1, activations.shape[-1]), self._needs[key] - done)
        done |= self._needs[key]
        self._gathered[key] = running
        self._waiting.discard(key)
        if self._stop and not self._waiting:
            raise ReachedError


class ProductObserver:
    """Observer of matrices by the products with them: those of several blocks, whatever modules they are in.

    matrices: what to observe, of a model whose layout was found. needs: by full name. gates: of its experts, where they
    are needed.
    """

    def __init__(self, model: Any, matrices: Iterable[Matrix], needs: Needs, gates: ExpertGates | None = None) -> None:
        self._model, self._gates = model, gates
        self._of = {matrix.place: matrix for matrix in matrices if needs.get(matrix.name)}
        self._needs = needs
        self._gathered = {
            (place, is_output): RunningStatistics() for place in self._of for is_output in (False, True)
        }  # fmt: skip
        self._rows = dict.fromkeys(self._of, 0)

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Context in which every product with the matrices is observed."""
        names = {place.parameter for place in self._of}
        watching = nullcontext() if self._gates is None else self._gates.watch()
        with eager_experts(self._model), watching, Products(self._model, names, self._tell):
            yield

    def statistics(self, world: World) -> dict[str, LinearStatistics]:
        """Statistics of what all processes saw, by full name, to be asked for once; zeros where no token was seen."""
        found, seen_here, rows = {}, self._rows, torch.tensor([*self._rows.values()])
        world.sum([rows])
        self._rows = dict(zip(seen_here, rows.tolist(), strict=True))
        for place, matrix in self._of.items():
            fields: dict[str, Any] = {}
            for is_output in (False, True):
                if not (wanted := _of_side(self._needs[matrix.name], is_output)):
                    continue
                running = self._gathered[place, is_output]
                parameter, width = self._model.get_parameter(place.parameter), place.shape[0 if is_output else 1]
                nothing = torch.zeros(1, width, dtype=parameter.dtype, device=self._model.device)
                if not seen_here[place]:
                    running.add(nothing[:0], wanted)
                running.add_up(world)
                if not self._rows[place]:
                    running.add(nothing, wanted)
                results = running.result()
                fields |= {_field(one, is_output): results[one] for of in wanted for one in _RESULTS[of]}
            found[matrix.name] = LinearStatistics(**fields, rows=self._rows[place])
        return found

    def _tell(self, place: Place, inputs: Tensor, outputs: Tensor) -> None:
        matrix = self._of.get(place)
        if matrix is None:
            return
        # Llama 4 gives every expert all tokens, times zero where they are not its own.
        self._rows[place] += len(inputs) if matrix.is_linear else int((inputs != 0).any(1).sum())
        for is_output, rows in ((False, inputs), (True, outputs)):
            if wanted := _of_side(self._needs[matrix.name], is_output):
                gates = self._gates.of(place, inputs) if self._gates is not None and GATED in wanted else None
                self._gathered[place, is_output].add(rows, wanted, gates)


# By what is asked for.
_RESULTS = {"norm": ("norm",), GATED: (GATED,), "variance": ("mean", "variance"), "gram": ("gram", "tokens")}


def _of_side(needs: frozenset[str], is_output: bool) -> frozenset[str]:
    """Names for RunningStatistics of those needs that are of a Linear's outputs, or of its inputs."""
    wanted = needs & OF_OUTPUTS if is_output else needs - OF_OUTPUTS
    return frozenset(need.removeprefix("output_").removeprefix("input_") for need in wanted)


def _field(result: str, is_output: bool) -> str:
    """The field of LinearStatistics for a result of RunningStatistics."""
    if result == "norm":
        return "output_norm" if is_output else "input_norm"
    return result
