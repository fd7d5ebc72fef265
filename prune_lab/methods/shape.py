"""method=shape: cuts a model to given numbers of blocks, MLP channels, KV groups, experts and hidden channels."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from prune_lab.errors import Refused
from prune_lab.methods.base import Method
from prune_lab.methods.depth import REFITS as REFITS_OF_BLOCKS
from prune_lab.methods.depth import WAYS, Depth
from prune_lab.methods.experts import SCORES as SCORES_OF_EXPERTS
from prune_lab.methods.experts import Experts
from prune_lab.methods.structured import REFITS, REFITS_OF_HIDDEN, Structured
from prune_lab.models.anatomy import HIDDEN, LABELS
from prune_lab.pruning.pruned import LayerRow, Pruned
from prune_lab.pruning.scores import OF_HIDDEN, OF_UNITS

if TYPE_CHECKING:
    from prune_lab.models.anatomy import Anatomy
    from prune_lab.pruning.calibration import Calibrator

UNITS = tuple(LABELS)
AXES = ("blocks", *UNITS, "experts", HIDDEN)  # in the order in which they are cut
EITHER = ("heads", "query_heads")  # one of them alone: a KV group goes with its query heads
TITLES = {"blocks": "blocks", **LABELS, "experts": "experts", HIDDEN: "hidden channels"}


@dataclass(frozen=True)
class Ways(Method):
    """Ways to lose units of each axis of a shape: how those that go are chosen, and how what stays makes up for them.

    blocks_by, blocks_refit: by and refit of method=depth; auto: residual where the MLP's outputs are added to the
    states as they are, else none. units_score, units_refit: score and refit of method=structured for MLP channels and
    KV groups; hidden_score, hidden_refit: for the hidden size. experts_score: score of method=experts.
    """

    blocks_by: str = "angle"
    blocks_refit: str = "auto"
    units_score: str = "obs"
    units_refit: str = "inputs"
    experts_score: str = "reap"
    hidden_score: str = "minitron"
    hidden_refit: str = "inputs"

    not_applicable: ClassVar[tuple[str, ...]] = ("amount",)

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, allowed in (
            ("blocks_by", WAYS),
            ("blocks_refit", ("auto", *REFITS_OF_BLOCKS)),
            ("units_score", tuple(OF_UNITS)),
            ("units_refit", REFITS),
            ("experts_score", SCORES_OF_EXPERTS),
            ("hidden_score", tuple(OF_HIDDEN)),
            ("hidden_refit", REFITS_OF_HIDDEN),
        ):
            if (value := getattr(self, key)) not in allowed:
                raise ValueError(f"{key}={value!r} is not one of {', '.join(allowed)}")

    def method_of(self, axis: str, amount: float = 0.0) -> Method:
        """The method that cuts along an axis alone."""
        if axis == "blocks":
            return Depth(amount=amount, by=self.blocks_by, refit=self.blocks_refit.replace("auto", "residual"))
        if axis == "experts":
            return Experts(amount=amount, score=self.experts_score)
        if axis == HIDDEN:
            return Structured(amount=amount, units=(HIDDEN,), score=self.hidden_score, refit=self.hidden_refit)
        return Structured(amount=amount, units=(axis,), score=self.units_score, refit=self.units_refit)


@dataclass(frozen=True)
class Shape(Ways):
    """Cuts a model to a shape: numbers of what stays in each block, and of blocks; null: as many as there are.

    query_heads: of each KV group. Blocks go first, then channels and groups together, experts, and hidden channels
    last, each calibrated on what is left by then. held_out: the last so many calibration windows do not calibrate; on
    them `shape/kl` is measured.
    """

    blocks: int | None = None
    mlp: int | None = None
    heads: int | None = None
    query_heads: int | None = None
    experts: int | None = None
    hidden: int | None = None
    held_out: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for axis, count in self.counts.items():
            if count < 1:
                raise ValueError(f"{axis}={count} must be at least 1: the number of {TITLES[axis]} that stay")
        if set(EITHER) <= set(self.counts):
            raise ValueError("heads and query_heads: a KV group goes with its query heads; give one of them")
        if self.held_out < 0:
            raise ValueError(f"held_out={self.held_out} must not be negative: a number of calibration windows")

    @property
    def counts(self) -> dict[str, int]:
        """Number of what stays, by axis, of those that are given, in the order in which they are cut."""
        return {axis: count for axis in AXES if (count := getattr(self, axis)) is not None}

    @property
    def cuts(self) -> tuple[str, ...]:
        """Axes along which counts are given."""
        return tuple(self.counts)

    @property
    def calibrated(self) -> bool:
        """True where the way along an axis needs calibration text, or windows are held out."""
        return self.held_out > 0 or any(self.method_of(axis).calibrated for axis in self.counts)

    def forward_passes(self, blocks: int) -> float:
        """Sum of those of the ways."""
        return sum(self.method_of(axis).forward_passes(blocks) for axis in self.counts)

    def solved_width(self, anatomy: Anatomy) -> int | None:
        """Most inputs of a Linear that one of the ways solves for."""
        widths = [self.method_of(axis).solved_width(anatomy) for axis in self.counts]
        return max((width for width in widths if width is not None), default=None)

    def check_model(self, anatomy: Anatomy, amounts: Iterable[float]) -> None:
        """Raises Refused for a count that is more than there are, or that the config cannot hold."""
        for axis, count in self.counts.items():
            total = total_of(anatomy, axis)
            if count > total:
                raise Refused(f"method.{axis}={count}: the model has {total} {TITLES[axis]}; give at most {total}")
            if axis in ("blocks", "experts"):
                _said_as(f"method.{axis}={count}", self._way(anatomy, axis, count).check_model, anatomy, total, count)
            elif not anatomy.can_hold(group_of(anatomy, axis), count):
                possible = anatomy.possible_counts(group_of(anatomy, axis), near=count)
                raise Refused(
                    f"method.{axis}={count}: a stock {anatomy.config.model_type} config cannot hold {count} of {total} "
                    f"{TITLES[axis]}; possible are {', '.join(map(str, possible))}"
                )

    def _way(self, anatomy: Anatomy, axis: str, count: int) -> Method:
        """The method that leaves a count along an axis."""
        return self.method_of(axis, 1 - count / total_of(anatomy, axis))

    def prune(self, anatomy: Anatomy, amount: float, seed: int, calibrator: Calibrator | None = None) -> Pruned:
        """Cuts the model along one axis after the other, and returns the table of all its matrices."""
        from prune_lab.pruning.block_importance import divergence_from

        divergence: Callable[[Any], float] | None = None
        if self.held_out:
            assert calibrator is not None
            calibrator, held_out = split(calibrator, self.held_out)
            divergence = divergence_from(anatomy, held_out)
        before, pruned = _sizes(anatomy), Pruned()
        for axis in ("blocks", "units", "experts", HIDDEN):
            of_axis = self._cut(axis, anatomy, seed, calibrator)
            pruned.cuts += of_axis.cuts
            pruned.warnings += of_axis.warnings
            pruned.files |= of_axis.files
            pruned.metrics |= of_axis.metrics
        now = _sizes(anatomy)
        pruned.rows = [LayerRow(name, size, size - now.get(name, 0)) for name, size in before.items()]
        pruned.warnings = list(dict.fromkeys(pruned.warnings))
        if divergence is not None:
            pruned.metrics |= {"shape/kl": divergence(anatomy.model)}
        return pruned

    def _cut(self, axis: str, anatomy: Anatomy, seed: int, calibrator: Calibrator | None) -> Pruned:
        """Cuts along an axis, or along those of the units of blocks, which one pass over the text calibrates."""
        if axis == "units":
            counts = {group_of(anatomy, kind): count for kind, count in self.counts.items() if kind in UNITS}
            if not counts:
                return Pruned()
            units = tuple(kind for kind in UNITS if kind in self.counts)
            of_units = Structured(units=units, score=self.units_score, refit=self.units_refit)
            return of_units.prune_to(anatomy, counts, seed, calibrator)
        if axis not in self.counts or self.counts[axis] == total_of(anatomy, axis):
            return Pruned()
        count = self.counts[axis]
        if axis == HIDDEN:
            of_hidden = self.method_of(axis)
            assert isinstance(of_hidden, Structured)
            return of_hidden.prune_to(anatomy, {HIDDEN: count}, seed, calibrator)
        way = self._way(anatomy, axis, count)
        if isinstance(way, Depth) and self.blocks_refit == "auto" and not _is_repairable(anatomy, calibrator):
            way = replace(way, refit="none")
        return way.prune(anatomy, way.amount, seed, calibrator)


def total_of(anatomy: Anatomy, axis: str) -> int:
    """Number of what there is along an axis; raises Refused where there is none, or no single one."""
    if axis == "blocks":
        return len(anatomy.blocks)
    return anatomy.unit_count(group_of(anatomy, axis))


def group_of(anatomy: Anatomy, axis: str) -> str:
    """Name of the one group of units of an axis; raises Refused where there is none, or several."""
    if axis in ("experts", HIDDEN):
        from prune_lab.models.found_units import units_of

        if axis == "experts" and (anatomy.found is None or axis not in units_of(anatomy.model).groups):
            raise Refused(f"method.experts: experts of this {anatomy.config.model_type} model are not known or none")
        return axis
    groups = anatomy.unit_groups(axis)
    if len(groups) != 1:
        raise Refused(
            f"method.{axis}: {TITLES[axis]} of this {anatomy.config.model_type} model have {len(groups)} counts in its "
            "config; give method=structured, which cuts them in proportion"
        )
    return groups[0]


def split(calibrator: Calibrator, held_out: int) -> tuple[Calibrator, Calibrator]:
    """The windows that calibrate, and the last ones, which are held out; raises Refused where none would be left."""
    windows = calibrator.windows
    if held_out >= len(windows):
        raise Refused(
            f"method.held_out={held_out} leaves no window of dataset.calibration.n_samples={len(windows)} to calibrate "
            f"on: give at most {len(windows) - 1}, such as a quarter"
        )
    return replace(calibrator, windows=windows[:-held_out]), replace(calibrator, windows=windows[-held_out:])


def _is_repairable(anatomy: Anatomy, calibrator: Calibrator | None) -> bool:
    from prune_lab.pruning.depth_refit import check_repairable

    if anatomy.found is not None:
        return False
    assert calibrator is not None
    try:
        check_repairable(anatomy, calibrator)
    except Refused:
        return False
    return True


def _said_as(key: str, check: Callable[..., None], anatomy: Anatomy, total: int, count: int) -> None:
    try:
        check(anatomy, [1 - count / total])
    except Refused as error:
        raise Refused(f"{key}: {error}") from error


def _sizes(anatomy: Anatomy) -> dict[str, int]:
    """Weights of each module that holds a matrix, by its name in the dense model; a tied matrix counts once."""
    from prune_lab.models.resize import dense_name

    sizes, holds_matrix = defaultdict[str, int](int), set[str]()
    for name, parameter in anatomy.model.named_parameters():
        module = dense_name(anatomy, name).removesuffix(".weight").removesuffix(".bias")
        sizes[module] += parameter.numel()
        if parameter.dim() > 1:
            holds_matrix.add(module)
    return {name: size for name, size in sizes.items() if name in holds_matrix}
