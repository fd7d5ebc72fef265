"""What a run says where its figures disagree: each note with figures made by hand, on both sides of its limit."""

from __future__ import annotations

from typing import Any

import pytest

from prune_lab.results import run_warnings
from prune_lab.results.summary import Summary

# A model of 10 MB and 100 MB at the peak, which nothing happened to.
DENSE = {
    "params/total": 1000.0, "params/dense_total": 1000.0, "params/nonzero": 1000.0, "params/dense_nonzero": 1000.0,
    "params/reduction": 0.0, "params/physical_reduction": 0.0, "size/reduction": 0.0, "memory/reduction": 0.0,
    "memory/weights_mb": 10.0, "memory/dense_weights_mb": 10.0,
    "latency/prefill_speedup": 1.01, "latency/prefill_speedup_low": 0.98, "latency/prefill_speedup_high": 1.04,
    "latency/decode_speedup": 0.99, "latency/decode_speedup_low": 0.97, "latency/decode_speedup_high": 1.02,
}  # fmt: skip


def said(**changes: float) -> list[str]:
    """The notes of DENSE with changes; a double underscore stands for the slash of a name."""
    return run_warnings.of_figures(DENSE | {name.replace("__", "/"): value for name, value in changes.items()})


def faster(stage: str, value: float, low: float, high: float) -> dict[str, float]:
    name = f"latency__{stage}_speedup"
    return {name: value, f"{name}_low": low, f"{name}_high": high}


FASTER: dict[str, Any] = faster("prefill", 1.5, 1.4, 1.6) | faster("decode", 1.2, 1.1, 1.3)


def test_a_model_that_nothing_happened_to_needs_no_words() -> None:
    assert said() == []


@pytest.mark.parametrize(("bits", "is_strange"), [(4.4, False), (4.6, True)])
def test_a_model_that_knows_nothing_of_the_text_is_told(bits: float, is_strange: bool) -> None:
    found = said(quality__dense_bits_per_byte=bits)
    assert len(found) == is_strange
    assert all("predicts this text badly" in note and "dataset.path=" in note for note in found)


@pytest.mark.parametrize(("asked", "realized", "is_told"), [(0.5, 0.0, True), (0.5, 0.25, False), (0.0, 0.0, False)])
def test_an_amount_of_which_nothing_came_is_told(asked: float, realized: float, is_told: bool) -> None:
    found = said(amount__requested=asked, amount__realized=realized)
    assert len(found) == is_told
    assert all(note.startswith("nothing was removed: amount=0.5 is less than one of the units") for note in found)


def test_zeros_in_dense_tensors_come_with_what_they_did_not_save() -> None:
    (note,) = said(params__nonzero=500, memory__reduction=-0.003)
    assert note == (
        "50% of the parameters are zeros; measured beside the dense model: disk +0.0%, weights in memory +0.0%, "
        "peak memory +0.3%, prefill 1.010 [0.980, 1.040], decode 0.990 [0.970, 1.020]: "
        "the tensors are dense, zeros save neither bytes nor time in them"
    )


def test_zeros_are_not_called_dense_where_the_weights_take_less_room() -> None:
    """2:4 kernels or 8 bits: the figures stand for themselves."""
    (note,) = said(params__nonzero=500, memory__weights_mb=5.6, size__reduction=0.1, memory__reduction=0.2, **FASTER)
    assert note.endswith("decode 1.200 [1.100, 1.300]")
    assert "weights in memory -44.0%" in note


def test_few_zeros_and_removed_parameters_are_no_zeros() -> None:
    """A padding row of zeros is not one of pruning's; what is removed is in both reductions."""
    assert said(params__nonzero=991) == []
    removed = {"params__nonzero": 600, "params__total": 605, "params__physical_reduction": 0.395}
    removed |= {"memory__weights_mb": 6.05}
    assert said(**removed, size__reduction=0.395, memory__reduction=0.3, **FASTER) == []


def test_zeros_that_were_there_before_are_said_and_are_none_of_the_run() -> None:
    before = {"params__dense_nonzero": 500, "params__nonzero": 500}
    (note,) = said(**before)
    assert note.startswith("500 of the model's 1,000 parameters (50.0%) were zero before this run")
    _, more = said(**before | {"params__nonzero": 300})
    assert more.startswith("70% of the parameters are zeros")
    assert said(params__dense_nonzero=996, params__nonzero=996) == []


def test_zeros_that_save_bytes_on_disk_are_not_said_to_save_none() -> None:
    (note,) = said(params__nonzero=500, size__reduction=0.4, memory__reduction=0.3)
    assert note.endswith("decode 0.990 [0.970, 1.020]")


def test_what_was_not_measured_is_not_in_the_note() -> None:
    figures = {name: value for name, value in DENSE.items() if name.split("/")[0] in ("params", "size")}
    figures |= {"memory/weights_mb": 10, "memory/dense_weights_mb": 10, "params/nonzero": 750}
    (note,) = run_warnings.of_figures(figures)
    assert "disk +0.0%, weights in memory +0.0%: the tensors are dense" in note
    assert "peak" not in note


