"""A method's way through a model: each block in turn, with all that its score goes by."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from prune_lab.models.anatomy import Anatomy
from prune_lab.pruning.calibration import Calibrator, unseen
from prune_lab.pruning.seen import GRADIENTS, Seen


def walk(
    anatomy: Anatomy,
    needs: frozenset[str],
    seed: int,
    calibrator: Calibrator | None,
    dense: bool = False,
    saliency: Callable[[int], dict[str, Tensor]] | None = None,
) -> Iterator[dict[str, Seen]]:
    """For each block in order, at hand, what was seen at each of its Linears, by full name: fields that `needs` names.

    No calibrator is needed where it names none. `dense` as in Calibrator.walk. saliency: gradient saliency of an
    order by Linear, where that is not of each weight. All draw from one generator, which starts from `seed`.
    """
    random, gradients = torch.Generator().manual_seed(seed), dict[str, dict[str, Any]]()
    blocks: Iterable[dict[str, Seen]] = unseen(anatomy)
    if needs:
        assert calibrator is not None, "a calibrated method needs a calibrator"
        of_order = saliency or partial(calibrator.saliency, anatomy)
        gradients = {field: of_order(order) for order, field in enumerate(GRADIENTS, 1) if field in needs}
        blocks = calibrator.walk(anatomy, needs, dense)
    for of_block in blocks:
        yield {
            name: replace(seen, random=random, **{field: of[name] for field, of in gradients.items() if name in of})
            for name, seen in of_block.items()
        }
