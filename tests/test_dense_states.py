"""The dense model passes the windows that are compared once for all runs on it, with the figures of a pass for each."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import CPU, make_folder
from model_types import tiny_folder
from test_bos import with_bos
from test_divergence import QUIET, evaluated, evaluator_of, pruned

from prune_lab.evaluator import Evaluator
from prune_lab.measure import dense_states
from prune_lab.measure.perplexity import measure_beside, measure_losses
from prune_lab.models.anatomy import Anatomy
from prune_lab.models.load import HubModel


def passed(evaluator: Evaluator) -> list[int]:
    """Tokens of each forward pass of the dense model from now on."""
    seen = list[int]()
    evaluator.dense.model.get_input_embeddings().register_forward_hook(
        lambda _, args, out: seen.append(args[0].numel())
    )
    return seen


@pytest.mark.parametrize("kl_windows", [1, 5, None])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "opt"])
def test_figures_are_those_of_the_model_beside(
    tmp_path: Path, corpus: Path, family: str, kl_windows: int | None
) -> None:
    """To the last bit, whether the states are new, in memory or on disk; with a BOS, and of five windows in fours."""
    for number in range(2):
        evaluator = evaluator_of(with_bos(make_folder(tmp_path / f"{number}", family)), corpus, kl_windows=kl_windows)
        compressed, windows, compared = pruned(evaluator.dense).model, evaluator.windows, evaluator.compared
        of = (windows, 4, CPU, QUIET, evaluator.bos)
        losses, divergence = measure_beside(compressed, evaluator.dense.model, compared, *of)
        assert torch.equal(evaluator.dense_losses(QUIET), measure_losses(evaluator.dense.model, *of))
        assert evaluator.dense_states is not None
        assert len(evaluator.dense_states.windows) == min(6, -(-compared // 4) * 4)
        for _ in range(2):
            found = evaluator.measure_quality(pruned(evaluator.dense), QUIET)
            assert torch.equal(found[0], losses)
            assert found[1] == divergence


def test_the_text_passes_once(folder: Path, corpus: Path, tmp_path: Path) -> None:
    """In the first process; another one has all from the cache, and needs the head alone."""
    for expected in ([4 * 24, 2 * 24], []):
        evaluator = evaluator_of(folder, corpus)
        compressed, seen = pruned(evaluator.dense), passed(evaluator)
        evaluator.baseline(None, QUIET)
        for _ in range(3):
            evaluated(evaluator, compressed, tmp_path)
        assert seen == expected


def test_the_rest_of_the_text_passes_beside(folder: Path, corpus: Path, tmp_path: Path) -> None:
    """One window of six is compared, in a batch of four: the other two have losses alone."""
    evaluator = evaluator_of(folder, corpus, kl_windows=1)
    copy = evaluator.copy_of_dense(tmp_path)
    seen = passed(evaluator)
    evaluator.dense_losses(QUIET)
    evaluated(evaluator, copy, tmp_path)
    assert seen == [4 * 24, 2 * 24]


def test_without_a_cache_it_passes_once_in_a_process(
    folder: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRUNE_LAB_CACHE_GB", "0")
    evaluator = evaluator_of(folder, corpus)
    compressed, seen = pruned(evaluator.dense), passed(evaluator)
    for _ in range(2):
        evaluated(evaluator, compressed, tmp_path)
    assert sum(seen) <= 6 * 24 + 4 * 24  # the first batch again, of which it was seen that the disk keeps nothing
    assert evaluated(evaluator, compressed, tmp_path).divergence is not None
    assert sum(seen) <= 6 * 24 + 4 * 24


@pytest.mark.parametrize("change", ["text", "batch", "bos", "weights"])
def test_other_states_of_another_text_batch_bos_or_model(tmp_path: Path, corpus: Path, change: str) -> None:
    place = with_bos(make_folder(tmp_path / "m"))
    first = evaluator_of(place, corpus)
    evaluated(first, pruned(first.dense), tmp_path)
    keys = {"batch": {"batch_size": 3}, "bos": {"add_bos": "true"}}.get(change, {})
    if change == "text":
        corpus = tmp_path / "other.txt"
        corpus.write_text("Another text, of other words. " * 3000, encoding="utf-8")
    if change == "weights":
        place = with_bos(make_folder(tmp_path / "other", seed=1))
    again = evaluator_of(place, corpus, **keys)
    seen = passed(again)
    assert again.dense_states is not None
    assert len(list(again.dense_states.batches(QUIET))) == len(seen) > 0


def test_states_of_a_streamed_model_are_those_in_memory(folder: Path, corpus: Path, tmp_path: Path) -> None:
    evaluator = evaluator_of(folder, corpus)
    assert evaluator.dense_states is not None
    kept = list(evaluator.dense_states.batches(QUIET))
    streamed = HubModel(name=str(folder), stream=True).load(CPU, seed=0)
    assert Anatomy(streamed.model).is_on_disk
    of = (streamed.model, evaluator.windows, 4, CPU, evaluator.bos, evaluator.dense_cache)
    (tmp_path / "cache" / "dense_states").rename(tmp_path / "gone")
    evaluator.dense_cache._parts.clear()
    assert all(torch.equal(a, b) for a, b in zip(kept, dense_states.DenseStates(*of).batches(QUIET), strict=True))


@pytest.mark.parametrize(("model_type", "kept"), [("llama", True), ("olmo2", True), ("qwen3_moe", False)])
def test_a_mixture_runs_beside(tmp_path: Path, corpus: Path, model_type: str, kept: bool) -> None:
    """Its choices of experts are compared while both run."""
    folder = tiny_folder(tmp_path / "m", model_type)
    evaluator = evaluator_of(folder, corpus)
    assert (evaluator.dense_states is not None) == kept
    found = evaluated(evaluator, pruned(evaluator.dense), tmp_path)
    assert (found.same_experts is None) == kept


def test_states_that_are_too_many_are_not_kept(folder: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluator = evaluator_of(folder, corpus)
    hidden = evaluator.dense.model.config.hidden_size
    for most, kept in ((6 * 24 * hidden * 4, True), (6 * 24 * hidden * 4 - 1, False)):
        monkeypatch.setattr(dense_states, "MOST", most)
        assert dense_states.can_keep_states(evaluator.dense.model, evaluator.windows) == kept
