"""Search for a shape: it finds what trying every shape finds, and its costs are those of models of transformers."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from conftest import ALL_FAMILIES, CPU, make_folder
from transformers import AutoConfig, AutoModelForCausalLM

from prune_lab.methods.damage import FILE, Damage
from prune_lab.models.anatomy import Anatomy
from prune_lab.models.load import HubModel
from prune_lab.pruning.calibration import Calibrator
from prune_lab.results.bounds import Bound
from prune_lab.sweeps import cost_fit, shape_search
from prune_lab.sweeps.shape_search import Axis, Counts, Space

WINDOWS = torch.randint(1, 300, (6, 24), generator=torch.Generator().manual_seed(4))

BLOCKS = Axis("blocks", 6, (5, 4, 3), (5, 3), (0.2, 0.9))
MLP = Axis("mlp", 64, (48, 32, 16), (48, 32, 16), (0.05, 0.2, 0.6))
HIDDEN = Axis("hidden", 32, (24, 16), (24, 16), (0.4, 1.5))


def params(counts: Counts) -> float:
    return 1000 * counts["hidden"] + counts["blocks"] * counts["hidden"] * (3 * counts["mlp"] + 40) + 7


def corners(*axes: Axis) -> tuple[tuple[Counts, dict[str, float]], ...]:
    found = []
    for counts in itertools.product(*((axis.counts[-1], axis.total) for axis in axes)):
        of_axis = {axis.name: count for axis, count in zip(axes, counts, strict=True)}
        found.append((of_axis, {"params/total": params(of_axis)}))
    return tuple(found)


SPACE = Space((BLOCKS, MLP, HIDDEN), corners(BLOCKS, MLP, HIDDEN))


def every_shape() -> list[tuple[Counts, float, float]]:
    """Counts, damage and parameters of each shape, by plain loops."""
    found = []
    for blocks, mlp, hidden in itertools.product((6, 5, 4, 3), (64, 48, 32, 16), (32, 24, 16)):
        of_blocks = {6: 0, 5: 0.2, 4: 0.55, 3: 0.9}[blocks]  # 4 lies halfway between those that were measured
        damage = of_blocks + {64: 0, 48: 0.05, 32: 0.2, 16: 0.6}[mlp] + {32: 0, 24: 0.4, 16: 1.5}[hidden]
        counts = {"blocks": blocks, "mlp": mlp, "hidden": hidden}
        found.append((counts, damage, params(counts)))
    return found


def test_damage_and_costs_of_every_shape() -> None:
    costs = numpy.broadcast_to(SPACE.cost("params/total"), SPACE.shape)
    for counts, damage, cost in every_shape():
        place = SPACE.place_of(counts)
        assert SPACE.counts_at(place) == counts
        assert SPACE.damage[place] == pytest.approx(damage)
        assert costs[place] == pytest.approx(cost, rel=1e-12)


@pytest.mark.parametrize("limit", [30_000, 45_000, 60_000, 70_000, 80_000])
def test_the_best_within_a_bound_is_what_trying_all_finds(limit: float) -> None:
    kept = shape_search.within([(Bound("params/total", limit), SPACE.cost("params/total"))], SPACE.shape)
    within = [(damage, counts) for counts, damage, cost in every_shape() if cost <= limit]
    assert int(kept.sum()) == len(within)
    found = shape_search.best_apart(SPACE, kept, 3)
    assert found[0] == min(within, key=lambda one: one[0])[1]
    damages = [float(SPACE.damage[SPACE.place_of(counts)]) for counts in found]
    assert damages == sorted(damages)


def test_what_is_taken_is_not_proposed_again() -> None:
    kept = numpy.ones(SPACE.shape, dtype=bool)
    first = shape_search.best_apart(SPACE, kept, 2)
    assert first[0] == SPACE.dense
    again = shape_search.best_apart(SPACE, kept, 2, first)
    assert not any(counts in first for counts in again)
    everything = shape_search.best_apart(SPACE, kept, 1000)
    assert len(everything) == len(every_shape())


def test_shapes_that_hardly_differ_are_one() -> None:
    fine = Axis("mlp", 100, tuple(range(99, 49, -1)), (50,), (1.0,))
    space = Space((fine,), (({"mlp": 50}, {"params/total": 1.0}), ({"mlp": 100}, {"params/total": 2.0})))
    found = shape_search.best_apart(space, numpy.ones(space.shape, dtype=bool), 3)
    assert found == [{"mlp": 100}, {"mlp": 96}, {"mlp": 92}]


def test_the_front_is_that_of_a_plain_comparison() -> None:
    shapes = every_shape()
    best = [
        counts
        for counts, damage, cost in shapes
        if not any((d < damage and c <= cost) or (d <= damage and c < cost) for _, d, c in shapes)
    ]
    found = shape_search.front(SPACE, SPACE.cost("params/total"))
    assert found[0] == SPACE.dense
    assert sorted(map(str, found)) == sorted(map(str, best))


def test_bounds_that_nothing_keeps_to_name_the_nearest() -> None:
    least = min(every_shape(), key=lambda one: one[2])
    bounded = [(Bound("params/total", 10.0), SPACE.cost("params/total"))]
    assert not shape_search.within(bounded, SPACE.shape).any()
    said = shape_search.nearest(bounded, SPACE)
    assert f"{least[2]:,.0f}" in said
    assert " ".join(f"{name}={count}" for name, count in least[0].items()) in said


def test_a_damage_that_falls_by_noise_or_is_not_finite() -> None:
    """A larger cut is never taken to be better, and one that gave no number is never chosen."""
    axis = Axis("mlp", 40, (30, 20, 10), (30, 20, 10), (0.3, 0.2, math.nan))
    assert axis.damage.tolist()[:3] == pytest.approx([0, 0.3, 0.3])
    assert axis.damage[3] >= 1e6


def test_too_many_shapes_are_refused() -> None:
    long = tuple(Axis(name, 1000, tuple(range(999, 0, -1)), (1,), (1.0,)) for name in ("mlp", "hidden", "heads"))
    with pytest.raises(ValueError, match="are too many to look at"):
        Space(long, ())


# A cost that is fitted.


def test_a_fit_finds_the_parts_of_a_cost() -> None:
    totals = {"blocks": 6, "mlp": 64, "heads": 4, "hidden": 32}
    space = Space(
        (BLOCKS, MLP, Axis("heads", 4, (3, 2), (2,), (0.1,)), HIDDEN),
        (({axis: n // 2 for axis, n in totals.items()}, {"params/total": 1.0}), (totals, {"params/total": 2.0})),
    )

    def milliseconds(counts: Counts) -> float:
        share = {axis: counts[axis] / total for axis, total in totals.items()}
        of_blocks = share["blocks"] * share["hidden"] * (6 * share["mlp"] + 2 * share["heads"])
        return 1.5 + 4 * share["blocks"] + of_blocks + 0.5 * share["hidden"]

    shapes = space.steps()
    assert space.dense not in shapes
    assert len({str(counts) for counts in shapes}) == len(shapes)
    fit = cost_fit.fit(shapes, [milliseconds(counts) for counts in shapes], totals)
    assert fit.error < 0.02
    assert min(fit.shares) >= 0
    for counts in ({"blocks": 5, "mlp": 48, "heads": 3, "hidden": 24}, totals):
        assert float(fit.cost(counts)) == pytest.approx(milliseconds(counts), rel=0.01)


@pytest.mark.parametrize("axis", ["mlp", "heads", "query_heads", "experts", "hidden", "blocks"])
def test_a_fit_knows_every_axis(axis: str) -> None:
    fit = cost_fit.fit([{axis: 8}, {axis: 4}, {axis: 2}], [9.0, 5.0, 3.0], {axis: 8})
    assert float(fit.cost({axis: 6})) == pytest.approx(7.0)


def test_a_fit_of_a_mixture_has_a_part_of_its_experts_widths() -> None:
    """Bytes in memory: what a mixture holds is experts x channels."""
    totals = {"blocks": 6, "mlp": 64, "experts": 8}
    space = Space(
        (BLOCKS, MLP, Axis("experts", 8, (6, 4), (4,), (0.1,))),
        (({"blocks": 3, "mlp": 16, "experts": 4}, {"params/total": 1.0}), (totals, {"params/total": 2.0})),
    )

    def megabytes(counts: Counts) -> float:
        return 20 + counts["blocks"] * (1 + 0.01 * counts["mlp"] * counts["experts"])

    shapes = [*space.steps(), totals]
    fit = cost_fit.fit(shapes, [megabytes(counts) for counts in shapes], totals)
    counts = {"blocks": 5, "mlp": 48, "experts": 6}
    assert float(fit.cost(counts)) == pytest.approx(megabytes(counts), rel=1e-3)


def test_a_fit_has_no_negative_part_and_says_how_far_it_is_off() -> None:
    """A cost that falls with the blocks, as noise may have it, is not drawn into the negative beyond the shapes."""
    shapes = [{"blocks": blocks} for blocks in (6, 5, 4, 3)]
    fit = cost_fit.fit(shapes, [10.0, 11.0, 12.0, 13.0], {"blocks": 6})
    assert min(fit.shares) >= 0
    assert fit.error > 0.05


# Costs and counts of real models.


QUICK = ("llama", "gpt2", "phi3")  # a stand-in, transposed and fused matrices


@pytest.mark.parametrize(
    "family",
    [
        *QUICK,
        *(
            pytest.param(family, marks=pytest.mark.slow)
            for family in [*ALL_FAMILIES, "qwen3_moe"]
            if family not in QUICK
        ),
    ],
)
def test_predicted_costs_are_those_of_stock_models(family: str, tmp_path: Path) -> None:
    """Of several shapes: parameters of a model of transformers of that config, and bytes that it is saved in."""
    changes: dict[str, Any] = {"n_layer" if family == "gpt2" else "num_hidden_layers": 4}
    if family == "qwen3_moe":
        changes |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
        folder = _moe(tmp_path / "model", changes)
    else:
        folder = make_folder(tmp_path / "model", family, **changes)
    model = HubModel(name=str(folder)).load(CPU, seed=0).model
    found = _survey(model)
    space = Space.read(found)
    assert "blocks" in space.names
    assert "mlp" in space.names
    half = {axis.name: int(axis.options[len(axis.options) // 2]) for axis in space.axes}
    least = {axis.name: int(axis.options[-1]) for axis in space.axes}
    for number, counts in enumerate((half, least, space.dense, space.dense | {"mlp": least["mlp"]})):
        config = AutoConfig.from_pretrained(folder)
        cut = _cut_by_hand(folder, config, counts, tmp_path / f"cut{number}")
        assert float(space.cost("params/total", counts)) == sum(p.numel() for p in cut.parameters())
        size = sum(file.stat().st_size for file in (tmp_path / f"cut{number}").glob("*.safetensors"))
        header = 8e-3 if family == "qwen3_moe" else 0.4e-3  # files have the experts one by one, with names of their own
        assert float(space.cost("size/disk_mb", counts)) == pytest.approx(size / 1e6, abs=header)


def _survey(model: Any) -> dict[str, Any]:
    method = Damage(amounts=(0.3, 0.5), round_to=8, held_out=2, hidden_refit="none")
    pruned = method.prune(Anatomy(model), method.amount, 0, Calibrator(WINDOWS))
    found: dict[str, Any] = json.loads(pruned.files[FILE])
    return found


def _moe(folder: Path, changes: dict[str, Any]) -> Path:
    make_folder(folder)  # for its tokenizer
    config = AutoConfig.for_model(
        "qwen3_moe", vocab_size=300, hidden_size=32, intermediate_size=48, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True, **changes,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def _cut_by_hand(folder: Path, config: Any, counts: Counts, to: Path) -> Any:
    """A model of transformers with the config's own fields set to the counts."""
    from prune_lab.methods.shape import Shape

    loaded = HubModel(name=str(folder)).load(CPU, seed=0)
    method = Shape(
        **counts, blocks_by="bi", blocks_refit="none", units_score="l2", units_refit="none", experts_score="random",
        hidden_score="random", hidden_refit="none",
    )  # fmt: skip
    method.prune(Anatomy(loaded.model), 0.0, 0, Calibrator(WINDOWS))
    loaded.model.save_pretrained(to)
    stock = AutoModelForCausalLM.from_pretrained(to)
    fields = {"blocks": ("num_hidden_layers", "n_layer"), "hidden": ("hidden_size", "n_embd")}
    for axis, names in fields.items():
        if axis in counts:
            assert counts[axis] in {getattr(stock.config, name, None) for name in names}
    return stock
