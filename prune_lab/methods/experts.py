"""method=experts: removes whole experts of a mixture, the same number from every block."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from prune_lab.errors import Refused
from prune_lab.methods.base import Method
from prune_lab.models.families import FAMILIES
from prune_lab.pruning.pruned import LayerRow, Pruned

if TYPE_CHECKING:
    from torch import Tensor

    from prune_lab.models.anatomy import Anatomy
    from prune_lab.models.unit_sets import FoundGroup
    from prune_lab.models.watched_experts import Mixture
    from prune_lab.pruning.calibration import Calibrator
    from prune_lab.pruning.expert_scores import ExpertSums

# Scores by what they need: sums over the calibration text, more than that, or none of it.
OF_SUMS = ("frequency", "gate_sum", "ean", "man", "msan", "reap")
OF_ROUTING = {"ranked_choice": "orders", "leave_one_out": "losses"}
WITHOUT_TEXT = ("aimer", "random")
SCORES = (*OF_SUMS, *OF_ROUTING, *WITHOUT_TEXT)
FEW = 128  # tokens of the calibration text under which an expert's mean is hardly known


@dataclass(frozen=True)
class Experts(Method):
    """Experts of lowest score with their rows of the router, the same number from every block; shared ones stay.

    score: a name of pruning/expert_scores.py; reap is the mean of what an expert adds to the states of its tokens
    (Lasby et al., 2510.13999). round_to: the number of experts that stay is a multiple of it. All blocks are scored in
    the dense model.
    """

    score: str = "reap"
    round_to: int = 1

    in_whole_passes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score not in SCORES:
            raise ValueError(f"score={self.score!r} is not one of {', '.join(SCORES)}")
        if self.round_to < 1:
            raise ValueError(f"round_to={self.round_to} must be at least 1")

    @property
    def cuts(self) -> tuple[str, ...]:
        """Experts."""
        return ("experts",) if self.amount > 0 else ()

    @property
    def calibrated(self) -> bool:
        """True where the score needs calibration text."""
        return self.score not in WITHOUT_TEXT

    @property
    def needs_whole_model(self) -> str | None:
        """None: a block is scored, and loses its experts, by itself."""
        return None

    def check(self, config: Any, amounts: Iterable[float]) -> None:
        """Raises Refused for a family that has no experts."""
        if config.model_type in FAMILIES:
            raise Refused(f"method=experts: {config.model_type} models have no experts; give method=structured")

    def check_model(self, anatomy: Anatomy, amounts: Iterable[float]) -> None:
        """Raises Refused where the experts are not found, or an amount leaves a number that its router cannot use."""
        from prune_lab.pruning.expert_statistics import MOST

        group, _ = self._mixtures(anatomy)
        if self.score == "leave_one_out" and group.count > MOST:
            raise Refused(
                f"method.score=leave_one_out passes each mixture once for every one of its {group.count} experts: at "
                f"most {MOST}; give another score, such as reap"
            )
        for amount in amounts:
            self._count_to_keep(anatomy, amount)

    def prune(self, anatomy: Anatomy, amount: float, seed: int, calibrator: Calibrator | None = None) -> Pruned:
        """Removes experts from every block and returns what was removed."""
        import torch

        from prune_lab.models.found_experts import router_groups
        from prune_lab.models.resize import dense_count, original_experts
        from prune_lab.pruning.expert_scores import keep_best
        from prune_lab.pruning.expert_statistics import expert_statistics
        from prune_lab.pruning.surgery import remove_units

        group, mixtures = self._mixtures(anatomy)
        count, total = self._count_to_keep(anatomy, amount), dense_count(anatomy, "experts")
        pruned = Pruned(_rows(anatomy, group, total, count))
        if count == group.count:
            return pruned
        sums = dict[int, Any]()
        if self.calibrated:
            assert calibrator is not None
            needs = OF_ROUTING.get(self.score, "")
            sums = expert_statistics(anatomy.model, mixtures, group.count, calibrator, needs)
        random = torch.Generator().manual_seed(seed)
        scores = [self._scores(anatomy, mixture, group, sums.get(mixture.block), random) for mixture in mixtures]
        keep = [keep_best(of_block, count, router_groups(anatomy.config)[0]) for of_block in scores]
        pruned.files["experts.csv"] = _table(mixtures, scores, keep, sums, original_experts(anatomy))
        pruned.warnings += _warnings_of(sums)
        if sums:
            tokens = [int(n) for found in sums.values() for n in found.tokens]
            few = sum(n < FEW for n in tokens)
            pruned.metrics |= {"experts/least_tokens": min(tokens), "experts/under_128_tokens": few}
        pruned.cuts += remove_units(anatomy, "experts", keep)
        return pruned

    def _mixtures(self, anatomy: Anatomy) -> tuple[FoundGroup, list[Mixture]]:
        """The group of all experts and the mixture of each block; raises Refused where they are not found."""
        from prune_lab.models.found_experts import mixtures_of
        from prune_lab.models.found_units import units_of

        found = units_of(anatomy.model)
        group, why = found.groups.get("experts"), found.why_not.get("experts")
        if group is not None:
            mixtures = mixtures_of(anatomy.model, group)
            if not isinstance(mixtures, str):
                return group, mixtures
            why = mixtures
        raise Refused(f"method=experts: experts of this {anatomy.config.model_type} model cannot be removed: {why}")

    def _count_to_keep(self, anatomy: Anatomy, amount: float) -> int:
        """Number of experts that stay in each block; raises Refused for one that the router cannot choose among."""
        from prune_lab.models.found_experts import can_choose, router_groups
        from prune_lab.models.resize import dense_count
        from prune_lab.models.watched_experts import most_of_a_token
        from prune_lab.pruning.selection import count_to_remove

        group, mixtures = self._mixtures(anatomy)
        total = dense_count(anatomy, "experts")
        count = max(1, total - count_to_remove(total, amount))
        if amount > 0 and self.round_to > 1:
            count = min(max(1, round(count / self.round_to)), total // self.round_to) * self.round_to
        count = min(count, group.count)
        top_k = most_of_a_token(anatomy.model, mixtures)
        # Of one expert some types make an MLP without a router.
        possible = [
            n
            for n in range(min(2, group.count), group.count + 1)
            if can_choose(n, top_k, *router_groups(anatomy.config))
        ]
        if count not in possible:
            amounts = ", ".join(f"{n} (amount={1 - n / total:g})" for n in possible)
            raise Refused(
                f"method.amount={amount:g} leaves {count} of {total} experts, among which the router cannot choose "
                f"{top_k} for each token: possible are {amounts}"
            )
        return count

    def _scores(
        self, anatomy: Anatomy, mixture: Mixture, group: FoundGroup, sums: ExpertSums | None, random: Any
    ) -> Tensor:
        """Score of each expert of a block, (experts,), float64; raises Refused where it is not finite."""
        import torch

        from prune_lab.pruning import expert_scores

        if self.score == "random":
            return torch.rand(group.count, generator=random, dtype=torch.float64)
        if self.score == "aimer":
            with anatomy.at_hand(mixture.block):
                found = expert_scores.aimer(_weights(anatomy, mixture, group))
        else:
            assert sums is not None
            if self.score == "ranked_choice":
                assert sums.orders is not None
                found = expert_scores.ranked_choice(sums.orders, int(sums.tokens.sum()) // len(sums.orders))
            elif self.score == "leave_one_out":
                assert sums.losses is not None
                found = sums.losses
            else:
                found = expert_scores.OF_SUMS[self.score](sums)
        if not found.isfinite().all():
            raise Refused(
                f"the scores of {mixture.experts} are not finite: weights or activations overflow; give another dtype"
            )
        return found.cpu()


def _weights(anatomy: Anatomy, mixture: Mixture, group: FoundGroup) -> list[Tensor]:
    """Weights of the experts of a block, of each matrix (experts, ...)."""
    found = list[Any]()
    for beside in group.beside:
        if beside.tensor.startswith(f"{mixture.experts}."):
            tensor = anatomy.model.get_parameter(beside.tensor).detach()
            if tensor.dim() == 3 or beside.widths != (1,):  # not biases
                found.append(tensor.movedim(beside.dim, 0).reshape(group.count, -1))
    return found


def _rows(anatomy: Anatomy, group: FoundGroup, total: int, count: int) -> list[LayerRow]:
    """The table of the scope, before shapes change: each expert owns an equal share of the tensors that it is in."""
    rows = []
    for beside in group.beside:
        if beside.tensor in dict(anatomy.model.named_parameters()):
            each = anatomy.model.get_parameter(beside.tensor).numel() // group.count
            rows.append(LayerRow(beside.tensor, each * total, each * (total - count)))
    return rows


def _table(
    mixtures: list[Mixture], scores: list[Tensor], keep: list[Tensor], sums: dict[int, ExpertSums],
    numbers: dict[int, list[int]],
) -> bytes:  # fmt: skip
    """experts.csv: block, expert, its tokens and gates in the calibration text, its score, whether it stays.

    numbers: of blocks that lost experts before, the dense model's numbers of those that are there.
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["block", "expert", "tokens", "mean_gate", "score", "kept"])
    for mixture, of_block, kept in zip(mixtures, scores, keep, strict=True):
        found = sums.get(mixture.block)
        for expert, score in enumerate(of_block.tolist()):
            seen: list[Any] = ["", ""]
            if found is not None:
                tokens = int(found.tokens[expert])
                seen = [tokens, f"{float(found.gates[expert]) / max(1, tokens):.6g}"]
            number = numbers[mixture.block][expert] if mixture.block in numbers else expert
            table.writerow([mixture.block, number, *seen, f"{score:.6g}", int(kept[expert])])
    return text.getvalue().encode()


def _warnings_of(sums: dict[int, ExpertSums]) -> list[str]:
    tokens = [int(n) for found in sums.values() for n in found.tokens]
    few = sum(n < FEW for n in tokens)
    if not few:
        return []
    return [
        f"{few} of {len(tokens)} experts got fewer than {FEW} tokens of the calibration text, the least one "
        f"{min(tokens)}: give more text (dataset.calibration.n_samples), or text of more kinds"
    ]
