"""Importance of whole decoder blocks: by how they change the states, or by what the model loses without them."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from prune_lab.errors import Refused
from prune_lab.measure.divergence import position_divergences
from prune_lab.models.anatomy import Anatomy
from prune_lab.models.blocks import BlockStream, bypassed, states_in, states_of
from prune_lab.models.loss import by_chunks, logits_of, target_states
from prune_lab.models.removable_blocks import Together
from prune_lab.pruning.calibration import Calibrator
from prune_lab.pruning.loss_increase import WINDOWS
from prune_lab.system.world import World


def least_influential(
    anatomy: Anatomy, remove: int, calibrator: Calibrator, among: Sequence[int], together: Together
) -> list[int]:
    """The `remove` blocks of lowest influence `among` some that can go together, the first ones among equals."""
    influence = block_influence(calibrator, anatomy)
    found = together.first(sorted(among, key=lambda index: (influence[index], index)), remove)
    if found is None:
        raise _stuck(together)
    return found


def _stuck(together: Together) -> Refused:
    return Refused(f"method=depth: {together.note()}. Give a smaller amount, or another method.by")


def block_influence(calibrator: Calibrator, anatomy: Anatomy) -> list[float]:
    """Change of the states' direction by each block: 1 - mean over tokens of cos(input, output).

    ShortGPT's BI (Men et al., 2403.03853), between the block's own input and output: the model's last hidden
    state would be the one after the final norm. Computed once for the dense model.
    """
    of_each = _of_each_block if can_stream(anatomy) else _of_whole
    found: list[float] = calibrator.remember(anatomy, "block_influence", {}, lambda: of_each(calibrator, anatomy))
    return found


def influence(pairs: Iterable[tuple[Tensor, Tensor]], world: World | None = None) -> float:
    """1 - mean cosine between rows of the first and second of each pair, both of shape (tokens, hidden).

    world: the processes that have the pairs together; None: this one alone.
    """
    cosines = torch.cat([_cosines(was, now) for was, now in pairs])
    return 1 - float((world or World()).gather(cosines).double().mean())


def _cosines(was: Tensor, now: Tensor) -> Tensor:
    return torch.cosine_similarity(was.float(), now.float(), dim=1)


def by_token(states: Tensor) -> Tensor:
    """States of a batch, of which a token may have several (hyper-connections), as (tokens, numbers of a token)."""
    return states.flatten(0, 1).flatten(1)


def can_stream(anatomy: Anatomy) -> bool:
    """True where blocks can be called one by one."""
    return anatomy.found is None or anatomy.found.one_by_one


def _in_whole_passes(
    calibrator: Calibrator, anatomy: Anatomy, what: str, look: Callable[[int, Tensor, Tensor], None]
) -> None:
    """Passes the windows through the whole model; `look` is told of each block's states before and behind it."""
    model, hooks = anatomy.model, list[Any]()

    def hook(index: int, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        look(index, states_of(args, kwargs), states_in(out))

    for index, block in enumerate(anatomy.blocks):
        of_block = partial(hook, index)
        hooks.append(
            block.register_forward_hook(lambda _, args, kw, out, of=of_block: of(args, kw, out), with_kwargs=True)
        )
    try:
        calibrator.pass_whole(model, what)
    finally:
        for one in hooks:
            one.remove()


@torch.no_grad()
def _of_each_block(calibrator: Calibrator, anatomy: Anatomy) -> list[float]:
    stream, found = BlockStream(anatomy, calibrator.mine, calibrator.batch_size), []
    count = len(anatomy.blocks)
    with calibrator.console.progress(count * calibrator.mine.numel(), "block influence", unit="tok") as bar:
        for index in range(count):
            before = [stream.states[number] for number in range(len(stream.states))]
            calibrator.forward(stream, index, bar, keep=True)
            pairs = ((was, stream.states[number]) for number, was in enumerate(before))
            by_tokens = ((by_token(was), by_token(now)) for was, now in pairs)
            found.append(influence(by_tokens, calibrator.sharing))
    return found


def runs_among(among: Sequence[int], length: int) -> list[int]:
    """First blocks of the runs of `length` consecutive ones `among` some."""
    return [start for start in among if set(range(start, start + length)) <= set(among)]


@torch.no_grad()
def _of_whole(calibrator: Calibrator, anatomy: Anatomy) -> list[float]:
    """The same in passes through the whole model; 0 of a block that text does not run, as cross-attention to images."""
    cosines = defaultdict[int, list[Tensor]](list)

    def note(block: int, was: Tensor, now: Tensor) -> None:
        cosines[block].append(_cosines(by_token(was), by_token(now)))

    _in_whole_passes(calibrator, anatomy, "block influence", note)
    of_all = {block: calibrator.sharing.gather(torch.cat(cosines[block])) for block in sorted(cosines)}
    found = {block: 1 - float(of_block.double().mean()) for block, of_block in of_all.items()}
    return [found.get(block, 0.0) for block in range(len(anatomy.blocks))]


def least_distant(
    anatomy: Anatomy, remove: int, calibrator: Calibrator, among: Sequence[int], together: Together
) -> list[int]:
    """The run of `remove` blocks `among` some whose entrance and exit are nearest in angle, the first among equals.

    Of those runs that can go.
    """
    distances: list[list[float]] = calibrator.remember(
        anatomy, "block_distances", {}, lambda: _distances(calibrator, anatomy)
    )
    for start in sorted(runs_among(among, remove), key=lambda start: (distances[start][start + remove], start)):
        if together.can_go(run := list(range(start, start + remove))):
            return run
    raise _stuck(together)


@torch.no_grad()
def _distances(calibrator: Calibrator, anatomy: Anatomy) -> list[list[float]]:
    """Angle between the states at two places, as a share of a half turn: before each block, and after the last one.

    arccos(cos) / pi of the last token of each window, the mean over windows (Gromov et al., 2403.17887).
    """
    places = _places(calibrator, anatomy) if can_stream(anatomy) else _places_whole(calibrator, anatomy)
    places = [calibrator.sharing.gather(place) for place in places]
    units = torch.nn.functional.normalize(torch.stack(places), dim=-1)  # (places, windows, hidden)
    cosines = torch.einsum("pwh,qwh->pqw", units, units).clamp(-1, 1)
    found: list[list[float]] = (cosines.arccos() / math.pi).mean(-1).tolist()
    return found


def _places(calibrator: Calibrator, anatomy: Anatomy) -> list[Tensor]:
    """States of the last token of each of this process's windows at each place, shape (windows, hidden)."""
    stream, count = BlockStream(anatomy, calibrator.mine, calibrator.batch_size), len(anatomy.blocks)

    def last_tokens() -> Tensor:
        return torch.cat([stream.states[number][:, -1].flatten(1).double() for number in range(len(stream.states))])

    places = [last_tokens()]
    with calibrator.console.progress(count * calibrator.mine.numel(), "angles of blocks", unit="tok") as bar:
        for index in range(count):
            calibrator.forward(stream, index, bar, keep=True)
            places.append(last_tokens())
    return places


def _places_whole(calibrator: Calibrator, anatomy: Anatomy) -> list[Tensor]:
    """The same in passes through the whole model: before each block, and behind the last one."""
    before, behind = defaultdict[int, list[Tensor]](list), defaultdict[int, list[Tensor]](list)

    def note(block: int, was: Tensor, now: Tensor) -> None:
        before[block].append(was[:, -1].flatten(1).double())
        behind[block].append(now[:, -1].flatten(1).double())

    _in_whole_passes(calibrator, anatomy, "angles of blocks", note)
    places = [torch.cat(behind[max(behind)])]
    for block in reversed(range(len(anatomy.blocks))):  # one that text does not run leaves the states as they are
        places.insert(0, torch.cat(before[block]) if block in before else places[0])
    return places


def least_needed(
    anatomy: Anatomy, remove: int, calibrator: Calibrator, among: Sequence[int], together: Together, by: str
) -> list[int]:
    """Blocks in the order of their removal; each is the one without which the model loses least at that point.

    among: those that may go, of which each is one that can with those before.

    by: perplexity, the loss on the calibration text; kl, the divergence from the whole model on it.
    """

    @cache
    def measure() -> Callable[[Any], float]:
        return calibrator.loss if by == "perplexity" else divergence_from(anatomy, calibrator)

    left, dropped = list(among), list[int]()
    passes = sum(len(left) - step for step in range(remove))
    with calibrator.console.progress(passes, "trying blocks", unit="pass") as bar:

        def without_each() -> list[float]:
            """The measure without each block that is left."""
            of_model, losses = measure(), []
            for index in left:
                with bypassed(anatomy, [*dropped, index]):
                    losses.append(of_model(anatomy.model))
                bar.update()
            return losses

        for _ in range(remove):
            losses = calibrator.remember(
                anatomy, "block_losses", {"dropped": dropped, "by": by, "left": left}, without_each
            )
            if not any(math.isfinite(loss) for loss in losses):
                raise Refused(
                    f"method.by={by}: what the model loses without each block is not finite: its activations overflow; "
                    "give dtype=float32 or bfloat16"
                )
            order = sorted(
                (loss if math.isfinite(loss) else math.inf, index) for loss, index in zip(losses, left, strict=True)
            )
            index = next((index for _, index in order if together.can_go([*dropped, index])), None)
            if index is None:
                raise _stuck(together)
            dropped.append(index)
            left.remove(index)
    return dropped


@torch.no_grad()
def divergence_from(anatomy: Anatomy, calibrator: Calibrator) -> Callable[[Any], float]:
    """Function of a model: its mean KL divergence in nats from the model as it is now, over all targets of the windows.

    The last states of the whole model are held, windows x seq_len x hidden numbers, of the windows of this process, and
    its head.
    """
    before = copy.copy(anatomy.model)  # keeps its modules when the model is rebuilt: the head may lose channels
    device, prefix = next(anatomy.model.parameters()).device, calibrator.prefix
    batches = [batch.to(device) for batch in calibrator.mine.split(calibrator.batch_size)]
    whole = [target_states(anatomy.model, batch, prefix).flatten(0, 1) for batch in batches]

    @torch.no_grad()
    def divergence(model: Any) -> float:
        def of_rows(dense: Tensor, states: Tensor) -> Tensor:
            return position_divergences(logits_of(before, dense), logits_of(model, states))[0]

        parts = [
            by_chunks(model, of_rows, dense, target_states(model, batch, prefix).flatten(0, 1))
            for dense, batch in zip(whole, batches, strict=True)
        ]
        return float(calibrator.sharing.gather(torch.cat(parts)).mean())

    return divergence


def loss_increases(anatomy: Anatomy, calibrator: Calibrator, dense: float) -> list[list[float]]:
    """increases[block][0]: loss increase in nats without that block; `dense` is the loss of the whole model."""
    increases = []
    for index in range(len(anatomy.blocks)):
        with bypassed(anatomy, [index]):
            increases.append([calibrator.loss(anatomy.model, WINDOWS) - dense])
    return increases
