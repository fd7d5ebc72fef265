"""Units found by moving outputs: which inputs of the later matrices of a block move with them, bit for bit.

One output of a matrix is changed for the first tokens of a text. Of an MLP one input of the matrix behind it moves, at
the same tokens; of an attention those of a head, at later tokens, too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from prune_lab.models.blocks import ReachedError
from prune_lab.models.found import Layout, Matrix, probe_tokens
from prune_lab.models.products import Place, Products
from prune_lab.models.unit_sets import FoundSet, Side, unit_of_line

_MOST_OUTPUTS = 256  # that are moved of a matrix whose heads are looked for


class Calls:
    """Calls of each block in a forward pass on a few tokens, to be made again."""

    def __init__(self, model: Any, layout: Layout) -> None:
        self._model, self._layout = model, layout
        self._blocks = list(model.get_submodule(layout.blocks))
        self._calls: dict[int, tuple[Any, Any]] = {}
        self._parameters = [
            [f"{layout.blocks}.{n}.{name}" for name, p in block.named_parameters() if p.dim() >= 2]
            for n, block in enumerate(self._blocks)
        ]

        def note(number: int, args: Any, kwargs: Any) -> None:
            self._calls[number] = _cloned((args, kwargs))

        hooks = [
            block.register_forward_pre_hook(lambda _, args, kwargs, n=n: note(n, args, kwargs), with_kwargs=True)
            for n, block in enumerate(self._blocks)
        ]
        try:
            model(input_ids=probe_tokens(model)[:1], use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()

    def has(self, number: int) -> bool:
        """True for a block that runs on text."""
        return number in self._calls

    def output(self, number: int, block: Any = None) -> Tensor:
        """Output states of a block, or of another one in its place."""
        args, kwargs = _cloned(self._calls[number])
        out = (self._blocks[number] if block is None else block)(*args, **kwargs)
        states: Tensor = out[0] if isinstance(out, tuple | list) else out
        return states

    def inputs(
        self, number: int, move: tuple[Place, int] | None = None, of: Collection[Place] = ()
    ) -> dict[Place, Tensor]:
        """Inputs of each matrix at its first product, in order; with one output of a matrix moved at first tokens.

        of: matrices after whose inputs the block need not go on.
        """
        found: dict[Place, Tensor] = {}

        def tell(place: Place, inputs: Tensor, outputs: Tensor) -> None:
            if place not in found:
                found[place] = inputs.clone()
                if of and all(one in found for one in of):
                    raise ReachedError
            if move is not None and move[0] == place:
                column = outputs[: max(1, len(outputs) // 2), move[1]]
                column += 1 + 2 * column.abs().max()

        with Products(self._model, self._parameters[number], tell), suppress(ReachedError):
            self.output(number)
        return found


def _cloned(call: Any) -> Any:
    return tree_map(lambda part: part.clone() if isinstance(part, Tensor) else part, call)


def generic(name: str) -> str:
    """A name without the numbers of experts."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def find_sets(model: Any, layout: Layout, calls: Calls) -> list[tuple[str, FoundSet]]:
    """Sets of units with their kinds, block by block; blocks with matrices of the same names and shapes are alike."""
    known: dict[Any, list[Any]] = {}
    found = list[tuple[str, FoundSet]]()
    for number, matrices in enumerate(layout.matrices):
        if not calls.has(number):
            continue
        prefix = f"{layout.blocks}.{number}."
        named = dict[str, list[Matrix]]()
        for matrix in matrices:
            named.setdefault(generic(matrix.name[len(prefix) :]), []).append(matrix)
        like = tuple((name, len(of), of[0].place.shape) for name, of in named.items())
        if like not in known:
            known[like] = _probe(calls, number, named)
        for kind, reader, units, widths, producers in known[like]:
            for index in range(len(named[reader])):
                # Experts one by one have as many of each matrix; whoever reads one matrix alone has no number.
                sides = [
                    Side(named[name][index], "rows", of_rows)
                    for name, of_rows in producers.items()
                    if len(named[name]) == len(named[reader])
                ]
                if len(sides) == len(producers):
                    reads = Side(named[reader][index], "columns", widths)
                    found.append((kind, FoundSet(number, units, (*sides, reads))))
    return found


_Moved = dict[int, tuple[list[int], bool]]  # of each output: the inputs that it moves, and whether at its tokens alone


