"""Unstructured methods: a score, the weights that are ranked together, an allocation, and the way through the blocks.

The keys are checked before PyTorch is imported, so what prunes is imported when a method runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from prune_lab.errors import Refused
from prune_lab.methods.base import Method
from prune_lab.models.anatomy import out_in
from prune_lab.models.families import FAMILIES
from prune_lab.pruning.pattern import Pattern
from prune_lab.pruning.pruned import LayerRow, Pruned
from prune_lab.pruning.refit_targets import NEEDS_OF_TARGET, TARGETS
from prune_lab.pruning.scores import GRADIENTS, SCORES, Score
from prune_lab.pruning.unseen import FEW_TOKENS, warning_of

if TYPE_CHECKING:
    from torch import Tensor

    from prune_lab.dense_cache import DenseCache
    from prune_lab.models.anatomy import Anatomy
    from prune_lab.pruning.calibration import Calibrator
    from prune_lab.pruning.statistics import LinearStatistics
    from prune_lab.pruning.thresholds import ScoreCounts

ALLOCATIONS = ("uniform", "global", "owl", "sensitivity")
REFITS = ("none", *TARGETS)
_NO_GATES = "give method.score=wanda, which is the same without gates"


@dataclass(frozen=True)
class WeightMethod(Method):
    """Zeroes the weights of lowest score; a subclass names the score, or computes one of its own.

    pattern: N:M kept, such as 2:4; it fixes the amount. scope: the weights that are ranked together. allocation: how
    the amount is spread over blocks; "global" is one ranking over all of them, whatever the scope. refit: the weights
    of a row that stay make up for those that go; none, or by least squares for a target (pruning/refit_targets.py).
    """

    pattern: str | None = None
    scope: str = "layer"
    allocation: str = "uniform"
    refit: str = "none"

    # A name in pruning/scores.py. Without one, `importance` is overridden, and `needs` are the statistics it reads.
    score_name: ClassVar[str | None] = None
    needs: ClassVar[tuple[str, ...]] = ()
    scopes: ClassVar[tuple[str, ...]] = ("row", "layer", "global")

    def forward_passes(self, blocks: int) -> float:
        """Passes of any method; more for a refit of rows, and for a scan that tries each block at four amounts."""
        return 1.5 + 2 * (self.refit != "none") + 4 * blocks * (self.allocation == "sensitivity")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scope not in self.scopes:
            raise ValueError(f"scope={self.scope!r} is not one of {', '.join(self.scopes)}")
        if self.allocation not in ALLOCATIONS:
            raise ValueError(f"allocation={self.allocation!r} is not one of {', '.join(ALLOCATIONS)}")
        if self.refit not in REFITS:
            raise ValueError(f"refit={self.refit!r} is not one of {', '.join(REFITS)}")
        if self.scope == "global" and self.allocation not in ("uniform", "global"):
            raise ValueError(
                f"allocation={self.allocation!r} with scope=global: one ranking over all blocks is itself an "
                "allocation; give scope=layer or row"
            )
        if self.pattern is not None:
            Pattern.parse(self.pattern)
            if self.allocation != "uniform":
                raise ValueError(
                    f"allocation={self.allocation!r} with pattern={self.pattern!r}: a pattern takes the same share of "
                    "every block; give allocation=uniform"
                )

    @property
    def ranked_by(self) -> str | None:
        """Name of the score in pruning/scores.py that ranks the weights."""
        return self.score_name

    @property
    def named_score(self) -> Score | None:
        """The score of that name; None where the method, whatever its base, has an `importance` of its own."""
        is_own = type(self).importance is not WeightMethod.importance
        return None if self.ranked_by is None or is_own else SCORES[self.ranked_by]

    @property
    def statistics_needed(self) -> frozenset[str]:
        """The fields of LinearStatistics that the score reads."""
        named = self.named_score
        return frozenset(self.needs) if named is None else named.needs

    @property
    def _reads_gates(self) -> bool:
        return "gated_norm" in self.statistics_needed

    @property
    def calibrated(self) -> bool:
        """True where the score, the refit or the allocation needs calibration text."""
        return bool(self.statistics_needed) or self.refit != "none" or self.allocation in ("owl", "sensitivity")

    def solved_width(self, anatomy: Anatomy) -> int | None:
        """Most inputs of a Linear whose gram matrix the score or the refit solves with."""
        if "gram" not in self.statistics_needed and self.refit == "none":
            return None
        return max(out_in(linear, linear.weight).shape[1] for _, linear in anatomy.linears())

    def check(self, config: Any, amounts: Iterable[float]) -> None:
        """Raises Refused for a score by the gates of experts with a family that has none."""
        if self._reads_gates and config.model_type in FAMILIES:
            raise Refused(f"method.score={self.ranked_by}: {config.model_type} models have no experts; {_NO_GATES}")

    def check_model(self, anatomy: Anatomy, amounts: Iterable[float]) -> None:
        """Raises Refused for a score by the gates of experts where a model's cannot be seen."""
        from prune_lab.pruning.expert_gates import why_no_gates

        if self._reads_gates and (why := why_no_gates(anatomy.model)) is not None:
            raise Refused(
                f"method.score={self.ranked_by}: the gates of this {anatomy.config.model_type} model cannot be seen: "
                f"{why}; {_NO_GATES}"
            )

    @property
    def is_global(self) -> bool:
        """True where all weights of all blocks are ranked together."""
        return self.pattern is None and "global" in (self.scope, self.allocation)

    @property
    def needs_whole_model(self) -> str | None:
        """Reason: one ranking, gradients and losses are of the whole model, everything else is of a block."""
        if self.is_global:
            return "one ranking over all blocks needs all scores at once; give method.scope=layer or row, or owl"
        if self.allocation == "sensitivity":
            return "method.allocation=sensitivity takes the model's loss again and again; give uniform or owl"
        if of := self.statistics_needed & frozenset(GRADIENTS):
            return f"the score uses {', '.join(sorted(of))}, gradients of the whole model; give another score"
        return None

    def importance(self, weight: Tensor, statistics: LinearStatistics) -> Tensor:
        """Importance of each weight of a Linear, shape (out, in) as `weight`; the lowest are removed first."""
        named = self.named_score
        assert named is not None, "a method without a named score overrides `importance`"
        return named.function(weight, statistics)

    def prune(self, anatomy: Anatomy, amount: float, seed: int, calibrator: Calibrator | None = None) -> Pruned:
        """Zeroes weights of every prunable Linear and returns the masks that keep them zero."""
        from prune_lab.pruning.masks import Masks

        self._check_pattern(anatomy)
        pruned = Pruned()
        prune = self._prune_globally if self.is_global else self._prune_by_block
        keep = prune(anatomy, amount, seed, calibrator, pruned)
        pruned.masks = Masks({name: out_in(linear, keep[name]) for name, linear in anatomy.linears() if name in keep})
        pruned.masks.hold(anatomy.model)
        pruned.warnings += warning_of(pruned.unseen, len(pruned.rows))
        if self.pattern is not None and abs(pruned.realized - amount) > 1e-6:
            pruned.warnings.append(
                f"method.pattern={self.pattern} fixes the amount at {pruned.realized:g}; amount={amount:g} was not used"
            )
        return pruned

    def _prune_by_block(
        self, anatomy: Anatomy, amount: float, seed: int, calibrator: Calibrator | None, pruned: Pruned
    ) -> dict[str, Tensor]:
        """Keep-masks by Linear: each block is pruned with its own statistics before the next one is calibrated."""
        keep: dict[str, Tensor] = {}
        amounts = self._amounts(anatomy, amount, seed, calibrator, pruned)
        linears = anatomy.linears_by_block()
        for index, statistics in enumerate(self._block_statistics(anatomy, seed, calibrator)):
            for name, linear in linears[index]:
                mask = self._prune_and_refit(name, linear, amounts[index], statistics[name], pruned)
                pruned.rows.append(_row(name, mask))
                if not anatomy.is_on_disk:  # masks take a byte for each weight, and only training needs them
                    keep[name] = mask
        return keep

    def _prune_and_refit(
        self, name: str, linear: Any, amount: float, statistics: LinearStatistics, pruned: Pruned
    ) -> Tensor:
        """Prunes one Linear, refits the weights that stay, and returns its keep-mask, shape (out, in)."""
        if self.calibrated and statistics.is_unseen:
            return self._prune_unseen(name, linear, amount, pruned)
        if self.refit == "none":
            return self.prune_linear(name, linear, amount, statistics, pruned)
        dense = out_in(linear, linear.weight.detach()).clone()
        keep = self.prune_linear(name, linear, amount, statistics, pruned)
        if not keep.all():
            _refit(name, linear, dense, keep, statistics)
        return keep

    def _prune_unseen(self, name: str, linear: Any, amount: float, pruned: Pruned) -> Tensor:
        """Zeroes the smallest weights of a matrix that hardly a token of the calibration text came to."""
        pruned.unseen.append(name)
        return self._zero_lowest(linear, out_in(linear, linear.weight.detach()).float().abs(), amount)

    def prune_linear(
        self, name: str, linear: Any, amount: float, statistics: LinearStatistics, pruned: Pruned
    ) -> Tensor:
        """Zeroes weights of one Linear in place and returns its keep-mask, shape (out, in)."""
        return self._zero_lowest(linear, self._scores(name, linear, statistics), amount, statistics.score_counts)

    def _zero_lowest(self, linear: Any, scores: Tensor, amount: float, counts: ScoreCounts | None = None) -> Tensor:
        from prune_lab.pruning.masks import clear
        from prune_lab.pruning.selection import count_to_remove, keep_layer, keep_pattern, keep_rows

        if self.pattern is not None:
            keep = keep_pattern(scores, Pattern.parse(self.pattern))
        elif self.scope == "row":
            keep = keep_rows(scores, count_to_remove(scores.shape[1], amount))
        else:
            keep = keep_layer(scores, amount, counts)
        clear(out_in(linear, linear.weight), keep)
        return keep

    def _prune_globally(
        self, anatomy: Anatomy, amount: float, seed: int, calibrator: Calibrator | None, pruned: Pruned
    ) -> dict[str, Tensor]:
        """Keep-masks by Linear from one ranking over all blocks, with the statistics of the model as it is."""
        from prune_lab.pruning.selection import keep_global

        statistics = [*self._block_statistics(anatomy, seed, calibrator, behind_dense=True)]
        few = [name for of_block in statistics for name, found in of_block.items() if found.is_unseen]
        if few and self.statistics_needed:
            raise Refused(
                f"method.scope=global: {len(few)} matrices ({few[0]}, ...) saw fewer than {FEW_TOKENS} tokens of the "
                "calibration text, so that their scores cannot be ranked with others: give scope=layer or row, or more "
                "text (dataset.calibration.n_samples)"
            )
        scores = {
            name: self._scores(name, linear, of_block[name])
            for of_block, linears in zip(statistics, anatomy.linears_by_block(), strict=True)
            for name, linear in linears
        }
        masks = keep_global(list(scores.values()), amount, self._score_counts(self._cache_of_counts(anatomy), "all"))
        keep = dict(zip(scores, masks, strict=True))
        pruned.rows = [_row(name, mask) for name, mask in keep.items()]
        if self.refit != "none":
            self._refit_by_block(anatomy, keep, seed, calibrator)
        if self.statistics_needed and calibrator is not None and calibrator.propagate == "pruned":
            pruned.warnings.append(
                "one ranking over all blocks: all were calibrated for it before any was pruned to this amount, "
                "whatever dataset.calibration.propagate"
            )
        return keep

    def _refit_by_block(
        self, anatomy: Anatomy, keep: dict[str, Tensor], seed: int, calibrator: Calibrator | None
    ) -> None:
        """Applies masks that are known for all blocks, and refits block by block, behind blocks that are refitted."""
        from prune_lab.pruning.calibration import block_statistics
        from prune_lab.pruning.masks import clear

        blocks = block_statistics(anatomy, self._needs_of_refit(anatomy), seed, calibrator)
        for linears, statistics in zip(anatomy.linears_by_block(), blocks, strict=True):
            for name, linear in linears:
                dense = out_in(linear, linear.weight.detach()).clone()
                clear(out_in(linear, linear.weight), keep[name])
                if not keep[name].all():
                    _refit(name, linear, dense, keep[name], statistics[name])

    def _needs_of_refit(self, anatomy: Anatomy) -> dict[str, frozenset[str]]:
        """The statistics that the refit reads, by Linear.

        A target of the dense model is for the Linears by which a block writes: were those before them to give the dense
        model's outputs, too, one difference would be made up for twice.
        """
        if self.refit == "none":
            return {}
        if anatomy.found is not None and self.refit != "inputs":
            raise Refused(
                f"method.refit={self.refit}: which matrices of a {anatomy.config.model_type} model write to its states "
                "is not known; give method.refit=inputs"
            )
        writers = {of_block[-1].name for kind in anatomy.family.units for of_block in anatomy.unit_linears(kind)}
        return {name: NEEDS_OF_TARGET[self.refit if name in writers else "inputs"] for name, _ in anatomy.linears()}

    def _scores(self, name: str, linear: Any, statistics: LinearStatistics) -> Tensor:
        """Scores of a Linear's weights, (out, in); those that are zero already rank below all others."""
        weight = out_in(linear, linear.weight.detach())
        scores = self.importance(weight, statistics)
        if not scores.isfinite().all():
            raise Refused(
                f"the scores of {name} are not finite: its weights or activations overflow; give another dtype"
            )
        return scores.masked_fill(weight == 0, -1)

    def _block_statistics(
        self, anatomy: Anatomy, seed: int, calibrator: Calibrator | None, behind_dense: bool = False
    ) -> Iterator[dict[str, LinearStatistics]]:
        """The statistics that the score reads, block by block; and counts of its scores, where they can be kept."""
        from prune_lab.pruning.calibration import block_statistics

        of_refit = {} if self.is_global else self._needs_of_refit(anatomy)
        needs = {name: self.statistics_needed | of_refit.get(name, frozenset()) for name, _ in anatomy.linears()}
        cache = self._cache_of_counts(anatomy)  # taken before a block is pruned, while the model is the dense one
        for of_block in block_statistics(anatomy, needs, seed, calibrator, behind_dense):
            yield {
                name: replace(statistics, score_counts=self._score_counts(cache, name))
                for name, statistics in of_block.items()
            }

    def _cache_of_counts(self, anatomy: Anatomy) -> DenseCache | None:
        """Cache in which counts of the dense model's scores are kept; None where scores need more than the weights."""
        named = self.named_score
        return anatomy.dense_cache if named is not None and named.by_weight_alone else None

    def _score_counts(self, cache: DenseCache | None, of: str) -> ScoreCounts | None:
        """Counts of the dense model's scores, of one Linear or of all, kept from one amount to the next."""
        from prune_lab.pruning.thresholds import ScoreCounts

        return None if cache is None else cache.in_process(f"{self.ranked_by} of {of}", ScoreCounts)

    def _amounts(
        self, anatomy: Anatomy, amount: float, seed: int, calibrator: Calibrator | None, pruned: Pruned
    ) -> list[float]:
        """The amount of each block."""
        from prune_lab.pruning import allocation
        from prune_lab.pruning.loss_increase import AMOUNTS

        linears = anatomy.linears_by_block()
        sizes = [sum(linear.weight.numel() for _, linear in of_block) for of_block in linears]
        if self.allocation == "owl":
            assert calibrator is not None
            amounts = allocation.owl(_outlier_ratios(anatomy, seed, calibrator), amount, sizes)
        elif self.allocation == "sensitivity":
            assert calibrator is not None
            increases = self.loss_increases(anatomy, seed, calibrator, AMOUNTS)
            amounts = allocation.by_sensitivity(increases, AMOUNTS, amount, sizes)
        else:
            return [amount] * len(linears)
        pruned.warnings.append(f"{self.allocation} gives the blocks " + ", ".join(f"{a:.3f}" for a in amounts))
        return amounts

    def loss_increases(
        self, anatomy: Anatomy, seed: int, calibrator: Calibrator, amounts: tuple[float, ...]
    ) -> list[list[float]]:
        """increases[block][i]: loss increase in nats when one block alone loses amounts[i]; the model is unchanged."""
        from prune_lab.pruning.loss_increase import loss_increases

        linears = anatomy.linears_by_block()

        def prune_block(block: int, statistics: dict[str, LinearStatistics], amount: float) -> None:
            for name, linear in linears[block]:
                self._prune_and_refit(name, linear, amount, statistics[name], Pruned())

        statistics = self._block_statistics(anatomy, seed, calibrator, behind_dense=True)
        key = {"method": asdict(self) | {"amount": None, "allocation": None}, "seed": seed}  # neither is used
        return loss_increases(anatomy, statistics, prune_block, calibrator, amounts, type(self), key)

    def _check_pattern(self, anatomy: Anatomy) -> None:
        if self.pattern is None:
            return
        m = Pattern.parse(self.pattern).m
        for name, linear in anatomy.linears():
            inputs = out_in(linear, linear.weight).shape[1]
            if inputs % m:
                raise Refused(f"method.pattern={self.pattern}: {name} has {inputs} inputs, not a multiple of {m}")


