"""The config of a model with fewer decoder blocks.

Configs say in many ways which blocks there are: counts, lists with an entry for each block, lists of block numbers,
patterns, counts from the front and from the back. They are told apart by what they hold and by the words of their names
alone; whether what they make is the model without those blocks is tried by fewer_blocks.py.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from prune_lab.models import rebuild

# Words of config fields. A field of another name is an entry for each block where it is a list of as many.
_COUNT = re.compile(r"(num|n)_(hidden_|decoder_)?(layers?|blocks)|(decoder_)?layers")
_FROM_FRONT = re.compile(r"first_k_\w+|(num|n)_dense_layers|\w*layer_(start_index|index_start)|max_window_layers")
_LAST = re.compile(r"\w*layer_(end_index|index_end)")  # number of the last block of a run
_FROM_BACK = re.compile(r"num_kv_shared_layers")
_OF_BLOCKS = re.compile(r"layer|block")
_KINDS = re.compile(r"(layer|block)s?_(block_)?types?")  # shorter than the model: a pattern that is repeated
_NUMBERS = re.compile(r"(_|^)(ids|idxs|indices)$|only_layers$")
_OTHERS = re.compile(r"token|^mtp_|encoder(?!.*decoder)|^(architectures|id2label|label2id|languages)$")


def fewer(data: dict[str, Any], count: int, kept: Sequence[int], others: bool = True) -> None:
    """Edits the dictionary of a config of `count` blocks into one of those that are kept, in every part for text.

    others: whether lists of `count` entries whose names do not speak of blocks have an entry for each of them.
    """
    for part in rebuild.text_parts(data):
        for key, value in part.items():
            part[key] = _of_fewer(key, value, count, kept, others)


def _of_fewer(key: str, value: Any, count: int, kept: Sequence[int], others: bool) -> Any:
    if _OTHERS.search(key) or isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        return _fewer_counted(key, value, count, kept)
    new = {index: number for number, index in enumerate(kept)}
    if isinstance(value, dict):
        numbers = [int(number) for number in value if str(number).isdigit()]
        is_of_blocks = bool(numbers) and len(numbers) == len(value) and max(numbers) < count and _OF_BLOCKS.search(key)
        return {type(n)(new[int(n)]): of for n, of in value.items() if int(n) in new} if is_of_blocks else value
    if not isinstance(value, list | tuple) or not value:
        return value
    made: list[Any] | None = None
    if (flat := _unfolded(value)) is not None and len(flat) == count:  # GPT-Neo: [[[kind, kind], times], ...]
        made = [[[flat[index] for index in kept], 1]]
    elif _are_numbers(key, value, count):
        made = [new[number] for number in value if number in new]
    elif len(value) == count and (others or _OF_BLOCKS.search(key)):
        made = [value[index] for index in kept]
    elif len(value) < count and _KINDS.fullmatch(key):
        made = [value[index % len(value)] for index in kept]
    return value if made is None else type(value)(made)


def _fewer_counted(key: str, value: int, count: int, kept: Sequence[int]) -> int:
    if _COUNT.fullmatch(key) and value == count:
        return len(kept)
    if _FROM_FRONT.fullmatch(key) and 0 <= value <= count:
        return sum(index < value for index in kept)
    if _LAST.fullmatch(key) and 0 <= value < count:
        return sum(index <= value for index in kept) - 1
    if _FROM_BACK.fullmatch(key) and 0 <= value <= count:
        return sum(index >= count - value for index in kept)
    return value


def _unfolded(value: Sequence[Any]) -> list[Any] | None:
    """Entries of a list of (entries, times) pairs; None of any other list."""
    if not all(isinstance(p, list | tuple) and len(p) == 2 and isinstance(p[0], list | tuple) for p in value):
        return None
    return [entry for entries, times in value for _ in range(times) for entry in entries]


def _are_numbers(key: str, value: Sequence[Any], count: int) -> bool:
    """True for a list of block numbers: distinct ones, fewer than there are blocks, or all of them."""
    if not all(isinstance(number, int) and not isinstance(number, bool) and 0 <= number < count for number in value):
        return False
    if len(set(value)) != len(value) or not (_NUMBERS.search(key) or _OF_BLOCKS.search(key)):
        return False
    return len(value) < count or count > 2 or bool(_NUMBERS.search(key))  # of two blocks, 0 and 1 may be flags