def _probe(calls: Calls, number: int, named: dict[str, list[Matrix]]) -> list[Any]:
    """Of one block: kind, name of the reader, units, widths of its columns, and widths of rows by producer's name."""
    base = calls.inputs(number)
    first = dict[str, Place]()
    for name, of in named.items():  # of experts the one that got most tokens
        seen = [matrix.place for matrix in of if matrix.place in base]
        if seen:
            first[name] = max(seen, key=lambda place: len(base[place]))
    order = {place: index for index, place in enumerate(base)}
    names = {place: name for name, place in first.items()}
    # What is moved by each output that is looked at: moved[reader][producer].
    moved = dict[str, dict[str, _Moved]]()

    def look(producer: str, output: int, among: list[str]) -> None:
        after = calls.inputs(number, (first[producer], output), [first[reader] for reader in among])
        for reader in among:
            place = first[reader]
            if order[place] <= order[first[producer]] or place not in after or after[place].shape != base[place].shape:
                continue
            differs = after[place] != base[place]
            columns = differs.any(0).nonzero().flatten().tolist()
            if 0 < len(columns) < place.shape[1]:
                tokens = int(differs.any(1).nonzero().max())
                is_local = tokens < max(1, len(base[first[producer]]) // 2)
                moved.setdefault(reader, {}).setdefault(producer, {})[output] = columns, is_local

    for name, place in first.items():
        rows, half = place.shape[0], place.shape[0] // 2
        for output in sorted({0, 1, 2, half, half + 1, rows - 2, rows - 1} & set(range(rows))):
            look(name, output, list(names.values()))
    found = list[Any]()
    for reader, by_producer in moved.items():
        width = first[reader].shape[1]
        producers = {
            name: by_output
            for name, by_output in by_producer.items()
            if max(len(columns) for columns, _ in by_output.values()) <= width // 2
        }
        if not producers:
            continue
        if all(local and len(columns) == 1 for by in producers.values() for columns, local in by.values()):
            widths = {name: _of_channels(by, first[name].shape[0], width) for name, by in producers.items()}
            if all(widths.values()):
                found.append(("mlp", reader, width, (1,), widths))
            continue
        found += _probe_heads(reader, width, {name: first[name].shape[0] for name in producers}, by_producer, look)
    return found


def _of_channels(moved: _Moved, rows: int, width: int) -> tuple[int, ...] | None:
    """Widths of the runs of channels in the rows of a matrix: one after the other, or interleaved."""
    if rows % width:
        return None
    count = rows // width
    for widths in ((1,) * count, (count,)):
        of_row = unit_of_line(widths, width)
        if all(int(of_row[output]) == columns[0] for output, (columns, _) in moved.items()):
            return widths
    return None


def _probe_heads(
    reader: str,
    width: int,
    rows_of: dict[str, int],
    moved: dict[str, _Moved],
    look: Callable[[str, int, list[str]], None],
) -> Iterator[Any]:
    """The KV groups that a matrix reads: columns that move together when some output of a producer does."""
    # Of a head, one behind the other; of a value the same number in each of several heads.
    sizes = [
        len(columns)
        for name in rows_of
        for columns, _ in moved[name].values()
        if 1 < len(columns) == columns[-1] - columns[0] + 1
    ]
    step = max(1, math.gcd(*sizes) // 8) if sizes else 1
    steps = {name: max(step, 2 ** math.ceil(math.log2(max(1, rows / _MOST_OUTPUTS)))) for name, rows in rows_of.items()}
    for name, rows in rows_of.items():
        for output in range(0, rows, steps[name]):
            if output not in moved[name]:
                look(name, output, [reader])
    parent = list(range(width))

    def root(column: int) -> int:
        while parent[column] != column:
            parent[column] = column = parent[parent[column]]
        return column

    for name in rows_of:
        for columns, _ in moved[name].values():
            for column in columns:
                parent[max(root(column), root(columns[0]))] = min(root(column), root(columns[0]))
    roots = [root(column) for column in range(width)]
    numbers = {value: index for index, value in enumerate(dict.fromkeys(roots))}
    of_column, units = torch.tensor([numbers[value] for value in roots]), len(numbers)
    widths = _runs(of_column, units)
    if not 1 < units < width or widths is None:
        return
    producers = dict[str, tuple[int, ...]]()
    for name, rows in rows_of.items():
        of_row = torch.full((rows,), -1)
        for output in range(0, rows, steps[name]):
            if output in moved[name]:
                of_row[output : output + steps[name]] = of_column[moved[name][output][0][0]]
        of_rows = _runs(of_row, units)
        if of_rows is None:
            return
        producers[name] = of_rows
    yield "heads", reader, units, widths, producers


def _runs(of_line: Tensor, units: int) -> tuple[int, ...] | None:
    """Widths of a unit in each run, where lines are runs of all units in order; None where they are not."""
    values, lengths = torch.unique_consecutive(of_line, return_counts=True)
    if len(values) % units or not torch.equal(
        values.view(-1, units), torch.arange(units).expand(len(values) // units, -1)
    ):
        return None
    widths = lengths.view(-1, units)
    return tuple(widths[:, 0].tolist()) if bool((widths == widths[:, :1]).all()) else None