def test_removed_parameters_without_a_speedup() -> None:
    smaller = {"params__reduction": 0.18, "params__physical_reduction": 0.18, "size__reduction": 0.18}
    first, second = said(**smaller)
    assert first == "18% of the parameters are gone, but no prefill speed-up: 1.010 [0.980, 1.040] contains 1"
    assert second == "18% of the parameters are gone, but no decode speed-up: 0.990 [0.970, 1.020] contains 1"
    (note,) = said(**smaller, **faster("prefill", 1.2, 1.001, 1.3))
    assert "no decode speed-up" in note
    assert said(**smaller, **FASTER) == []
    there = {name.replace("latency", "llama_cpp"): value for name, value in faster("decode", 1.0, 0.9, 1.1).items()}
    (note,) = said(**smaller, **FASTER, **there)
    assert note.endswith("but no decode speed-up in llama.cpp: 1.000 [0.900, 1.100] contains 1")


@pytest.mark.parametrize(("high", "is_slower"), [(0.999, True), (1.0, False)])
def test_a_slower_model_is_called_slower(high: float, is_slower: bool) -> None:
    found = said(**faster("decode", 0.9, 0.85, high))
    assert found == ([f"decode is slower than the dense model's: speed-up 0.900 [0.850, {high:.3f}]"] * is_slower)


@pytest.mark.parametrize(("peak", "disagrees"), [(0.29, True), (0.31, False), (0.69, False), (0.71, True)])
def test_disk_and_memory_may_disagree(peak: float, disagrees: bool) -> None:
    found = said(size__reduction=0.5, memory__reduction=peak)
    words = f"disk and memory disagree: -50% on disk, -{peak:.0%} at the peak of memory; quote both"
    assert found == [words] * disagrees


@pytest.mark.parametrize(
    ("low", "high", "is_quiet"),
    [(0.97, 1.02, True), (1.0, 1.1, True), (0.9, 1.0, True), (1.001, 1.1, False), (0.9, 0.999, False)],
)
def test_a_machine_that_finds_the_dense_model_unlike_itself_is_not_quiet(
    low: float, high: float, is_quiet: bool
) -> None:
    found = said(**faster("aa_prefill", 1.0, 0.99, 1.01), **faster("aa_decode", 1.0, low, high))
    assert len(found) == (not is_quiet)
    for note in found:
        assert f"the machine is not quiet: decode of the dense model against itself is 1.000 [{low:.3f}," in note


APART = {"path": "a.jsonl", "test_path": "b.txt"}
OWN, NAMED, SHARED = (
    {"own": own, "source": "x", "n_samples": 8, "mix": None, "text": None if own else {"also_in_the_run": also}}
    for own, also in ((True, 0), (False, 0), (False, 3))
)


@pytest.mark.parametrize(
    ("seen", "facts", "removed", "is_in_domain"),
    [
        (None, {}, 0.5, False), (NAMED, {}, 0.5, False), (OWN, {}, 0.5, True), (SHARED, {}, 0.5, True),
        (OWN, APART, 0.5, False), (SHARED, APART, 0.5, False), (OWN, {}, 0.0, False),
    ],
)  # fmt: skip
def test_calibration_on_the_text_that_is_tested_on_is_said(
    seen: dict[str, Any] | None, facts: dict[str, str], removed: float, is_in_domain: bool
) -> None:
    """Neither where the test text is another one, nor where nothing was pruned by it."""
    protocol = {"calibration": seen, "dataset": "wikitext2", "dataset_facts": facts}
    found = run_warnings.of_calibration(protocol, {"amount/realized": removed})
    assert len(found) == is_in_domain
    assert all(note.startswith("calibrated on text of wikitext2") for note in found)


@pytest.mark.parametrize(
    ("metrics", "here", "is_said"),
    [
        ({"latency/prefill_speedup": 1.0}, {"cpu": "A", "threads": 2}, False),
        ({"latency/prefill_speedup": 1.0}, {"cpu": "B", "threads": 2}, True),
        ({"memory/peak_mb": 1.0}, {"cpu": "A", "threads": 4}, True),
        ({"latency/prefill_speedup": 1.0}, {"cpu": "A", "gpu": "C", "threads": 2}, True),
        ({"quality/perplexity": 1.0}, {"cpu": "B", "threads": 2}, False),
    ],
)
def test_times_of_another_machine_are_said_where_a_result_is_served(
    metrics: dict[str, float], here: dict[str, Any], is_said: bool
) -> None:
    finished = Summary("FINISHED", metrics=metrics, environment={"cpu": "A", "gpu": None, "threads": 2})
    assert len(run_warnings.of_elsewhere(finished, here)) == is_said


def test_energy_that_was_asked_for_and_could_not_be_measured() -> None:
    asked = {"energy": True, "device": "cpu"}
    assert run_warnings.of_energy({"energy": False, "device": "cpu"}, {}) == []
    assert run_warnings.of_energy(asked, {"energy/joules_per_token": 1.0}) == []
    assert "energy_uj" in run_warnings.of_energy(asked, {})[0]
    assert "prune-lab[energy]" in run_warnings.of_energy(asked | {"device": "cuda:0"}, {})[0]
