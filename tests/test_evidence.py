"""On the shipped model and its text the methods rank as their papers say."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import pytest
from conftest import CPU, ROOT
from test_methods import method

from prune_lab.measure.perplexity import measure_losses, quality_of
from prune_lab.models.anatomy import Anatomy
from prune_lab.models.load import HubModel, Loaded, ModelSource, Tiny
from prune_lab.pruning.calibration import Calibrator
from prune_lab.system.console import Console
from prune_lab.text.source import TextSource
from prune_lab.text.stdlib import Stdlib
from prune_lab.text.text_files import TextFiles
from prune_lab.text.tokens import Tokens

pytestmark = pytest.mark.process  # no process of its own, but whole runs on the shipped model

QUIET = Console(quiet=True)


class Lab:
    """A model, 16 windows of its calibration text and 16 test windows: with twice as many the margins are the same."""

    def __init__(self, model: ModelSource, text: TextSource) -> None:
        self.dense: Loaded = model.load(CPU, seed=0)
        self.tokens = Tokens(text.corpus(), self.dense.tokenizer)
        self.calibrator = Calibrator(self.tokens.calibration_windows(16, 256, seed=0).windows)
        windows = self.tokens.windows("test", 256)
        self.windows = windows[:: max(1, len(windows) // 16)][:16]

    def perplexity(self, option: str, amount: float = 0.6, **keys: object) -> float:
        model = copy.deepcopy(self.dense.model)
        method(option, amount, **keys).prune(Anatomy(model), amount, 0, self.calibrator)
        per_token = self.tokens.bytes_per_token("test")
        return quality_of(measure_losses(model, self.windows, 16, CPU, QUIET), per_token).perplexity


def lab_of(model: ModelSource, text: TextSource, cache: Path) -> Lab:
    with pytest.MonkeyPatch.context() as place:
        place.setenv("PRUNE_LAB_CACHE", str(cache))
        return Lab(model, text)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """The shipped model and its text."""
    return lab_of(Tiny(), Stdlib(), tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """A Llama that others trained (TinyStories-656K) and text of its kind."""
    place = ROOT.parent / "shared" / "data" / "tinystories-656k"
    if not place.is_dir():
        pytest.skip("the checkpoint TinyStories-656K does not lie beside this project")
    text = TextFiles(path=str(place / "stories.txt"))
    return lab_of(HubModel(name=str(place)), text, tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("amount", [0.5, 0.6, 0.7])
def test_on_a_checkpoint_of_others_the_order_is_the_published_one(stories: Lab, amount: float) -> None:
    found = [stories.perplexity(option, amount) for option in ("sparsegpt", "wanda", "magnitude", "random")]
    assert all(a < b for a, b in itertools.pairwise(found)), found


def test_at_0_6_sparsegpt_is_best_and_chance_is_worst(lab: Lab) -> None:
    """Wanda and magnitude rank other sets of weights: below they are compared with the same ones."""
    found = [lab.perplexity(option) for option in ("none", "sparsegpt", "ria", "magnitude", "random")]
    assert all(a < b for a, b in itertools.pairwise(found)), found
    assert found[1] < lab.perplexity("wanda") < found[-1]


@pytest.mark.parametrize("scope", ["row", "layer"])
def test_among_the_same_weights_wanda_chooses_better_than_magnitude(lab: Lab, scope: str) -> None:
    assert lab.perplexity("wanda", scope=scope) < lab.perplexity("magnitude", scope=scope)


def test_a_looser_pattern_costs_less(lab: Lab) -> None:
    assert lab.perplexity("sparsegpt", pattern="4:8") < lab.perplexity("sparsegpt", pattern="2:4")


def test_activations_tell_more_of_a_channel_than_its_norm_does(lab: Lab) -> None:
    """At the same size: design's trial saw 21 against 46 at 0.4."""
    norm = lab.perplexity("structured", 0.4, score="l2", refit="none")
    assert lab.perplexity("structured", 0.4, score="wanda", refit="none") < norm
    assert lab.perplexity("wifv", 0.4) < norm
    assert lab.perplexity("taylor", 0.4) < norm


@pytest.mark.parametrize("units", ["mlp", "heads"])
def test_the_default_choice_and_refit_beat_each_score_without(lab: Lab, units: str) -> None:
    default = lab.perplexity("structured", 0.5, units=[units])
    assert default < 0.97 * min(lab.perplexity(option, 0.5, units=[units]) for option in ("wifv", "taylor"))


@pytest.mark.slow
@pytest.mark.process  # the daily loop leaves it out
def test_trying_blocks_is_no_worse_than_their_influence(lab: Lab) -> None:
    assert lab.perplexity("depth", 0.4, by="perplexity") <= lab.perplexity("depth", 0.4, by="bi") * 1.001


@pytest.mark.slow
@pytest.mark.process  # the daily loop leaves it out
def test_an_allocation_by_outliers_or_by_a_scan_beats_equal_shares(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """On 6 windows: a scan prunes each block at four amounts. The margin, 40 against 28 and 29, is that of 16."""
    monkeypatch.setattr(lab, "calibrator", Calibrator(lab.tokens.calibration_windows(6, 256, seed=0).windows))
    uniform = lab.perplexity("wanda", 0.7)
    assert lab.perplexity("wanda", 0.7, allocation="owl") < uniform
    assert lab.perplexity("wanda", 0.7, allocation="sensitivity") < uniform