def _outlier_ratios(anatomy: Anatomy, seed: int, calibrator: Calibrator) -> list[float]:
    """OWL's outlier ratio of each block of the dense model."""
    from prune_lab.pruning import allocation, scores
    from prune_lab.pruning.calibration import block_statistics

    needs, ratios = {name: frozenset({"input_norm"}) for name, _ in anatomy.linears()}, []
    blocks = block_statistics(anatomy, needs, seed, calibrator, behind_dense=True)
    for of_block, statistics in zip(anatomy.linears_by_block(), blocks, strict=True):
        values = [scores.wanda(out_in(linear, linear.weight.detach()), statistics[name]) for name, linear in of_block]
        ratios.append(allocation.outlier_ratio(values))
    return ratios


def _refit(name: str, linear: Any, dense: Tensor, keep: Tensor, statistics: LinearStatistics) -> None:
    """Refits the weights of a pruned Linear to the outputs of the dense one; those that are zero stay zero."""
    from prune_lab.pruning.refit import check_finite, refit_rows

    assert statistics.gram is not None
    weight = out_in(linear, linear.weight.detach())
    refitted = refit_rows(dense, weight, statistics.gram, keep & (dense != 0), error=statistics.error).to(weight.dtype)
    check_finite(name, refitted)
    weight.copy_(refitted)


def _row(name: str, keep: Tensor) -> LayerRow:
    return LayerRow(name, keep.numel(), keep.numel() - int(keep.sum()))
