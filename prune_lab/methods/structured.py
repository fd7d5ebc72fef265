"""method=structured: removes whole units (MLP channels, KV groups, query heads), the same number from every block.

Or channels of the hidden size, which no block has for itself: one set for the whole model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from prune_lab.errors import Refused
from prune_lab.methods.base import Method
from prune_lab.models.anatomy import ALIGNED, HIDDEN, LABELS
from prune_lab.models.families import FAMILIES, QUERY_HEADS, check_grouped, unit_kind
from prune_lab.models.stand_in import check_stand_in, held, needs_stand_in, note_of, why_held_no_more
from prune_lab.pruning.pruned import Pruned
from prune_lab.pruning.refit_targets import NEEDS_OF_TARGET, TARGETS
from prune_lab.pruning.scores import OF_HIDDEN, OF_UNITS
from prune_lab.pruning.unseen import warning_of

if TYPE_CHECKING:
    from torch import Tensor

    from prune_lab.models.anatomy import Anatomy, UnitLinear, UnitSet
    from prune_lab.pruning.calibration import Calibrator
    from prune_lab.pruning.statistics import LinearStatistics


REFITS = ("none", "bias", *TARGETS)
REFITS_OF_HIDDEN = ("none", "inputs")


@dataclass(frozen=True)
class Structured(Method):
    """MLP channels, KV groups, query heads of lowest score (by L2 norm: Li et al., 1608.08710), as many in each block.

    A stock config holds one width for all blocks, so each block drops its own units, but as many as the others.
    units: their kinds. score: a name in OF_UNITS of pruning/scores.py, summed over a unit; or obs, which removes what
    the weights that stay can best make up for (pruning/obs.py: OSSCAR, 2403.12983). round_to: the number of MLP
    channels that stay is a multiple of it. refit: the Linear that reads the units makes up for those that go; none, by
    its bias (FLAP: An et al., 2312.11983), or by its other weights and its bias, for a target
    (pruning/refit_targets.py). physical: the matrices get smaller; else the units are zeroed.
    query_heads: of each KV group the same number of query heads goes, and its key and value stay.
    hidden: channels of the hidden size, by Minitron's score (pruning/hidden.py); what is left is the model with zeros
    in their place (models/hidden.py), and refit=inputs sets the Linears that read the states.
    """

    units: tuple[str, ...] = ("mlp",)
    score: str = "l2"
    round_to: int | None = None
    refit: str = "none"
    physical: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "units", tuple(self.units))
        kinds = {*LABELS, HIDDEN}
        if not self.units or set(self.units) - kinds or len(set(self.units)) != len(self.units):
            raise ValueError(
                f"units={list(self.units)} must be one or more of {', '.join(LABELS)}, each once, or hidden"
            )
        if {"heads", QUERY_HEADS} <= {*self.units}:
            raise ValueError(
                f"units={list(self.units)}: a KV group of heads has its query heads, whose weights would be counted "
                f"twice; give one of heads and {QUERY_HEADS}, and prune its export for the other"
            )
        if HIDDEN in self.units:
            self._check_hidden()
        elif self.score not in OF_UNITS:
            raise ValueError(f"score={self.score!r} is not one of {', '.join(OF_UNITS)}")
        if self.refit not in REFITS:
            raise ValueError(f"refit={self.refit!r} is not one of {', '.join(REFITS)}")
        if self.round_to is not None and self.round_to < 1:
            raise ValueError(f"round_to={self.round_to} must be at least 1")

    def _check_hidden(self) -> None:
        """Raises ValueError for keys that do not go with channels of the hidden size."""
        if len(self.units) > 1:
            raise ValueError(
                f"units={list(self.units)}: hidden stands alone, since all other units have weights along its "
                "channels, which would be counted twice; give units=[hidden], and prune its export for the others"
            )
        if self.score not in OF_HIDDEN:
            raise ValueError(
                f"score={self.score!r} is of MLP channels and KV groups; for units=[hidden] give one of "
                f"{', '.join(OF_HIDDEN)}"
            )
        if self.refit not in REFITS_OF_HIDDEN:
            raise ValueError(
                f"refit={self.refit!r} is not one of {', '.join(REFITS_OF_HIDDEN)}, which go with units=[hidden]"
            )
        if not self.physical:
            raise ValueError(
                "physical=false: a channel of units=[hidden] is in norms and biases, too, which masks do not hold at "
                "zero; give physical=true"
            )

    @property
    def cuts(self) -> tuple[str, ...]:
        """Its kinds of units, unless they stay as zeros."""
        return self.units if self.physical and self.amount > 0 else ()

    @property
    def is_of_hidden(self) -> bool:
        """True where channels of the hidden size go."""
        return self.units == (HIDDEN,)

    @property
    def calibrated(self) -> bool:
        """True where the choice or the refit needs calibration text."""
        if self.is_of_hidden:
            return self.score == "minitron" or self.refit != "none"
        return bool(OF_UNITS[self.score].needs) or self.refit != "none"

    def solved_width(self, anatomy: Anatomy) -> int | None:
        """Most inputs of a Linear that reads units, where the choice or the refit solves with their gram matrix."""
        if self.is_of_hidden:
            return anatomy.unit_count(HIDDEN) if self.refit != "none" else None
        if self.refit not in TARGETS and "gram" not in OF_UNITS[self.score].needs:
            return None
        sets = (s for group in self._groups(anatomy) for s in anatomy.unit_sets(group))
        return max(s.parts[-1].weight.shape[1] for s in sets)

    def check(self, config: Any, amounts: Iterable[float]) -> None:
        """Raises Refused for kinds of units that a described family lacks, and for counts that its config cannot hold.

        The units of other models are known when they are loaded (check_model).
        """
        if config.model_type not in FAMILIES or self.is_of_hidden:
            return
        for kind in self.units:
            total = unit_kind(config, kind).count_of(config)
            check_grouped(config, kind, total)
            if total is None:  # left to a default: known when the model is there
                continue
            possible = held(config, kind, total)
            for amount in amounts:
                if self.physical and (count := self._count(kind, total, amount)) not in possible:
                    raise self._not_held(config, kind, amount, count, total, possible)

    def check_model(self, anatomy: Anatomy, amounts: Iterable[float]) -> None:
        """Raises Refused for kinds of units that a model lacks, and for counts that its config cannot hold."""
        if self.is_of_hidden:
            from prune_lab.pruning.hidden import check_hidden

            check_hidden(anatomy, self.score, {self._count_to_keep(anatomy, HIDDEN, amount) for amount in amounts})
            return
        if anatomy.found is not None and self.refit in ("dense", "residual"):
            raise Refused(
                f"method.refit={self.refit}: which matrices of a {anatomy.config.model_type} model write to its states "
                "is not known; give method.refit=inputs"
            )
        for group in self._groups(anatomy):
            counts = {self._count_to_keep(anatomy, group, amount) for amount in amounts}
            if self.physical and needs_stand_in(anatomy, group, counts):
                check_stand_in(anatomy.model)

    def prune(self, anatomy: Anatomy, amount: float, seed: int, calibrator: Calibrator | None = None) -> Pruned:
        """Removes (or zeroes) units of every chosen kind and returns what was removed from each Linear.

        Units are zeroed block by block, so that later blocks are calibrated on the outputs of the pruned ones; shapes
        change at the end, all at once.
        """
        groups = [HIDDEN] if self.is_of_hidden else self._groups(anatomy)
        counts = {group: self._count_to_keep(anatomy, group, amount) for group in groups}
        return self.prune_to(anatomy, counts, seed, calibrator)

    def prune_to(
        self, anatomy: Anatomy, counts: dict[str, int], seed: int, calibrator: Calibrator | None = None
    ) -> Pruned:
        """Likewise down to a count of each group of units in each block, counts that the config can hold."""
        model_type = anatomy.config.model_type
        if self.is_of_hidden:
            from prune_lab.pruning.hidden import prune_hidden

            pruned = prune_hidden(anatomy, counts[HIDDEN], self.score, self.refit != "none", seed, calibrator)
        else:
            pruned = self._prune_units(anatomy, counts, seed, calibrator)
        if anatomy.config.model_type != model_type:
            pruned.warnings.append(note_of(model_type, anatomy.config.model_type, type(anatomy.model).__name__))
        return pruned

    def _prune_units(self, anatomy: Anatomy, kept: dict[str, int], seed: int, calibrator: Calibrator | None) -> Pruned:
        """Removes (or zeroes) units of the blocks; kept: how many of each group stay in a block."""
        import torch

        from prune_lab.models.resize import dense_count
        from prune_lab.pruning.surgery import remove_units, unit_masks, zero_units
        from prune_lab.pruning.units import rows_of_table

        pruned = Pruned()
        losing = [group for group, count in kept.items() if count < anatomy.unit_count(group)]
        sets = {group: anatomy.unit_sets(group) for group in kept}
        keep = {group: [torch.ones(s.units, dtype=torch.bool) for s in of_group] for group, of_group in sets.items()}
        of_block = defaultdict[int, list[tuple[str, int]]](list)
        for group in losing:
            for number, s in enumerate(sets[group]):
                of_block[s.block].append((group, number))
        for index, statistics in enumerate(self._block_statistics(anatomy, losing, seed, calibrator)):
            for group, number in of_block[index]:
                s = sets[group][number]
                keep[group][number] = self._prune_set(s, statistics, s.units - s.multiple * kept[group], pruned)
                zero_units(s.parts, keep[group][number])
        for group, count in kept.items():
            pruned.rows += rows_of_table(anatomy, group, dense_count(anatomy, group), count)
            if self.physical:
                pruned.cuts += remove_units(anatomy, group, keep[group])
            else:
                for s, mask in zip(sets[group], keep[group], strict=True):
                    pruned.masks.keep.update(unit_masks(s.parts, mask))
        pruned.warnings += warning_of(pruned.unseen, sum(len(s.parts) for of in sets.values() for s in of))
        pruned.warnings = list(dict.fromkeys(pruned.warnings + self._left_out(anatomy)))
        return pruned

    def _groups(self, anatomy: Anatomy) -> list[str]:
        """The groups of units of the chosen kinds."""
        return [group for kind in self.units for group in anatomy.unit_groups(kind)]

    def _left_out(self, anatomy: Anatomy) -> list[str]:
        """Warnings of units of the chosen kinds that no group has."""
        if anatomy.found is None:
            return []
        from prune_lab.models.found_units import units_of

        why_not = units_of(anatomy.model).why_not
        return [f"some {LABELS[kind]} stay: {why_not[kind]}" for kind in self.units if kind in why_not]

    def _count_to_keep(self, anatomy: Anatomy, group: str, amount: float) -> int:
        """Number of units of a group that stay in each block; raises Refused where the config cannot hold it."""
        from prune_lab.models.resize import dense_count

        total = dense_count(anatomy, group)
        check_grouped(anatomy.config, group, total)
        count = min(self._count(group, total, amount), anatomy.unit_count(group))
        if self.physical and not anatomy.can_hold(group, count):
            if not anatomy.fits_experts(group, count):
                raise Refused(
                    f"method.amount={amount:g} leaves {count} of {total} channels of each expert, which PyTorch's "
                    f"grouped products, by which transformers computes them, do not take: they take multiples of "
                    f"{ALIGNED}; give method.round_to={ALIGNED}"
                )
            possible = anatomy.possible_counts(group, near=count)
            raise self._not_held(anatomy.config, group, amount, count, total, possible)
        return count

    def _count(self, group: str, total: int, amount: float) -> int:
        """Number of `total` units that stay after an amount and rounding."""
        from prune_lab.pruning.selection import count_to_remove

        count, kind = max(1, total - count_to_remove(total, amount)), group.partition(":")[0]
        if kind in ("mlp", HIDDEN) and self.round_to is not None and amount > 0:
            if self.round_to > total:
                many = "channels of the hidden size" if kind == HIDDEN else f"{LABELS[kind]} of a block"
                raise Refused(f"method.round_to={self.round_to} is more than the {total} {many}")
            count = min(max(1, round(count / self.round_to)), total // self.round_to) * self.round_to
        return count

    def _not_held(self, config: Any, group: str, amount: float, count: int, total: int, possible: list[int]) -> Refused:
        """The refusal of a count of units, `total` of which there were, that a config cannot hold."""
        kind, _, field = group.partition(":")
        amounts = ", ".join(f"{n} (amount={1 - n / total:g})" for n in possible)
        others = [other for other in self.units if other != kind]
        without = f"method.units=[{','.join(others)}] or " if others else ""
        instead = "" if kind == HIDDEN else f"; or give {without}method.physical=false, which leaves zeros"
        why = why_held_no_more(config, "heads" if kind == HIDDEN else kind) if config.model_type in FAMILIES else ""
        label = LABELS.get(kind, "channels of the hidden size")
        return Refused(
            f"method.units=[{','.join(self.units)}]: method.amount={amount:g} leaves {count} of {total} {label}"
            f"{field and f' ({field})'}, which a stock {config.model_type} config cannot hold: {why}possible are "
            f"{amounts}{instead}"
        )

    def _prune_set(self, s: UnitSet, statistics: dict[str, LinearStatistics], remove: int, pruned: Pruned) -> Tensor:
        """The units of a set that stay when `remove` go, bools (units,); the Linear that reads them is refitted.

        Of an expert that hardly a token came to those of lowest norm go.
        """
        from prune_lab.pruning.units import choose_units

        reader = s.parts[-1]
        if self.calibrated and statistics[reader.name].is_unseen:
            pruned.unseen += [part.name for part in s.parts]
            return choose_units("l2", s.parts, statistics, remove, centred=False, groups=s.groups)[0]
        keep = self._choose(s.parts, statistics, remove, pruned, s.groups)
        if not keep.all():
            self._refit(reader, keep, statistics, pruned)
        return keep

    def _choose(
        self,
        linears: list[UnitLinear],
        statistics: dict[str, LinearStatistics],
        remove: int,
        pruned: Pruned,
        groups: int = 1,
    ) -> Tensor:
        """The units of a block that stay when `remove` go, bools (units,); groups: as in choose_units."""
        from prune_lab.pruning.gram import DAMPING
        from prune_lab.pruning.units import choose_units

        reader = linears[-1]
        centred = self.refit != "none" and reader.linear.bias is not None  # then the refit moves the bias, too
        keep, damping = choose_units(self.score, linears, statistics, remove, centred, groups)
        if damping > DAMPING:
            pruned.warnings.append(f"{reader.name}: score={self.score} needed damping {damping:g}, not {DAMPING:g}")
        return keep

    def _needs_of_refit(self, reader: UnitLinear) -> frozenset[str]:
        """The statistics that the refit of a Linear reads: of one with a bias the means, too."""
        if self.refit == "none":
            return frozenset()
        means = frozenset({"variance"} if reader.linear.bias is not None else ())
        return means | NEEDS_OF_TARGET[self.refit] if self.refit in TARGETS else means

    def _refit(self, reader: UnitLinear, keep: Tensor, statistics: dict[str, LinearStatistics], pruned: Pruned) -> None:
        """Changes the Linear that reads the units to make up for those that go; keep: bools (units,)."""
        from prune_lab.pruning.gram import DAMPING
        from prune_lab.pruning.surgery import refit_reader, shift_bias

        of_reader = statistics[reader.name]
        if self.refit in TARGETS:
            damping = refit_reader(reader, keep, of_reader)
            if damping > DAMPING:
                pruned.warnings.append(f"{reader.name}: the refit needed damping {damping:g} instead of {DAMPING:g}")
        elif self.refit == "bias" and reader.linear.bias is None:
            pruned.warnings.append(
                f"method.refit=bias changed nothing: {reader.name.rpartition('.')[2]} has no bias in this model"
            )
        elif self.refit == "bias":
            assert of_reader.mean is not None
            shift_bias(reader, keep, of_reader.mean)

    def _block_statistics(
        self,
        anatomy: Anatomy,
        groups: list[str],
        seed: int,
        calibrator: Calibrator | None,
        behind_dense: bool = False,
    ) -> Iterator[dict[str, LinearStatistics]]:
        """The statistics that the choice and the refit read, of those Linears that they read, block by block."""
        from prune_lab.pruning.calibration import block_statistics
        from prune_lab.pruning.surgery import unit_sums

        score = OF_UNITS[self.score]
        linears = [linear for group in groups for s in anatomy.unit_sets(group) for linear in s.parts]
        by_name = {linear.name: linear for linear in linears}
        readers = {linear.name for linear in linears if linear.side == "columns"}
        needs = {name: score.needs for name in by_name if name in readers or not score.output_only}
        for reader in (linear for linear in linears if linear.side == "columns"):
            needs[reader.name] = score.needs | self._needs_of_refit(reader)

        def saliency(order: int) -> dict[str, Tensor]:
            """Sums over units by Linear, (units,): the gradient of a weight is not kept."""
            assert calibrator is not None
            granularity = " ".join(("units", *groups))
            return calibrator.saliency(
                anatomy, order, granularity, lambda name, value: unit_sums(by_name[name], value), set(by_name)
            )

        return block_statistics(anatomy, needs, seed, calibrator, behind_dense, saliency)

    def loss_increases(
        self, anatomy: Anatomy, seed: int, calibrator: Calibrator, amounts: tuple[float, ...], kind: str
    ) -> list[list[float]]:
        """increases[block][i]: loss increase in nats when one block alone loses amounts[i] of its units of a kind."""
        from prune_lab.pruning.loss_increase import loss_increases
        from prune_lab.pruning.selection import count_to_remove
        from prune_lab.pruning.surgery import zero_units

        units, (group,) = anatomy.unit_count(kind), anatomy.unit_groups(kind)
        of_block = anatomy.unit_linears(group)

        def prune_block(block: int, statistics: dict[str, LinearStatistics], amount: float) -> None:
            keep = self._choose(of_block[block], statistics, count_to_remove(units, amount), Pruned())
            if not keep.all():
                self._refit(of_block[block][-1], keep, statistics, Pruned())
            zero_units(of_block[block], keep)

        statistics = self._block_statistics(anatomy, [group], seed, calibrator, behind_dense=True)
        key = {"method": asdict(self) | {"amount": None, "units": None}, "kind": kind, "seed": seed}  # neither is used
        return loss_increases(anatomy, statistics, prune_block, calibrator, amounts, type(self), key)
